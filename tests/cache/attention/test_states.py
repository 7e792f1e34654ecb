"""PackedStates behaves as the tensor it stands for, whatever is done with it."""

from collections.abc import Callable

import pytest
import torch

from quantpress.cache.attention.states import PackedStates
from quantpress.cache.layer import PackedLayer
from tests.cache.caches import scalar


def packed_keys() -> tuple[PackedStates, torch.Tensor]:
    layer = PackedLayer.from_states(
        torch.randn(2, 2, 400, 32), torch.randn(2, 2, 400, 32), scalar(recent_tokens=16)
    )
    keys = layer.keys
    assert isinstance(keys, PackedStates)
    return keys, keys.dense()


STAYS_PACKED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "first_tokens": lambda t: t[:, :, :300],
    "all_but_the_last": lambda t: t[:, :, :-7],
    "into_the_sinks": lambda t: t[:, :, :2],
    "page_boundary": lambda t: t[:, :, :132],
    "everything": lambda t: t[:, :, :, :],
    "contiguous": lambda t: t.contiguous(),
    "detach": lambda t: t.detach(),
    "clone": lambda t: t.clone(),
    "same_dtype": lambda t: t.to(torch.float32),
    "select_batch": lambda t: t.index_select(0, torch.tensor([1, 0, 1])),
    "index_batch": lambda t: t[torch.tensor([1])],
    "twice": lambda t: t[:, :, :300][:, :, :200],
}
DECODES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "middle": lambda t: t[:, :, 5:300],
    "every_second": lambda t: t[:, :, ::2],
    "one_head": lambda t: t[:, 1:],
    "one_batch": lambda t: t[1],
    "transpose": lambda t: t.transpose(2, 3),
    "cast": lambda t: t.to(torch.float64),
    "matmul": lambda t: torch.ones(1, 32) @ t.transpose(2, 3),
    "cat": lambda t: torch.cat([t, t], dim=2),
    "repeat": lambda t: t[:, :, None].expand(2, 2, 3, 400, 32).reshape(2, 6, 400, 32),
    "norm": lambda t: t.norm(dim=-1),
    "gather": lambda t: t.gather(2, torch.zeros(2, 2, 5, 32, dtype=torch.long)),
}


@pytest.mark.parametrize("name", [*STAYS_PACKED, *DECODES])
def test_operations(name: str) -> None:
    keys, dense = packed_keys()
    operation = {**STAYS_PACKED, **DECODES}[name]
    got, expected = operation(keys), operation(dense)
    assert isinstance(got, PackedStates) == (name in STAYS_PACKED)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert torch.equal(got.dense() if isinstance(got, PackedStates) else got, expected)


def test_writes_in_place_stick() -> None:
    keys, dense = packed_keys()
    batch, head, token = torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([200, 3])
    for tensor in (keys, dense):
        tensor[batch, head, token] = 5.0
        tensor.mul_(2)
        tensor[:, :, 0] = 1.0
    assert keys.packed is None
    assert torch.equal(keys + 0, dense)


def test_stock_attention_reads_it() -> None:
    keys, dense = packed_keys()
    query = torch.randn(2, 2, 3, 32)
    got = torch.nn.functional.scaled_dot_product_attention(query, keys, keys)
    assert torch.equal(got, torch.nn.functional.scaled_dot_product_attention(query, dense, dense))


def test_description_decodes_nothing() -> None:
    keys, _ = packed_keys()
    assert repr(keys) == "PackedStates(keys, shape=(2, 2, 400, 32), dtype=torch.float32, device=cpu)"
    assert keys.packed is not None
