"""Small pieces of a model of transformers, one launch each in place of two to ten, for a step or a reading.

Each rounds where PyTorch rounds. All but linear layers add in the order in which PyTorch adds, so that
their results are equal to the last bit. `quantpress.pipelines.joined` compares each with the model's own
code before use.

order.py            the order in which PyTorch's mean adds up a row
reference.py        plain PyTorch: what models of transformers compute
norm_kernel.py      RMSNorm
rotary_kernel.py    rotary positions of queries and keys
product_kernel.py   SiLU of the gate times the other projection
write_kernel.py     the new key and value of a layer to where they are kept
launches.py         launches these kernels
linear_kernel.py    linear layers over few rows
linear_launches.py  launches them
"""

from torch import Tensor

from quantpress.kernels.available import runs_triton
from quantpress.kernels.joined.reference import write_token_reference


def write_token(keys: Tensor, values: Tensor, newest: Tensor, new_keys: Tensor, new_values: Tensor) -> None:
    """Write one token of each head to the index that the device holds.

    Args:
        keys: [B, Hkv, C, D], contiguous; written.
        values: [B, Hkv, C, Dv], contiguous; written.
        newest: [1] int64, an index below C.
        new_keys: [B, Hkv, 1, D] of any float dtype, rounded to that of `keys`.
        new_values: [B, Hkv, 1, Dv], likewise.
    """
    if runs_triton(keys.device) and new_keys.stride(3) == new_values.stride(3) == 1:
        from quantpress.kernels.joined.launches import launch_write

        launch_write(keys, values, newest, new_keys, new_values)
    else:
        write_token_reference(keys, values, newest, new_keys, new_values)
