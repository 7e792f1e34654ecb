"""Kernels of joined steps, on the CPU."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from quantpress.kernels.joined import reference
from quantpress.pipelines.joined import pieces, products, residual_sums, step
from quantpress.pipelines.joined.piece import PROVEN


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels that ran, by name: references, on the CPU."""
    names: list[str] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            names.append("residual" if name == "linear" and len(args) == 3 else name)
            return function(*args, **options)

        return run

    kernels: dict[str, Callable[..., Any]] = {
        "rms_norm": lambda x, weight, eps, form, order: reference.rms_norm_reference(x, weight, eps, form),
        "rotary": reference.rotary_reference,
        "silu_product": reference.silu_product_reference,
        "gated_linear": reference.gated_linear_reference,
        "linear": reference.linear_reference,
    }
    for name, function in kernels.items():
        for place in (pieces, products, residual_sums):
            if hasattr(place, name):
                monkeypatch.setattr(place, name, noted(name, function))
    monkeypatch.setattr(step, "runs_triton", lambda device: True)
    PROVEN.clear()
    yield names
    PROVEN.clear()
