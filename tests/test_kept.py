"""Tables are made once and stay where they are."""

import ast
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch

from quantpress.kept import kept

ROOT = Path(__file__).parents[1]


def test_nothing_is_let_go_of() -> None:
    @kept
    def table(number: int, factor: int = 1) -> torch.Tensor:
        """Of one number."""
        return torch.tensor([number * factor])

    first = [table(number) for number in range(1000)]
    assert all(table(number) is made for number, made in enumerate(first))
    assert int(table(3, factor=2)) == int(table(3, 2)) == 6
    assert table.__name__ == "table" and table.__doc__ == "Of one number."
    table.cache_clear()
    assert table(5) is not first[5]


def test_any_mode_may_use_what_another_one_made() -> None:
    made = kept(lambda: torch.ones(2))
    with torch.inference_mode():
        table = made()
    weight = torch.ones(2, requires_grad=True)
    (weight * table).sum().backward()
    assert not table.is_inference() and weight.grad is not None


def test_threads_that_ask_together_get_one_result() -> None:
    both = Barrier(2, timeout=60)

    @kept
    def table() -> torch.Tensor:
        both.wait()
        return torch.zeros(1)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: table(), range(2))
    assert first is second is table()


def test_what_fails_is_tried_again() -> None:
    tries: list[int] = []

    @kept
    def table() -> torch.Tensor:
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("no memory")
        return torch.zeros(1)

    with pytest.raises(RuntimeError, match="no memory"):
        table()
    assert table() is table() and len(tries) == 2


@pytest.mark.parametrize("folder", ["kernels", "codecs", "quantization", "cache"])
def test_tensors_on_a_device_are_in_no_cache_of_bounded_size(folder: str) -> None:
    """A captured graph may still read what such a cache drops."""
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            cached = any("lru_cache" in ast.unparse(one) for one in node.decorator_list)
            arguments = " ".join(ast.unparse(one) for one in node.args.args)
            if cached and "torch.device" in arguments and "Tensor" in ast.unparse(node.returns or node):
                found.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert not found, found
