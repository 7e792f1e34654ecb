"""What attention reads: segments of tokens, and what limits who sees whom.

Shapes: B batch, Hq query heads, Hkv KV heads, Tq query tokens, T key tokens, D head_dim of keys, Dv of
values.
"""

from dataclasses import dataclass

import torch

from quantpress.codecs.transform import ChannelTransform
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.kernels.page_codec import PageCodec, Planes


@dataclass(frozen=True)
class DenseSegment:
    """Tokens kept as they are.

    Args:
        keys: [B, Hkv, T, D] any float dtype.
        values: [B, Hkv, T, Dv] any float dtype.
        lengths: [B, Hkv] int32 on the same device, tokens in use of each KV head, the first of T; None: all.
            What lies behind them may hold anything and is never read as a number.
    """

    keys: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.keys.shape[2]

    @property
    def used(self) -> torch.Tensor | int:
        """Tokens in use: [B, Hkv] or all of them."""
        return self.tokens if self.lengths is None else self.lengths

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def device(self) -> torch.device:
        return self.keys.device


@dataclass(frozen=True)
class PackedSide:
    """The keys, or the values, of packed pages.

    Args:
        codec: what packed them.
        planes: tensors [B, Hkv, P, ...] of the codec.
        transform: the channel transform of these planes, per [B, Hkv].
    """

    codec: PageCodec
    planes: Planes
    transform: ChannelTransform

    @property
    def pages(self) -> int:
        return next(iter(self.planes.values())).shape[2]

    def narrow(self, start: int, stop: int) -> Planes:
        """The planes of pages `start` to `stop`, as views."""
        return {name: plane[:, :, start:stop] for name, plane in self.planes.items()}


@dataclass(frozen=True)
class PackedSegment:
    """Tokens in packed pages, `PAGE_TOKENS` to a page.

    Args:
        keys: the key side, P pages.
        values: the value side, P pages.
        lengths: [B, Hkv] int32 on the same device, tokens in use of each KV head, the first of P * 128, any
            number from 0 on; None: all. What lies behind them may hold anything.
    """

    keys: PackedSide
    values: PackedSide
    lengths: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.keys.pages * PAGE_TOKENS

    @property
    def used(self) -> torch.Tensor | int:
        """Tokens in use: [B, Hkv] or all of them."""
        return self.tokens if self.lengths is None else self.lengths

    @property
    def kv_heads(self) -> int:
        return next(iter(self.keys.planes.values())).shape[1]

    @property
    def device(self) -> torch.device:
        return next(iter(self.keys.planes.values())).device


Segment = DenseSegment | PackedSegment


@dataclass(frozen=True)
class Visibility:
    """Which key tokens each query token sees.

    Args:
        queries: Tq.
        tokens: T over all segments, in use or not.
        causal: query i of Tq sees tokens up to T - Tq + i (aligned at the bottom right). Where segments have
            `lengths`, their end is the end of those: the last Tq - 1 - i tokens in use stay hidden.
        mask: [B or 1, 1 or Hq, Tq or 1, >= T] bool (True: seen) or float (added to scores), or None.
        dropped: [B, Hkv, T] bool, True where a KV head must not see a token, or None.
    """

    queries: int
    tokens: int
    causal: bool = True
    mask: torch.Tensor | None = None
    dropped: torch.Tensor | None = None

    def bias(
        self, start: int, stop: int, shape: tuple[int, int, int, int], device: torch.device
    ) -> torch.Tensor | None:
        """What mask and dropped entries add to the scores of tokens `start` to `stop`.

        Args:
            start: first token.
            stop: one past the last token.
            shape: (B, Hkv, G, Tq) of the scores' leading dimensions.
            device: where.

        Returns:
            float32 broadcastable to [B, Hkv, G, Tq, stop - start], or None when everything is seen.
        """
        heads, group = shape[1], shape[2]
        total: torch.Tensor | None = None
        if self.mask is not None:
            part = self.mask[..., start:stop].to(device)
            part = additive(part) if part.dtype == torch.bool else part.float()
            if part.shape[1] == 1:
                total = part.unsqueeze(1)  # [B or 1, 1, 1, Tq or 1, n]
            else:
                total = part.reshape(part.shape[0], heads, group, part.shape[2], part.shape[3])
        if self.dropped is not None:
            part = additive(~self.dropped[:, :, start:stop].to(device))[:, :, None, None]
            total = part if total is None else total + part
        return total

    def unseen(
        self, segment: Segment, low: int, high: int, behind: torch.Tensor | int
    ) -> torch.Tensor | None:
        """Where tokens `low` to `high` of a segment are not in use, or hidden by the causal rule.

        Args:
            segment: the tokens.
            low: first token, counted in the segment.
            high: one past the last.
            behind: tokens in use in later segments, [B, Hkv] where they have lengths.

        Returns:
            bool broadcastable to [B, Hkv, G, Tq, high - low], or None where all of them are seen.
        """
        causal = self.causal and self.mask is None and self.queries > 1
        if segment.lengths is None and isinstance(behind, int):
            causal = causal and behind + segment.tokens - high < self.queries - 1
        if segment.lengths is None and not causal:
            return None
        token = torch.arange(low, high, device=segment.device)
        used = segment.used
        used = used if isinstance(used, int) else used.unsqueeze(-1)
        behind = behind if isinstance(behind, int) else behind.unsqueeze(-1)
        unused = token >= used  # [n] or [B, Hkv, n]
        unused = unused if unused.dim() == 1 else unused[:, :, None, None]
        if not causal:
            return unused
        newer = behind + used - token  # tokens in use from this one on
        waiting = torch.arange(
            self.queries - 1, -1, -1, device=token.device
        )  # newest that query i must not see
        hidden = newer.unsqueeze(-2) <= waiting.unsqueeze(-1)
        return unused | (hidden if hidden.dim() == 2 else hidden.unsqueeze(2))


def additive(seen: torch.Tensor) -> torch.Tensor:
    """0 where `seen` is True and minus infinity elsewhere, float32."""
    return torch.zeros(seen.shape, dtype=torch.float32, device=seen.device).masked_fill_(~seen, float("-inf"))
