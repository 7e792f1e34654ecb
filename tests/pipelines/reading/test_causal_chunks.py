"""Attention of chunks of queries is compared with a softmax in float64 over all keys."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantpress.pipelines.reading import causal_chunks
from quantpress.pipelines.reading.causal_chunks import CausalChunks, Kernel, NotInChunksError, earlier_keys
from tests.grids import covering

HEADS = 4


def states(
    tokens: int, dtype: torch.dtype, kv_heads: int, dim: int = 32, value_dim: int = 32
) -> list[torch.Tensor]:
    shapes = [(HEADS, dim), (kv_heads, dim), (kv_heads, value_dim)]
    return [torch.randn(2, heads, tokens, width).to(dtype) for heads, width in shapes]


def expected(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
) -> torch.Tensor:
    q, k, v = (part.double() for part in (query, key, value))
    k, v = (part.repeat_interleave(HEADS // part.shape[1], 1) for part in (k, v))
    scores = q @ k.mT * (scale or q.shape[-1] ** -0.5)
    behind = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(behind, -torch.inf).softmax(-1) @ v


def in_chunks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, chunk: int, scale: float | None = None
) -> torch.Tensor:
    mode, parts = CausalChunks(), []
    for start in range(0, query.shape[2], chunk):
        part = query[:, :, start : start + chunk]
        end = start + part.shape[2]
        with mode:
            parts.append(
                F.scaled_dot_product_attention(
                    part,
                    key[:, :, :end],
                    value[:, :, :end],
                    is_causal=part.shape[2] > 1,
                    scale=scale,
                    enable_gqa=True,
                )
            )
    return torch.cat(parts, dim=2)


@pytest.mark.parametrize(
    ("lengths", "dtype", "kv_heads", "scale"),
    covering(
        [(257, 64), (257, 256), (63, 1), (63, 100)],
        [torch.float32, torch.bfloat16],
        [1, 2, 4],
        [None, 0.4],
    ),
    ids=str,
)
def test_chunks_are_right_to_twice_the_error_of_the_whole(
    lengths: tuple[int, int], dtype: torch.dtype, kv_heads: int, scale: float | None
) -> None:
    tokens, chunk = lengths
    query, key, value = states(tokens, dtype, kv_heads)
    exact = expected(query, key, value, scale)
    whole = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    found = in_chunks(query, key, value, chunk, scale)
    assert found.dtype == dtype
    assert (found - exact).norm() <= 2 * (whole - exact).norm() + 1e-6
    largest = value.abs().max() * torch.finfo(dtype).eps  # both parts and their sum are rounded
    assert (found - exact).abs().max() <= 4 * largest + (whole - exact).abs().max()


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [15 * 32, 15 * 32 + 7])
def test_keys_in_blocks_of_few_lengths(
    tokens: int, dtype: torch.dtype, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a kernel that needs a preparation for each number of keys."""
    lengths = set()

    def attend(query: torch.Tensor, key: torch.Tensor, *rest: object) -> object:
        if query.shape[2] == 32:
            lengths.add(key.shape[2])
        return causal_chunks._flash_cpu(query, key, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(causal_chunks, "kernel_of", lambda *_: Kernel(attend, prepares=True))  # type: ignore[arg-type]
    test_chunks_are_right_to_twice_the_error_of_the_whole((tokens, 32), dtype, kv_heads, None)
    assert lengths == {32, 64, 128, 256}


def test_blocks_cover_the_keys_once() -> None:
    for chunks in range(40):
        blocks = list(earlier_keys(chunks * 8, 8))
        assert [key for first, last in reversed(blocks) for key in range(first, last)] == list(
            range(chunks * 8)
        )
        lengths = [last - first for first, last in blocks]
        assert lengths == sorted(set(lengths))
        assert all((length // 8).bit_count() == 1 for length in lengths)


def test_a_call_with_a_mask_is_left_as_it_is() -> None:
    query, key, value = states(40, torch.float32, 2)
    mask = torch.rand(40, 40) < 0.5
    mask[:, 0] = True
    with CausalChunks() as mode:
        found = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    assert mode.seen
    assert torch.equal(found, F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True))


def test_what_no_kernel_gives_sums_for_is_refused() -> None:
    """Values of another width than keys: torch computes these in separate operations."""
    query, key, value = states(40, torch.float32, 2, value_dim=16)
    with pytest.raises(NotInChunksError):
        in_chunks(query, key, value, 20)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_the_kernels_of_a_gpu(backend: SDPBackend, kv_heads: int) -> None:
    query, key, value = (part.cuda() for part in states(700, torch.bfloat16, kv_heads, 128, 128))
    exact = expected(query.cpu(), key.cpu(), value.cpu(), None).cuda()
    with sdpa_kernel(backend):
        whole = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        found = in_chunks(query, key, value, 256)
    assert (found - exact).abs().max() <= 2 * (whole - exact).abs().max() + 1e-6
