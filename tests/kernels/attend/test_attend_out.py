"""Attention that writes where it is told: the same numbers there, and nothing else is taken."""

import pytest
import torch

from quantpress.codecs.raw import RawPages
from quantpress.errors import InvalidInputError
from quantpress.kernels.attend import DenseSegment, PackedSegment, PackedSide, Segment, Visibility, attend
from quantpress.quantization.transform import ChannelTransform
from tests.kernels.attend.test_attend import BATCH, GROUP, KV_HEADS, PAGES, dense, packed

HEADS = KV_HEADS * GROUP
TOKENS = PAGES * 128 + 37


def call(queries: int = 1) -> tuple[torch.Tensor, list[Segment], Visibility]:
    segments: list[Segment] = [packed(64, 64, 3), dense(37, 64, 64)]
    return torch.randn(BATCH, HEADS, queries, 64), segments, Visibility(queries, TOKENS)


def inside_a_larger(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[1 + rows + 1, ...]: `out` is all but the first and the last row, which are to stay NaN."""
    return torch.full((shape[0] + 2, *shape[1:]), float("nan"), device=device, dtype=dtype)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("dense_only", [False, True])
def test_the_output_is_written(queries: int, dense_only: bool) -> None:
    query, segments, seen = call(queries)
    if dense_only:
        segments, seen = segments[1:], Visibility(queries, 37)
    around = inside_a_larger(*query.shape)
    found = attend(query, segments, seen, scaling=0.1, out=around[1:-1])
    assert found.data_ptr() == around[1].data_ptr()
    assert torch.equal(around[1:-1], attend(query, segments, seen, scaling=0.1))
    assert around[[0, -1]].isnan().all()


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(BATCH, HEADS, 2, 64),
        torch.empty(BATCH, HEADS, 1, 80),
        torch.empty(BATCH, HEADS, 1, 64, dtype=torch.bfloat16),
        torch.empty(HEADS, BATCH, 1, 64).transpose(0, 1),
    ],
    ids=["queries", "value_dim", "dtype", "strides"],
)
def test_another_shape_dtype_or_order_is_refused(out: torch.Tensor) -> None:
    query, segments, seen = call()
    expected = rf"out is {out.dtype} .*; give contiguous torch.float32 \[{BATCH}, {HEADS}, 1, 64\]"
    with pytest.raises(InvalidInputError, match=expected):
        attend(query, segments, seen, scaling=0.1, out=out)


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 4, 140])
def test_the_output_is_written_on_a_gpu(queries: int) -> None:
    """In a graph, too; by the packed kernels, by the dense one, and by the reference."""
    from tests.kernels.attend.test_triton_attend import on_device

    pages = on_device(2, 2, PAGES * 128, 64, (4, 3))
    recent = torch.randn(2, 2, 150, 64, device="cuda", dtype=torch.bfloat16)
    tail = DenseSegment(recent, recent)
    query = torch.randn(2, 8, queries, 64, device="cuda", dtype=torch.bfloat16)
    for segments in ([pages, tail], [tail], [packed_raw()]):
        seen = Visibility(queries, sum(segment.tokens for segment in segments))
        around = inside_a_larger(*query.shape, device="cuda", dtype=torch.bfloat16)
        expected = attend(query, segments, seen, scaling=0.1)
        attend(query, segments, seen, scaling=0.1, out=around[1:-1])
        assert torch.equal(around[1:-1], expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            attend(query, segments, seen, scaling=0.1, out=around[1:-1])
        around.fill_(torch.nan)
        graph.replay()
        assert torch.equal(around[1:-1], expected) and around[[0, -1]].isnan().all()


def packed_raw() -> PackedSegment:
    """Pages that no kernel reads."""
    states = torch.randn(2, 2, PAGES * 128, 64, device="cuda", dtype=torch.bfloat16)
    side = PackedSide(RawPages(64), RawPages(64).encode(states, ChannelTransform()), ChannelTransform())
    return PackedSegment(side, side)
