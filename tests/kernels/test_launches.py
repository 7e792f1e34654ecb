"""How kernels are launched: options that no compiled test sees."""

import ast
from pathlib import Path

import quantpress


def launches(source: str) -> list[ast.Call]:
    """Calls such as `some_kernel[grid](...)` or `quick(some_kernel)[grid](...)`."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        call
        for call in calls
        if isinstance(call.func, ast.Subscript) and ast.unparse(call.func.value).rstrip(")").endswith("kernel")
    ]


def test_every_launch_says_whether_arithmetic_is_fused() -> None:
    """Left open, Triton 3.10 compiles products and sums apart: slower, and rounded otherwise."""
    files = [file for root in quantpress.kernels.__path__ for file in Path(root).rglob("*.py")]
    found = [call for file in files for call in launches(file.read_text(encoding="utf-8"))]
    assert len(found) >= 10
    for call in found:
        given = {ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg is None}
        assert given & {"FUSED", "ROUNDED", "self.options"}, ast.unparse(call)
