"""Paged attention for tests: small pools, and expected results computed with torch alone."""

import math
from typing import Any

import torch

from quantpress.cache import PagedAttention
from quantpress.codecs.raw import RawPages

QUERY_HEADS, KV_HEADS = 4, 2


def lossless(head_dim: int = 8, value_dim: int = 4, **options: Any) -> PagedAttention:
    """A pool whose pages store every value unchanged."""
    return small(head_dim, value_dim, codecs=(RawPages(head_dim, 32), RawPages(value_dim, 32)), **options)


def small(head_dim: int = 32, value_dim: int | None = None, **options: Any) -> PagedAttention:
    """Capacity for 40 blocks and 6 sequences, float32."""
    options = {"query_heads": QUERY_HEADS, "kv_heads": KV_HEADS, "dtype": torch.float32, **options}
    blocks, sequences = options.pop("num_blocks", 40), options.pop("max_sequences", 6)
    return PagedAttention(blocks, sequences, head_dim=head_dim, value_dim=value_dim, **options)


def random_states(paged: PagedAttention, *lead: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [*lead, Hkv, tokens, D] with uneven channels, on the pool's device."""
    states = []
    for side in (paged.pool.keys, paged.pool.values):
        dim = side.codec.head_dim
        x = torch.randn(*lead, paged.pool.size.kv_heads, tokens, dim) * torch.rand(dim).mul(2).exp()
        states.append((x + torch.randn(dim)).to(paged.device, paged.pool.dtype))
    return states[0], states[1]


def dense(paged: PagedAttention, sequence: int, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [Hkv, T, D] float64 of a sequence: what the tables on the device say, decoded."""
    pool, sinks = paged.pool, paged.pool.settings.sink_tokens
    length, pages = int(paged.context_lens[sequence]), int(paged.page_counts[sequence])
    blocks = paged.block_tables[sequence, :pages].tolist()
    front = sinks if pages else 0
    both = []
    for side in (pool.keys, pool.values):
        heads = []
        for head in range(pool.size.kv_heads):
            parts = [side.sinks[layer, sequence, head, :front].double()]
            at = [head * pool.size.blocks + block for block in blocks]
            if blocks:
                planes = {name: plane[layer, at][None, None] for name, plane in side.planes.items()}
                transform = side.transform(layer, None).map(
                    lambda part: part[sequence : sequence + 1, head : head + 1]  # noqa: B023
                )
                parts.append(side.codec.decode(planes, transform, torch.float64)[0, 0])
            end = length - front - 128 * pages
            heads.append(torch.cat([*parts, side.window[layer, sequence, head, :end].double()]))
        both.append(torch.stack(heads))
    return both[0], both[1]


def exact(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """float64 attention of [Hq, Tq, D] over [Hkv, T, D], causal at the bottom right."""
    group, queries, tokens = query.shape[0] // keys.shape[0], query.shape[1], keys.shape[1]
    seen = torch.ones(queries, tokens, dtype=torch.bool, device=query.device).tril(tokens - queries)
    keys, values = (states.double().repeat_interleave(group, 0) for states in (keys, values))
    scaling = keys.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is None and sinks is None:
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(query.double(), keys, values, attn_mask=seen, scale=scaling)
    scores = query.double() @ keys.mT * scaling
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, queries, 1)], -1)
    return scores.softmax(-1)[..., :tokens] @ values


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())
