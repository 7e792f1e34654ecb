"""Layers of every head_dim that the kernels read: where planes lie, and attention over what was packed."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from quantpress.cache.engine_memory import HEAD_DIMS, engine_page_bytes, engine_widths, why_not_head_dim
from quantpress.engines.vllm.attention import Scores
from quantpress.engines.vllm.block_state import BlockState, Capacity
from quantpress.engines.vllm.dtypes import codecs_of
from quantpress.engines.vllm.layer_store import LayerStore, StoreSettings
from quantpress.engines.vllm.page_layout import BlockPages, PageLayout, row_steps
from quantpress.engines.vllm.prompts import run_step
from quantpress.engines.vllm.step_plan import DecodePlan, StepBatch, StepPlanner
from quantpress.kernels import available
from quantpress.kernels.blocks import BlockSide, decode_blocks
from quantpress.quantization.query_moments import QueryMoments
from quantpress.quantization.transform import ChannelTransform

HEADS, GROUP, BLOCKS, SINKS = 2, 4, 8, 4
LENGTHS = (3 * 128 + 40, 2 * 128 - 1)  # the next token fills a block of the second request
TABLE = [[1, 2, 3, 4], [7, 5, 0, 0]]
CASES = [
    (64, "quantpress_4bit"),
    (80, "quantpress_4bit"),
    (80, "quantpress_2bit"),
    (96, "quantpress_3bit"),
    (112, "quantpress_k4v2"),
    (192, "quantpress_4bit"),
    (240, "quantpress_3bit"),
]


def test_which_head_dims_there_are() -> None:
    assert tuple(range(48, 257, 16)) == HEAD_DIMS
    assert not any(why_not_head_dim(dim) for dim in HEAD_DIMS)
    assert why_not_head_dim(72) == why_not_head_dim(272) == "the kernels have multiples of 16 from 48 to 256"


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("name", ["quantpress_4bit", "quantpress_3bit", "quantpress_k2v3"])
def test_planes_lie_where_kernels_load_16_bytes(name: str, compact: bool) -> None:
    """In whichever block and head; what the kernels do not read is as large as it is said to be."""
    for dim in (20, 48, 72, 80, 96, 112, 192, 256):
        layout = PageLayout(codecs_of(name, dim, dim, torch.bfloat16), torch.bfloat16)
        width = layout.token_bytes
        assert 128 * width == engine_page_bytes(dim, dim, *engine_widths(name))
        cache = torch.empty(BLOCKS, HEADS, 128, width, dtype=torch.uint8)
        pages = BlockPages(layout, cache if compact else cache.view(HEADS, BLOCKS, 128, -1).transpose(0, 1))
        assert pages.steps == row_steps(compact, BLOCKS, HEADS)
        used = torch.zeros(128 * width, dtype=torch.int32)
        for plane in (plane for planes in pages.pool() for plane in planes.values()):
            size = plane.dtype.itemsize
            assert plane.shape[0] == BLOCKS * HEADS and plane.stride(0) * size == 128 * width
            assert plane.storage_offset() * size % 16 == 0
            assert plane.stride(0) % 16 == 0, "Triton asks for it before it loads 16 bytes at a time"
            used[plane.storage_offset() * size :][: plane[0].numel() * size] += 1
        assert int(used.max()) == 1 and int((used == 0).sum()) < 128


def states(tokens: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and keys of uneven channels around a mean, and values, [tokens, heads, dim]."""
    keys = torch.randn(tokens, HEADS, dim) * (torch.rand(dim) * 2 + 0.3) + torch.randn(HEADS, dim)
    return torch.randn(tokens, GROUP * HEADS, dim), keys, torch.randn(tokens, HEADS, dim)


def batch_of(lengths: tuple[int, ...], counts: tuple[int, ...], decodes: int, device: str) -> StepBatch:
    """The last `counts` tokens of each request are new."""
    ends = torch.tensor((0, *counts), dtype=torch.int32).cumsum(0).to(torch.int32)
    there = torch.tensor(lengths, dtype=torch.int32)
    table = torch.tensor(TABLE, dtype=torch.int32)
    tensors = [one.to(device) for one in (ends, there, table, torch.arange(len(counts)))]
    return StepBatch(*tensors, decodes, 1, ends.tolist(), list(lengths), uniform=True)


def decoded(store: LayerStore, blocks: list[int]) -> list[Tensor]:
    """Keys and values of blocks by plain PyTorch on a CPU, [tokens, HEADS, dim] float32."""
    sides = []
    for side in store.blocks:
        transform = side.transform.map(lambda part: part.cpu())
        planes = {name: plane.cpu() for name, plane in side.planes.items()}
        sides.append(BlockSide(side.codec, transform, planes))
    numbers = torch.tensor(blocks, dtype=torch.int32)
    return [decode_blocks(side, numbers, torch.float32) for side in sides]


def expected(store: LayerStore, plan: DecodePlan, row: int, made: tuple[Tensor, ...]) -> Tensor:
    """[Hq, dim], attention of the last token of a request over all, in float64."""
    query, keys, values = (one.double() for one in made)
    begin, count = (int(x[row, 0]) for x in (plan.packed_starts, plan.packed_lengths))
    assert begin == SINKS and count > 0
    blocks = [block for block in TABLE[row] if block]
    for exact, packed in zip((keys, values), decoded(store, blocks), strict=True):
        exact[begin : begin + count] = packed[begin : begin + count].double()
    q = query[-1].unflatten(0, (HEADS, GROUP))
    scores = torch.einsum("hgd,thd->hgt", q, keys) * query.shape[-1] ** -0.5
    return torch.einsum("hgt,thd->hgd", scores.softmax(-1), values).flatten(0, 1)


def check_layer(dim: int, name: str, device: str, dtype: torch.dtype, compact: bool) -> float:
    """Prompts of two requests, and a step of one token each: the largest relative error of attention."""
    settings = StoreSettings(
        codecs_of(name, dim, dim, dtype), HEADS, dtype, SINKS, Capacity(2, 4), GROUP, dim**-0.5
    )
    store = LayerStore(settings, torch.device(device))
    shape = (BLOCKS, HEADS, 128, settings.layout.token_bytes)
    cache = torch.full(shape, 0xFF, dtype=torch.uint8, device=device)
    store.bind(cache if compact else cache.view(HEADS, BLOCKS, *shape[2:]).transpose(0, 1))
    lead = (1, HEADS, dim)
    moments = QueryMoments(*(torch.rand(2, HEADS, GROUP, dim) * 0.1).to(device))
    store.set_statistics(ChannelTransform(torch.randn(lead), torch.rand(lead) + 0.5), moments)
    state = BlockState(BLOCKS, Capacity(2, 4), SINKS, torch.device(device))
    planner = StepPlanner(state, HEADS, len(TABLE[0]), row_steps(compact, BLOCKS, HEADS))
    made = [tuple(one.to(dtype) for one in states(tokens + 1, dim)) for tokens in LENGTHS]
    prompts = [torch.cat([one[part][:-1] for one in made]).to(device) for part in (1, 2)]
    prefills = planner.plan(batch_of(LENGTHS, LENGTHS, 0, device)).prefills
    assert prefills is not None
    store.write_prefills(*prompts, prefills)
    longer = tuple(tokens + 1 for tokens in LENGTHS)
    plan = planner.plan(batch_of(longer, (1, 1), 2, device))
    query, keys, values = (torch.stack([one[part][-1] for one in made]).to(device) for part in range(3))
    output = torch.full_like(query, torch.nan)
    run_step(store, plan, (query, keys, values), Scores(dim**-0.5, None), output, 2)
    assert plan.decodes is not None
    error = 0.0
    for row, one in enumerate(made):
        wanted = expected(store, plan.decodes, row, one)
        error = max(error, float((output[row].cpu().double() - wanted).norm() / wanted.norm()))
    if "4bit" in name:
        keys = made[1][1].float()
        packed = decoded(store, TABLE[1][:2])[0]
        assert float((packed - keys).norm() / keys.norm()) < 0.15, "the second block was filled by a decode"
    return error


@pytest.mark.parametrize(("dim", "name"), CASES)
def test_a_step_of_a_layer(dim: int, name: str) -> None:
    assert check_layer(dim, name, "cpu", torch.float32, compact="3" in name) < 1e-4


@contextmanager
def only_kernels() -> Iterator[None]:
    """Plain PyTorch is not to run in the place of a kernel."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("not by a kernel")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("put_tokens_reference", "pack_blocks_reference"):
            patch.setattr(f"quantpress.kernels.blocks.{name}", refuse)
        patch.setattr("quantpress.kernels.attend.attend_reference", refuse)
        yield


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("dim", "name"), CASES)
def test_a_step_of_a_layer_on_a_gpu(dim: int, name: str, dtype: torch.dtype) -> None:
    """By the kernels alone."""
    assert available.runs_triton(torch.device("cuda", 0))
    with only_kernels():
        assert check_layer(dim, name, "cuda", dtype, compact="3" in name) < 4e-3
