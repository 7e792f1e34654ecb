"""Statistics of keys that are taken while the engine runs, and the options of the plugin."""

import pytest
import torch
from torch import Tensor

import quantpress.engines.vllm.layer_store as layer_store
from quantpress.engines.vllm.block_state import BlockState, Capacity
from quantpress.engines.vllm.dtypes import codecs_of
from quantpress.engines.vllm.layer_store import LayerStore, StoreSettings
from quantpress.engines.vllm.options import Options, options_of
from quantpress.engines.vllm.step_plan import PrefillPlan, StepBatch, StepPlanner
from quantpress.errors import InvalidInputError, NonFiniteError
from quantpress.kernels.blocks import decode_blocks
from quantpress.quantization.query_moments import QueryMoments
from quantpress.quantization.transform import ChannelTransform

DIM, HEADS, BLOCKS, TOKENS = 64, 2, 9, 4 * 128
CPU = torch.device("cpu")


def stored(
    name: str,
    keys: Tensor,
    values: Tensor,
    transform: ChannelTransform | None = None,
    moments: QueryMoments | None = None,
) -> LayerStore:
    """A store after a prompt of `TOKENS` tokens in blocks 1 to 4; in the others all floats are NaN."""
    settings = StoreSettings(
        codecs_of(name, DIM, DIM, torch.float32), HEADS, torch.float32, 4, Capacity(2, 4), 2, DIM**-0.5
    )
    store = LayerStore(settings, CPU)
    width = settings.layout.token_bytes
    cache = torch.full((HEADS, BLOCKS, 128, width), 0xFF, dtype=torch.uint8)
    store.bind(cache.transpose(0, 1))
    if transform is not None:
        store.set_statistics(transform, moments)
    store.write_prefills(keys, values, prefills_of())
    return store


def prefills_of() -> PrefillPlan:
    """The plan of a step that reads the prompt."""
    planner = StepPlanner(BlockState(BLOCKS, Capacity(2, 4), 4, CPU), HEADS, 5, (1, BLOCKS))
    starts, lengths = torch.tensor([0, TOKENS], dtype=torch.int32), torch.tensor([TOKENS], dtype=torch.int32)
    table = torch.tensor([[1, 2, 3, 4, 0]], dtype=torch.int32)
    batch = StepBatch(starts, lengths, table, torch.tensor([0]), 0, 1, [0, TOKENS], [TOKENS], uniform=True)
    prefills = planner.plan(batch).prefills
    assert prefills is not None
    return prefills


def decoded(store: LayerStore) -> Tensor:
    return decode_blocks(store.blocks[0], torch.tensor([1, 2, 3, 4], dtype=torch.int32), torch.float32)


def bits(store: LayerStore, side: int) -> list[Tensor]:
    return [plane.clone().view(torch.uint8) for plane in store.blocks[side].planes.values()]


def vectors() -> tuple[Tensor, Tensor, Tensor]:
    """Keys of uneven channels around a mean, values, and queries, [TOKENS, heads, DIM]."""
    spread, mean = torch.rand(DIM) * 2 + 0.3, torch.randn(HEADS, DIM)
    keys = torch.randn(TOKENS, HEADS, DIM) * spread + mean
    return keys, torch.randn_like(keys), torch.randn(TOKENS, 2 * HEADS, DIM) * torch.rand(DIM).exp()


def error(store: LayerStore, keys: Tensor) -> float:
    return float((decoded(store) - keys).norm() / keys.norm())


def test_blocks_are_packed_again_by_the_new_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_store, "REPACKED_VALUES", 4 * HEADS * 128 * DIM)  # blocks four at a time
    keys, values, queries = vectors()
    store = stored("quantpress_4bit", keys, values)
    without, held = error(store, keys), bits(store, 1)
    store.freeze(keys, queries, packed=True)
    transform = ChannelTransform(store.mean, store.weight)
    fresh = stored("quantpress_4bit", keys, values, transform, store.queries.scaled(DIM**0.5))
    assert store.ready and torch.allclose(store.mean[0], keys.mean(0), atol=1e-4)
    assert not torch.equal(store.weight, torch.ones_like(store.weight))
    assert error(fresh, keys) < without < 0.15
    assert error(store, keys) < 2 * error(fresh, keys)
    for plane, before in zip(bits(store, 1), held, strict=True):
        assert torch.equal(plane, before), "values have no statistics"


def test_blocks_keep_the_key_that_queries_look_for() -> None:
    """In 16 bits, wherever it is, and chosen without looking at any query of the request."""
    keys, values, queries = vectors()
    queries = queries + 4 * torch.randn(2 * HEADS, DIM)  # most of them alike
    places = [300, 450]  # of blocks 3 and 4
    for place in places:
        keys[place] += 6 * queries.mean(0).unflatten(0, (HEADS, 2)).mean(1) / DIM**0.5
    store = stored("quantpress_2bit", keys, values)
    store.freeze(keys, queries, packed=True)
    store.write_prefills(keys, values, prefills_of())
    off = (decoded(store) - keys).norm(dim=-1) / keys.norm(dim=-1)
    assert float(off[places].max()) < 1e-3 < 0.1 < float(off.mean())


def test_nothing_is_packed_again_where_nothing_was_packed() -> None:
    keys, values, queries = vectors()
    store = stored("quantpress_3bit", keys, values)
    held = bits(store, 0)
    store.freeze(keys, queries, packed=False)
    for plane, before in zip(bits(store, 0), held, strict=True):
        assert torch.equal(plane, before)
    assert store.blocks[0].transform.mean is store.mean, "the kernels read the same tensors"


def test_keys_that_are_not_finite_leave_the_statistics() -> None:
    keys, values, queries = vectors()
    store = stored("quantpress_4bit", keys, values)
    broken = keys.clone()
    broken[7, 0, 3] = torch.inf
    with pytest.raises(NonFiniteError):
        store.freeze(broken, queries, packed=True)
    assert not store.ready and not store.mean.any() and (store.weight == 1).all()


def test_keys_too_large_for_their_scale_are_packed_again() -> None:
    """They were packed with the largest scale; that may not end the engine later."""
    keys, values, queries = vectors()
    huge = keys.clone()
    huge[5, 0] = 1e6
    store = stored("quantpress_4bit", huge, values)
    store.freeze(keys, queries, packed=True)
    assert error(store, keys) < 1e4 and torch.isfinite(decoded(store)).all()


def test_the_plan_knows_of_blocks_that_graphs_have_packed() -> None:
    """Layers that a graph replays run no Python: only the plan of each step sees every step."""
    planner = StepPlanner(BlockState(BLOCKS, Capacity(2, 4), 4, CPU), HEADS, 5, (1, BLOCKS))
    table = torch.tensor([[1, 2, 0, 0, 0]], dtype=torch.int32)
    known = []
    for length, count in ((126, 126), (127, 1), (128, 1), (129, 1)):
        numbers = [torch.tensor(one, dtype=torch.int32) for one in ([0, count], [length])]
        slots, decodes = torch.tensor([0]), int(count == 1)
        batch = StepBatch(*numbers, table, slots, decodes, 1, [0, count], [length], uniform=True)
        known.append(planner.plan(batch).packed)
    assert known == [False, False, False, True]


def test_options() -> None:
    assert options_of(None, 4) == options_of({}, 4) == options_of({"other": 1}, 4) == Options()
    given = {"quantpress": {"profile": "a.safetensors", "sink_entries": 9}}
    assert options_of(given, 4) == Options("a.safetensors", 9)
    assert Options().entries(4) == 1024 and Options().entries(500) == 2000
    assert Options(sink_entries=9).entries(4) == 9


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"profil": "x"},
            r"is \{'profil': 'x'\}; give a dict with some of \['profile', 'sink_entries', 'plan'\]",
        ),
        ("profile", "is 'profile'; give a dict"),
        ({"profile": 5}, r"profile is 5; give the path of a file of `quantpress calibrate`"),
        ({"plan": 5}, "plan is 5; give the path of a file of `quantpress fit`"),
        ({"sink_entries": 4}, "sink_entries is 4; give a whole number above max_num_seqs, which is 4"),
        ({"sink_entries": "9"}, "sink_entries is '9'; give a whole number"),
        ({"sink_entries": True}, "sink_entries is True; give a whole number"),
        ({"sink_entries": 9.5}, "sink_entries is 9.5; give a whole number"),
    ],
    ids=str,
)
def test_options_that_are_refused(given: object, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        options_of({"quantpress": given}, 4)
