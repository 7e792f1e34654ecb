"""How kernels are launched: options that no compiled test sees."""

import ast
from pathlib import Path
from typing import Any

import torch

import quantpress
from quantpress.kernels.quick import quick


def launches(source: str) -> list[ast.Call]:
    """Calls such as `some_kernel[grid](...)` or `quick(some_kernel)[grid](...)`."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [call for call in calls if _launched(call.func).endswith("kernel")]


def _launched(function: ast.expr) -> str:
    return ast.unparse(function.value).rstrip(")") if isinstance(function, ast.Subscript) else ""


def test_every_launch_says_whether_arithmetic_is_fused() -> None:
    """Left open, Triton 3.10 compiles products and sums apart: slower, and rounded otherwise."""
    files = [file for root in quantpress.kernels.__path__ for file in Path(root).rglob("*.py")]
    found = [call for file in files for call in launches(file.read_text(encoding="utf-8"))]
    assert len(found) >= 10
    for call in found:
        given = {ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg is None}
        assert given & {"FUSED", "ROUNDED", "self.options"}, ast.unparse(call)


class Compiled:
    """Stands in for what Triton compiles."""

    def __init__(self, seen: list[Any]) -> None:
        self._seen = seen

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self._seen.append((grid, arguments))


class Jit:
    """Stands in for a kernel of `triton.jit`."""

    arg_names = ("x_ptr", "count", "scale", "WIDE")

    def __init__(self) -> None:
        self.compiled: list[Any] = []
        self.again: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **named: Any) -> Compiled:
            self.compiled.append((grid, arguments, named))
            return Compiled(self.again)

        return launch


def test_a_quick_launch_is_compiled_once_for_each_kind_of_call() -> None:
    """Dtypes, alignment and numbers decide, and the types of numbers; not which tensor it is."""
    kernel, x = Jit(), torch.zeros(32)
    calls: list[tuple[Any, ...]] = [(x, 1), (x[1:], 1), (x.half(), 1), (x, 2), (x, True)]
    for _ in range(2):
        for tensor, count in calls:
            quick(kernel)[(7,)](tensor, count, scale=0.5, WIDE=True, num_warps=4)
    quick(kernel)[(7,)](x, 1, scale=0.5, WIDE=False, num_warps=4)
    assert len(kernel.compiled) == len(calls) + 1 and len(kernel.again) == len(calls)
    for (grid, arguments), (tensor, count) in zip(kernel.again, calls, strict=True):
        assert grid == (7, 1, 1) and arguments[0] == tensor.data_ptr()
        assert arguments[1:] == (count, 0.5, True), "in the order of the kernel, without options"
    for _ in range(2):
        quick(kernel)[(3, 2)](x.clone(), WIDE=True, count=1, num_warps=4, scale=0.5)
    assert kernel.again[-1][0] == (3, 2, 1) and kernel.again[-1][1][1:] == (1, 0.5, True)
