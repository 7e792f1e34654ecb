"""The kernels of linear layers against float64, beside PyTorch."""

import re
from typing import Any

import pytest
import torch

from quantpress.kernels.available import FUSED
from quantpress.kernels.joined.linear_launches import MOST_ROWS, Tiling, Weights, gated_linear, linear
from quantpress.kernels.joined.reference import gated_linear_reference, linear_reference
from tests.kernels.interpreter import interpret
from tests.kernels.triton_cases import compile_only

SIXTEEN = [torch.bfloat16, torch.float16]
CASES = [  # rows, columns, outputs of layers, tiling: ragged in each of the three
    (1, 520, (9,), Tiling(4, 256, 2)),
    (2, 72, (13, 8, 3), Tiling(8, 64, 4)),
    (3, 96, (9, 4), Tiling(4, 32, 1)),
    (4, 8, (5, 7, 3), None),
]
LARGE = [
    (1, 4096, (4096, 1024, 1024), None),
    (2, 896, (1152,), None),
    (3, 14336, (4096,), None),
    (4, 4096, (32064,), None),
]


def layers_of(sizes: tuple[int, ...], columns: int, dtype: torch.dtype, device: str) -> list[Weights]:
    """Weights, with biases where there are several."""
    return [
        (
            torch.randn(size, columns, device=device).div(columns**0.5).to(dtype),
            torch.randn(size, device=device).to(dtype) if len(sizes) > 1 else None,
        )
        for size in sizes
    ]


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    assert found.shape == exact.shape and found.is_contiguous()
    return float((found.double() - exact).square().mean().sqrt())


def doubled(x: torch.Tensor, layers: list[Weights]) -> tuple[torch.Tensor, list[Weights]]:
    return x.double(), [(weight.double(), None if bias is None else bias.double()) for weight, bias in layers]


def check(case: Any, dtype: torch.dtype, device: str) -> None:
    """Errors are PyTorch's; biases, a residual and a gated pair are among the cases.

    Few outputs may all round to the wrong side: there, a unit in the last place is allowed for each of four
    roundings.
    """
    rows, columns, sizes, tiling = case
    few = 0 if case in LARGE else 4 * torch.finfo(dtype).eps

    def near(found: torch.Tensor, own: torch.Tensor, right: torch.Tensor) -> None:
        assert error(found, right) <= 1.1 * error(own, right) + few * float(right.square().mean().sqrt())

    x = torch.randn(rows, 1, columns, device=device).to(dtype)
    layers = layers_of(sizes, columns, dtype, device)
    exact = linear_reference(*doubled(x, layers))
    if len(sizes) == 1:
        residual = torch.randn(rows, 1, sizes[0], device=device).to(dtype)
        (own,), (found,) = linear_reference(x, layers, residual), linear(x, layers, residual, tiling=tiling)
        near(found, own, exact[0] + residual.double())
    for results in zip(linear(x, layers, tiling=tiling), linear_reference(x, layers), exact, strict=True):
        near(*results)
    pair = [*layers_of((sizes[0], sizes[0]), columns, dtype, device)]
    near(
        gated_linear(x, pair, tiling),
        gated_linear_reference(x, pair),
        gated_linear_reference(*doubled(x, pair)),
    )


def test_interpreted() -> None:
    pytest.importorskip("triton")
    assert interpret(__file__).splitlines()[-1] == "exact"


@pytest.mark.parametrize(("capability", "rows"), [(80, MOST_ROWS), (90, 1)])
def test_compiles_without_a_gpu(capability: int, rows: int) -> None:
    """Each thread loads 16 bytes at once, and the first weights before it waits for the kernel before."""
    pytest.importorskip("triton")
    from quantpress.kernels.joined.linear_kernel import gated_linear_kernel, linear_kernel

    sizes = {"K": 4096, "R": rows, "ROWS": rows, "CHANNELS": 2, "BLOCK": 1024, "CHAINED": capability >= 90}
    third, biases = ("third_ptr", "third_bias_ptr"), ("bias_ptr", "second_bias_ptr", "third_bias_ptr")
    left_out = {1: ("second_ptr", "second_bias_ptr", *third), 2: third, 3: ()}
    ways: list[tuple[Any, dict[str, Any]]] = [(gated_linear_kernel, {"LIBRARY": True})]
    for parts, names in left_out.items():
        ways.append((linear_kernel, {"PARTS": parts, **dict.fromkeys(names)}))
    ways.append((linear_kernel, {"PARTS": 3, **dict.fromkeys(biases)}))
    for kernel, values in ways:
        arguments: dict[str, Any] = {}
        for name in kernel.arg_names:
            arguments[name] = torch.empty(1, dtype=torch.bfloat16) if name.endswith("_ptr") else 7
        made = compile_only(kernel, arguments | sizes | values, capability, 4, rounding=FUSED).asm
        loads = [found.start() for found in re.finditer(r"ld\.global\S*evict_first\S*v4\.b32", made["ptx"])]
        assert loads and "convert_layout" not in made["ttgir"].split("scf.for")[1].split("scf.yield")[0]
        if capability >= 90:
            assert loads[0] < made["ptx"].index("griddepcontrol.wait") < loads[-1]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=lambda case: str(case[:3]))
def test_on_a_gpu(case: Any, dtype: torch.dtype) -> None:
    check(case, dtype, "cuda")


@pytest.mark.gpu
def test_a_chain_waits_for_what_it_reads() -> None:
    """In a graph, each kernel starts while the one whose result it reads still runs."""
    layers = [layers_of((4096,), 4096, torch.bfloat16, "cuda") for _ in range(8)]
    first = torch.randn(1, 1, 4096, device="cuda").to(torch.bfloat16)
    expected = first
    for layer in layers:
        (expected,) = linear(expected, layer, expected)
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = first
        for layer in layers:
            (found,) = linear(found, layer, found)
    for _ in range(20):
        found.zero_()
        graph.replay()
        assert torch.equal(found, expected)


if __name__ == "__main__":
    for case in CASES:
        check(case, torch.float16, "cpu")
    check(CASES[0], torch.bfloat16, "cpu")
    print("exact")
