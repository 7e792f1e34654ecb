"""Attention to two sets of keys, weighed into one, against softmax over both in float64."""

import json
from typing import Any

import pytest
import torch

from quantpress.kernels.combine import combine_attention, launch_combine
from quantpress.kernels.combine.reference import ROWS
from tests.kernels.interpreter import interpret
from tests.kernels.triton_cases import compile_only

SHAPES = [(1, 1, 1, 8), (2, 3, 70, 80), (1, 2, ROWS + 5, 64)]


def parts(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu"
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """What two kernels give for keys of very different weight, and what both together are."""
    batch, heads, tokens, channels = shape
    scores = torch.randn(2, batch, heads, tokens, 6, dtype=torch.float64) * 4
    scores[1] += torch.randn(batch, heads, tokens, 1) * 20
    values = torch.randn(2, batch, heads, 6, channels, dtype=torch.float64)
    found: list[torch.Tensor] = []
    for score, value in zip(scores, values, strict=True):
        attended = (score.softmax(-1) @ value).to(dtype)
        found += [
            attended.transpose(1, 2).contiguous().transpose(1, 2).to(device),
            score.logsumexp(-1, True).float().to(device),
        ]
    log_sums = [one.double().cpu() for one in found[1::2]]
    share = torch.sigmoid(log_sums[1] - log_sums[0])
    exact = torch.lerp(found[0].cpu().double(), found[2].cpu().double(), share)
    return found, exact, torch.cat(list(scores), -1).logsumexp(-1, True)


def errors(
    shape: tuple[int, ...], dtype: torch.dtype, plain: bool, device: str = "cpu"
) -> tuple[float, float]:
    """Relative error of the output, and of the sum of exponentials (a difference of logarithms)."""
    found, exact, log_sum = parts(shape, dtype, device)
    (combine_attention if plain else launch_combine)(*found)
    error = (found[0].cpu().double() - exact).norm() / exact.norm()
    return float(error), float((found[1].cpu() - log_sum).abs().max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    error, of_sum = errors(shape, dtype, plain=True)
    assert error < (3e-3 if dtype == torch.bfloat16 else 1e-6)
    assert of_sum < 1e-5


def test_interpreter() -> None:
    found = json.loads(interpret(__file__).splitlines()[-1])
    assert len(found) == len(SHAPES)
    assert max(error for error, _ in found) < 5e-4
    assert max(of_sum for _, of_sum in found) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "capability"), [(torch.bfloat16, 80), (torch.float16, 90), (torch.bfloat16, 100)], ids=str
)
def test_compiles_without_a_gpu(dtype: torch.dtype, capability: int) -> None:
    pytest.importorskip("triton")
    from quantpress.kernels.combine.triton_kernel import combine_kernel

    arguments: dict[str, Any] = dict.fromkeys(combine_kernel.arg_names, 1 << 20)
    arguments |= {"output_ptr": torch.empty(1, dtype=dtype), "other_ptr": torch.empty(1, dtype=dtype)}
    arguments |= {"sum_ptr": torch.empty(1), "other_sum_ptr": torch.empty(1), "CHANNELS": 128}
    assert compile_only(combine_kernel, arguments, capability, 4).asm["cubin"]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_on_a_gpu(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    error, of_sum = errors(shape, dtype, plain=True, device="cuda")
    assert error < {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 1e-6}[dtype]
    assert of_sum < 1e-5


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps([errors(shape, torch.float16, plain=False) for shape in SHAPES]))
