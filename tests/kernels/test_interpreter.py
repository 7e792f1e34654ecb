"""Triton's interpreter as the tests of the kernels use it: it finds integers that leave their type."""

import json

import pytest
import torch

from tests.kernels.interpreter import interpret

pytest.importorskip("triton")

CASES = [
    [operation, first, second]
    for operation in ("add", "sub", "mul")
    for first, second in ((2**30, 2), (2**30, 2**30), (-(2**31), 1), (-(2**31), -1))
]


def test_overflow() -> None:
    """Against Python's integers, in sums, differences and products of numbers, of blocks and of both."""
    exact = {"add": int.__add__, "sub": int.__sub__, "mul": int.__mul__}
    expected = [
        [-(2**31) <= exact[operation](first, second) < 2**31] * 3 for operation, first, second in CASES
    ]
    assert {works for works, *_ in expected} == {True, False}
    assert json.loads(interpret(__file__, json.dumps(CASES)).splitlines()[-1]) == expected


if __name__ == "__main__":
    import sys

    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x_ptr, y_ptr, number, OPERATION: tl.constexpr, FORM: tl.constexpr):  # type: ignore[no-untyped-def]
        x = tl.load(x_ptr) if FORM == 0 else tl.load(x_ptr + tl.arange(0, 4))
        y = number if FORM < 2 else tl.load(y_ptr + tl.arange(0, 4))
        found = x + y if OPERATION == "add" else x - y if OPERATION == "sub" else x * y
        tl.store(x_ptr + (tl.arange(0, 4) if FORM else 0), found)

    def works(operation: str, first: int, second: int, form: int) -> bool:
        x, y = (torch.tensor([0, 0, 0, one], dtype=torch.int32, device="cpu") for one in (first, second))
        x = x[3:].clone() if form == 0 else x
        try:
            kernel[(1,)](x, y, second, operation, form)
        except Exception as error:
            assert "overflow detected" in repr(error), error
            return False
        return True

    cases = json.loads(sys.argv[1])
    print(json.dumps([[works(*case, form) for form in range(3)] for case in cases]))
