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


def test_what_a_graph_makes_is_its_own() -> None:
    """A compiled graph under inference mode leaves nothing behind that gradients cannot use."""
    table = kept(lambda count: torch.arange(count) * 2.0)
    with torch.inference_mode():
        compiled = torch.compile(lambda x: x + table(4), backend="aot_eager")
        assert compiled(torch.zeros(4)).tolist() == [0, 2, 4, 6]
    assert not table(4).is_inference()


# What is let go of here is numbers, text, names, specs or tensors on the CPU, or comes out of `kept`.
LET_GO = {
    "cache/host.py": {"takes", "_cache_name"},
    "codecs/protocol.py": {"one_page"},
    "codecs/scalar.py": {"constants_digest"},
    "codecs/trellis.py": {"_spec"},
    "kernels/available.py": {"runs_triton", "chains", "has_tensor_memory", "is_hopper"},
    "kernels/encode/__init__.py": {"_in_float32"},
    "kernels/encode/assembly.py": {"rounding_assembly", "squares_assembly"},
    "kernels/encode/hopper_encode.py": {"_multiprocessors", "_constants"},
    "kernels/encode/octets.py": {"octet_assembly", "gather_assembly"},
    "kernels/encode/triton_encode.py": {"is_roomy", "_constants"},
    "quantization/budget.py": {"split_channels"},
    "quantization/codebook.py": {"codebook", "_shipped"},
    "quantization/levels.py": {"positive_levels"},
    "quantization/rotation.py": {"_exact_matrix"},
    "quantization/trellis/code.py": {"trellis", "_shipped"},
}


@pytest.mark.parametrize("folder", ["kernels", "codecs", "quantization", "cache"])
def test_only_these_are_in_a_cache_of_bounded_size(folder: str) -> None:
    """A captured graph may still read the table that such a cache drops."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            if "lru_cache" in " ".join(map(ast.unparse, node.decorator_list)):
                found.setdefault(str(path.relative_to(ROOT)), set()).add(node.name)
    assert found == {path: names for path, names in LET_GO.items() if path.startswith(f"{folder}/")}
