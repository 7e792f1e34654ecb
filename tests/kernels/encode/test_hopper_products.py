"""Products of the Hopper encode kernel by a model of how tensor cores add up."""

import pytest
import torch

from quantpress.kernels.encode import hopper_encode
from quantpress.quantization.spec import CodecSpec
from tests.kernels.triton_cases import NEAR_TIE


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("role", ("key", "value"))
@pytest.mark.parametrize("bits", (2, 3, 4))
def test_tensor_cores_see_normal_numbers(bits: int, role: str, dtype: torch.dtype) -> None:
    """Products with the rotation, as tensor cores add them up, have float32's accuracy.

    Sums of 16 products and what was added up before are cut 25 bits below the leading bit that the largest of
    them can have by the exponents of its factors. A factor below the normal numbers has the exponent of the
    least normal one, so all bits above its own count as zeros: a rotation of 2**-24 in float16 lost ten.
    """
    spec = CodecSpec(128, bits, role)
    x = (torch.randn(200, 64) * torch.rand(64).mul(3).exp2()).to(dtype)
    matrix = hopper_encode._constants(spec, dtype, torch.device("cpu"))["matrix_ptr"][:64]
    exact = x.double() @ matrix.double()
    lost = (cut_product(x, matrix) - exact).abs() / exact.norm(dim=-1, keepdim=True)
    assert float(lost.max()) < NEAR_TIE / 4  # u and v, of half a vector each


def cut_product(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """x @ matrix by `test_tensor_cores_see_normal_numbers`; x may have 11 bits."""
    sums = torch.zeros(len(x), matrix.shape[1], dtype=torch.float64)
    for start in range(0, x.shape[1], 16):
        left, right = x[:, start : start + 16, None], matrix[None, start : start + 16]
        exponent = (seen_exponent(left) + seen_exponent(right)).amax(1)
        exponent = torch.where(sums == 0, exponent, torch.maximum(exponent, torch.frexp(sums).exponent - 1))
        step = torch.exp2(exponent.double() - 25)
        parts = torch.cat((left.double() * right.double(), sums[:, None]), 1)
        sums = ((parts / step[:, None]).trunc().sum(1) * step).float().double()
    return sums


def seen_exponent(x: torch.Tensor) -> torch.Tensor:
    """Exponents of the leading bits that numbers of a dtype could have, by their exponent alone."""
    least = torch.frexp(torch.tensor(torch.finfo(x.dtype).tiny)).exponent
    return (torch.frexp(x.float()).exponent.clamp(min=least) - 1).to(torch.int64)
