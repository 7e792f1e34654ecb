"""PageStore: views never change, whatever is appended or cropped afterwards."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpress.cache.tokens.pages import PageStore


def planes(pages: int, start: int) -> dict[str, torch.Tensor]:
    numbers = torch.arange(start, start + pages).view(1, 1, pages, 1).expand(2, 3, pages, 4)
    return {"codes": numbers.to(torch.uint8), "scale": numbers.half()}


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["append", "crop", "share", "map"]), st.integers(0, 9)), max_size=25)
)
def test_against_a_list(steps: list[tuple[str, int]]) -> None:
    store, numbers, held = PageStore(planes(1, 0)), [0], []
    for action, size in steps:
        if action == "append" and size:
            store.append(planes(size, len(numbers)))
            numbers = numbers + list(range(len(numbers), len(numbers) + size))
        elif action == "crop":
            keep = min(size, len(numbers))
            store.crop(keep)
            numbers = numbers[:keep]
        elif action == "share":
            held.append((store.share(), list(numbers)))
            held.append((store.planes, list(numbers)))
        elif action == "map":
            store = store.map(lambda plane: plane.index_select(0, torch.tensor([1, 0])))
        held.append((store.planes, list(numbers)))
    for item, expected in held:
        found = item.planes if isinstance(item, PageStore) else item
        if expected:
            assert found["codes"][1, 2, :, 3].tolist() == found["scale"][0, 0, :, 0].tolist() == expected


def test_growth_is_bounded() -> None:
    store = PageStore(planes(100, 0))
    assert sum(tensor.numel() for tensor in store.tensors) == 2 * 100 * 24
    store.append(planes(1, 100))
    assert store.tensors[0].shape[2] <= 108
