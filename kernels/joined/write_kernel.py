"""The new key and value of a layer to where they are kept, in one launch (Triton)."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(
    do_not_specialize=["heads", "capacity", "key_b", "key_h", "value_b", "value_h"],
    do_not_specialize_on_alignment=["newest_ptr"],  # one of many in a row
)
def write_token_kernel(
    keys_ptr,
    values_ptr,
    newest_ptr,
    new_keys_ptr,
    new_values_ptr,
    heads,
    capacity,
    key_b,
    key_h,
    value_b,
    value_h,
    D: tl.constexpr,
    DV: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Write one token of one head (axis 0) of one sequence (axis 1).

    keys, values: [B, heads, capacity, D or DV], contiguous; newest: int64; new_*: [B, heads, 1, D or DV],
    channels contiguous, of any float dtype; *_b, *_h: strides; CHANNELS: a power of two, at least D and DV.
    """
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = (sequence * heads + head) * capacity + tl.load(newest_ptr)
    channel = tl.arange(0, CHANNELS)
    key = tl.load(new_keys_ptr + sequence * key_b + head * key_h + channel, mask=channel < D)
    value = tl.load(new_values_ptr + sequence * value_b + head * value_h + channel, mask=channel < DV)
    tl.store(keys_ptr + row * D + channel, key.to(keys_ptr.dtype.element_ty), mask=channel < D)
    tl.store(values_ptr + row * DV + channel, value.to(values_ptr.dtype.element_ty), mask=channel < DV)
