"""Attention over dense and packed segments: `attend`, which chooses between the kernels and plain PyTorch.

operands.py         segments of tokens, and which of them each query sees
reference.py        plain PyTorch: the truth that the kernels are held to
triton_attend.py    which tokens the kernels read, and attention to them
calls/              launches the kernels for packed and 16-bit tokens together
prepare.py          a first launch, where the next one cannot do it: queries into code space, 16-bit tokens
split_mma.py        all tokens, on int8 tensor cores: page_step.py, words.py, lookup.py, tiles.py
opening/            what its programs do before packed tokens: turn queries, attend 16-bit tokens
split_plain.py      packed tokens in float32, for Triton's interpreter
parts/              the launches for what int8 does not read: codes in parts, other levels
merge/              the last launch: partial sums become the output
triton_dense.py, dense.py            16-bit tokens alone
schedule.py, schedule_kernel.py      which program reads which pages, where heads have page tables
"""

from collections.abc import Sequence
from typing import Any

import torch

from quantpress.errors import InvalidInputError
from quantpress.kernels.attend.operands import DenseSegment, PackedSegment, PackedSide, Segment, Visibility
from quantpress.kernels.attend.reference import attend_reference
from quantpress.kernels.attend.triton_attend import attend_triton, supports
from quantpress.kernels.attend.triton_dense import attend_dense, supports_dense
from quantpress.kernels.available import runs_triton
from quantpress.quantization.numerics import in_named_dtypes

__all__ = ["DenseSegment", "PackedSegment", "PackedSide", "Segment", "Visibility", "attend"]


@in_named_dtypes
def attend(
    query: torch.Tensor,
    segments: Sequence[Segment],
    visibility: Visibility,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scaling * q.k + mask) v over the tokens of all segments.

    Packed tokens are never all decoded at once: the kernels read the codes, plain PyTorch decodes some pages
    at a time.

    Args:
        query: [B, Hq, Tq, D] any float dtype, after the rotary embedding.
        segments: the tokens in order, each segment dense or packed; at least one token in all.
        visibility: which tokens each query token sees.
        scaling: factor on q.k.
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2), or None.
        sinks: [Hq] learned logits that take part in the softmax and carry no value (gpt-oss), or None.
        slots: [B] int64: the 16-bit tokens and the channel transforms of the segments are those of S
            sequences, [S, ...], and batch entry b reads those of slots[b]. Codes, lengths, starts and tables
            stay [B, ...]. None: they are those of the B batch entries, in order.
        out: [B, Hq, Tq, Dv] contiguous in the query's dtype, written; None: a new tensor.

    Returns:
        [B, Hq, Tq, Dv] in the query's dtype. A query that sees nothing gets zeros.

    Raises:
        InvalidInputError: there is no token; the number of tokens is not the one that `visibility` has; Hq is
            not a multiple of Hkv; `lengths` or `starts` of a segment are not [B, Hkv] int32, or its table is
            not [B, Hkv, P] (dense: [B, P]) int32, on the query's device; `slots` are not [B] int64, or a
            packed segment beside them has no table, or a dense one has.
    """
    filled = [segment for segment in segments if segment.tokens > 0]
    tokens = sum(segment.tokens for segment in filled)
    if tokens == 0 or tokens != visibility.tokens:
        raise InvalidInputError(
            f"attention over {tokens} tokens, but the mask is for {visibility.tokens}; pass both alike"
        )
    heads = filled[0].kv_heads
    if query.shape[1] % heads:
        raise InvalidInputError(f"{query.shape[1]} query heads are not a multiple of {heads} KV heads")
    for segment in filled:
        _check_lengths(segment, (query.shape[0], heads), query.device)
    if slots is not None:
        _check_slots(slots, filled, query)
    if out is not None:
        _check_out(out, filled[0], query)
    options: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
    fast = runs_triton(query.device)
    if fast and supports(query, filled, visibility):
        return attend_triton(query, filled, visibility, slots=slots, out=out, **options)
    if slots is not None:
        filled = [segment.of_slots(slots) for segment in filled]
    dense = fast and supports_dense(query, filled, visibility)
    found = (attend_dense if dense else attend_reference)(query, filled, visibility, **options)
    return found if out is None else out.copy_(found)


def _check_out(out: torch.Tensor, segment: Segment, query: torch.Tensor) -> None:
    if isinstance(segment, DenseSegment):
        value_dim = segment.values.shape[-1]
    else:
        value_dim = segment.values.codec.head_dim
    shape = (*query.shape[:3], value_dim)
    if tuple(out.shape) != shape or out.dtype != query.dtype or not out.is_contiguous():
        raise InvalidInputError(
            f"out is {out.dtype} {tuple(out.shape)} with strides {out.stride()}; "
            f"give contiguous {query.dtype} {list(shape)}"
        )


def _check_slots(slots: torch.Tensor, segments: Sequence[Segment], query: torch.Tensor) -> None:
    if slots.dtype != torch.int64 or slots.shape != query.shape[:1] or slots.device != query.device:
        raise InvalidInputError(
            f"slots are {slots.dtype} {tuple(slots.shape)} on {slots.device}; "
            f"give torch.int64 [{query.shape[0]}] on {query.device}"
        )
    if any(isinstance(segment, PackedSegment) and segment.table is None for segment in segments):
        raise InvalidInputError("slots beside packed tokens without a table; give the segment its table")
    for segment in segments:
        if isinstance(segment, DenseSegment):
            segment.check_slots()


def _check_lengths(segment: Segment, shape: tuple[int, int], device: torch.device) -> None:
    for name, counts in (("lengths", segment.lengths), ("starts", segment.starts)):
        wrong = counts is not None and (
            tuple(counts.shape) != shape or counts.dtype != torch.int32 or counts.device != device
        )
        if counts is not None and wrong:
            raise InvalidInputError(
                f"{name} of a segment are {tuple(counts.shape)} {counts.dtype} on {counts.device}; "
                f"give [B, Hkv] = {shape} torch.int32 on {device}"
            )
    table = segment.table
    lead = shape if isinstance(segment, PackedSegment) else shape[:1]
    if table is not None and (tuple(table.shape[:-1]) != lead or table.device != device):
        raise InvalidInputError(
            f"the table of a segment is {tuple(table.shape)} on {table.device}; "
            f"give [{', '.join(map(str, lead))}, P] on {device}"
        )
