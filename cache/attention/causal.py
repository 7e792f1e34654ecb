"""Causal masks, with or without padding on the left: what they look like, and how they are recognised.

Attention kernels know no masks. They know the causal rule, and where the tokens of each sequence begin.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from quantpress.kernels.attend import Segment

_FOUND = "_quantpress_padding"


def causal_mask(queries: int, tokens: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[Tq, T] bool: query i sees tokens up to T - Tq + i, the last `window` of them when it is given."""
    last = torch.arange(tokens - queries, tokens, device=device).unsqueeze(1)
    token = torch.arange(tokens, device=device).unsqueeze(0)
    seen = token <= last
    return seen if window is None else seen & (token > last - window)


@dataclass(frozen=True, eq=False)
class LeftPadding:
    """Padding in front of each sequence of a batch. It hides tokens beside those that the causal rule hides.

    Args:
        starts: [B or 1] int32, how many tokens it hides in each sequence.
        most: the largest of them.
    """

    starts: torch.Tensor
    most: int
    _spans: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def hide(self, segments: Sequence[Segment], batch: int) -> list[Segment]:
        """The segments of `batch` sequences, all of whose tokens are in use, without the padding.

        Lengths and starts are made once for segments alike: all layers are given the same mask.
        """
        hidden, low = list[Segment](), 0
        for segment in segments:
            if low < self.most and segment.tokens:
                lengths, starts = self._span(low, segment.tokens, (batch, segment.kv_heads))
                device = segment.device
                segment = replace(segment, lengths=lengths.to(device), starts=starts.to(device))
            hidden.append(segment)
            low += segment.tokens
        return hidden

    def _span(self, low: int, tokens: int, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Lengths and starts [B, Hkv] of a segment of `tokens` tokens, with `low` tokens before it."""
        key = low, tokens, *shape
        if key not in self._spans:
            starts = (self.starts - low).clamp(0, tokens).unsqueeze(1).expand(shape).contiguous()
            self._spans[key] = tokens - starts, starts
        return self._spans[key]


def left_padding(mask: torch.Tensor, queries: int, tokens: int) -> LeftPadding | None:
    """The padding of a batch, if padding on the left and the causal rule are all that a mask says.

    Waits for the device once for each mask.

    Args:
        mask: [B, >= T] bool or numbers, True or not 0 where a token is none of padding, for queries that see
            what the causal rule lets them see; or [B or 1, 1 or Hq, Tq, T], bool (True: seen) or float (added
            to scores).
        queries: Tq.
        tokens: T.

    Returns:
        The padding, with `most` 0 where there is none. None if the mask says something else, or hides
        everything from a query.
    """
    key = queries, tokens
    known: dict[tuple[int, int], LeftPadding | None] = getattr(mask, _FOUND, {})
    if key not in known:
        known[key] = _find(mask, queries, tokens)
        setattr(mask, _FOUND, known)  # a model gives all its layers the same one
    return known[key]


def _find(mask: torch.Tensor, queries: int, tokens: int) -> LeftPadding | None:
    known = mask.dim() == 2 or mask.dtype == torch.bool or mask.is_floating_point()
    if mask.shape[-1] < tokens or not known:
        return None
    fits = torch.ones((), dtype=torch.bool, device=mask.device)
    if mask.dim() == 2:
        seen = mask[:, None, None, -tokens:].bool()
        expected = torch.ones(1, tokens, dtype=torch.bool, device=mask.device)
    else:
        seen = mask if mask.dtype == torch.bool else mask == 0
        expected = causal_mask(queries, tokens, None, mask.device)
        if mask.dtype != torch.bool:  # what is not hidden must not be weighted either
            fits = (seen | (mask <= torch.finfo(mask.dtype).min)).all()
    starts = (~seen[:, 0, -1]).sum(-1, dtype=torch.int32)  # hidden from the last query, which sees the newest
    token = torch.arange(tokens, device=mask.device)
    expected = expected & (token >= starts[:, None, None])
    fits = fits & (seen == expected.unsqueeze(1)).all() & (starts <= tokens - queries).all()
    is_padding, most = torch.stack((fits.int(), starts.amax())).tolist()
    return LeftPadding(starts, most) if is_padding else None
