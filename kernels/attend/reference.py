"""Attention over dense and packed segments in plain PyTorch: the truth that the kernels are held to.

Online softmax (Milakov and Gimelshein 2018) over chunks of tokens, in float32. Packed chunks are decoded into
code space, a bounded number of values at a time, so the whole cache is never decoded at once:

    score = scaling * (to_code_space(query(q)) . codes + bias(q)),    out = from_code_space(sum p * codes_v)
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from quantpress.kernels.attend.operands import DenseSegment, PackedSegment, Segment, Visibility
from quantpress.kernels.layout import PAGE_TOKENS

WORKSPACE_VALUES = 4 * 1024 * 1024  # decoded coordinates, or scores, of one chunk


class OnlineSoftmax:
    """Running softmax-weighted sum over chunks of tokens.

    Args:
        like: [B, Hkv, G, Tq, D] float32, the queries: their leading shape and device are the sum's.
        value_dim: Dv.
    """

    def __init__(self, like: torch.Tensor, value_dim: int) -> None:
        self.maximum = like.new_full(like.shape[:-1], float("-inf"))
        self.total = like.new_zeros(like.shape[:-1])
        self.sum = like.new_zeros((*like.shape[:-1], value_dim))

    def add(self, scores: torch.Tensor, values: torch.Tensor) -> None:
        """Add tokens with scores [B, Hkv, G, Tq, n] and values [B, Hkv, n, Dv], both float32."""
        maximum = torch.maximum(self.maximum, scores.amax(-1))
        safe = maximum.masked_fill(maximum == float("-inf"), 0.0)  # rows that have seen nothing yet
        weights = scores.sub_(safe.unsqueeze(-1)).exp_()
        decay = torch.exp(self.maximum - safe)
        self.total = self.total * decay + weights.sum(-1)
        weighted = torch.matmul(weights.flatten(2, 3), values)  # heads of a group share one pass
        self.sum = self.sum * decay.unsqueeze(-1) + weighted.view_as(self.sum)
        self.maximum = maximum


def merge(
    parts: Sequence[OnlineSoftmax], sums: Sequence[torch.Tensor], sinks: torch.Tensor | None
) -> torch.Tensor:
    """Join running softmaxes exactly.

    Args:
        parts: running softmaxes over disjoint tokens, leading shape [B, Hkv, G, Tq].
        sums: the weighted sum of each part, [B, Hkv, G, Tq, Dv] float32, all out of code space.
        sinks: [Hkv, G] float32 learned attention-sink logits (gpt-oss), or None.

    Returns:
        [B, Hkv, G, Tq, Dv] float32; zero where a query sees nothing.
    """
    maximum = torch.stack([part.maximum for part in parts]).amax(0)
    if sinks is not None:
        maximum = torch.maximum(maximum, sinks[None, :, :, None].expand_as(maximum))
    safe = maximum.masked_fill(maximum == float("-inf"), 0.0)
    scales = [torch.exp(part.maximum - safe) for part in parts]
    total = sum(
        (part.total * scale for part, scale in zip(parts, scales, strict=True)), torch.zeros_like(safe)
    )
    if sinks is not None:
        total = total + torch.exp(sinks[None, :, :, None] - safe)
    out = sum(
        (s * scale.unsqueeze(-1) for s, scale in zip(sums, scales, strict=True)), torch.zeros_like(sums[0])
    )
    return out / total.masked_fill(total == 0, 1.0).unsqueeze(-1)


def attend_reference(
    query: torch.Tensor,
    segments: Sequence[Segment],
    visibility: Visibility,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scaling * q.k + mask) v; the arguments are those of `quantpress.kernels.attend.attend`."""
    batch, query_heads, queries, dim = query.shape
    kv_heads = segments[0].kv_heads
    group = query_heads // kv_heads
    grouped = query.float().reshape(batch, kv_heads, group, queries, dim)
    states: list[OnlineSoftmax] = []
    sums: list[torch.Tensor] = []

    def score(
        q: torch.Tensor,
        keys: torch.Tensor,
        start: int,
        unseen: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        scores = torch.matmul(q.flatten(2, 3), keys.transpose(-1, -2)).view(
            batch, kv_heads, group, queries, -1
        )
        if bias is not None:
            scores += bias.unsqueeze(-1)
        scores *= scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        limit = visibility.bias(start, start + keys.shape[2], (batch, kv_heads, group, queries), query.device)
        scores = scores if limit is None else scores + limit
        return scores if unseen is None else scores.masked_fill_(unseen, float("-inf"))

    start = 0
    for number, segment in enumerate(segments):
        behind = sum((later.used for later in segments[number + 1 :]), 0)
        step = chunk_tokens(segment, batch * kv_heads, group * queries)
        if isinstance(segment, DenseSegment):
            state = OnlineSoftmax(grouped, segment.values.shape[-1])
            for low in range(0, segment.tokens, step):
                keys, values = (
                    _in_use(segment, states.float(), low) for states in segment.states(low, low + step)
                )
                unseen = visibility.unseen(segment, low, low + keys.shape[2], behind)
                state.add(score(grouped, keys, start + low, unseen, None), values)
            sums.append(state.sum)
        else:
            state = _attend_pages(grouped, segment, step, start, visibility, behind, score)
            restored = segment.values.codec.from_code_space(state.sum)
            weight = state.total.unsqueeze(-1)  # sum of the weights, so that an affine inverse stays exact
            sums.append(_invert_values(segment, restored, weight))
        states.append(state)
        start += segment.tokens
    out = merge(states, sums, None if sinks is None else sinks.float().reshape(kv_heads, group))
    return out.reshape(batch, query_heads, queries, -1).to(query.dtype)


def _in_use(segment: Segment, states: torch.Tensor, low: int) -> torch.Tensor:
    """Keys or values [B, Hkv, n, D] from token `low` on, with zeros for tokens that are not in use."""
    if segment.lengths is None:
        return states
    token = torch.arange(low, low + states.shape[2], device=states.device)
    if segment.starts is not None:
        token = token - segment.starts.unsqueeze(-1)
    unused = (token < 0) | (token >= segment.lengths.unsqueeze(-1))
    return states.masked_fill(unused.unsqueeze(-1), 0.0)


Score = Callable[[torch.Tensor, torch.Tensor, int, torch.Tensor | None, torch.Tensor | None], torch.Tensor]


def _attend_pages(
    grouped: torch.Tensor,
    segment: PackedSegment,
    step: int,
    start: int,
    visibility: Visibility,
    behind: torch.Tensor | int,
    score: Score,
) -> OnlineSoftmax:
    keys, values = segment.keys, segment.values
    query = keys.codec.to_code_space(keys.transform.query(grouped))
    bias = keys.transform.bias(grouped)
    state = OnlineSoftmax(grouped, values.codec.head_dim)
    pages = max(1, step // PAGE_TOKENS)
    for page in range(0, segment.pages, pages):
        low = page * PAGE_TOKENS
        key_pages, value_pages = segment.narrow(page, page + pages)
        decoded = _in_use(segment, keys.codec.decode_code_space(key_pages.planes), low)
        unseen = visibility.unseen(segment, low, low + decoded.shape[2], behind)
        scores = score(query, decoded, start + low, unseen, bias)
        values_here = values.codec.decode_code_space(value_pages.planes)
        state.add(scores, _in_use(segment, values_here, low))
    return state


def _invert_values(segment: PackedSegment, restored: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Undo the value transform on a weighted sum; the mean counts once per unit of weight."""
    transform = segment.values.transform
    linear = replace(transform, mean=None).invert(restored)
    if transform.mean is None:
        return linear
    return linear + weight * transform.mean[:, :, None, None]


def chunk_tokens(segment: Segment, heads: int, rows: int) -> int:
    """How many tokens make a chunk whose decoded values and scores each stay within `WORKSPACE_VALUES`.

    Args:
        segment: the segment that is read.
        heads: B * Hkv.
        rows: queries that share a KV head, G * Tq.

    Returns:
        A multiple of `PAGE_TOKENS`.
    """
    dim = segment.keys.shape[-1] if isinstance(segment, DenseSegment) else segment.keys.codec.head_dim
    tokens = WORKSPACE_VALUES // (heads * max(dim, rows))
    return max(PAGE_TOKENS, tokens // PAGE_TOKENS * PAGE_TOKENS)
