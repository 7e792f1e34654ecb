"""What a captured step reads and counts on the device: where tokens go, and how many are in use."""

import torch

from quantpress.cache.tokens.fixed_tokens import Shown

ENDLESS = 1 << 62


class StepCounters:
    """The index of each layer's newest token and the number of tokens in use, on the device.

    Args:
        layers: how many there are.
        shape: (B, Hkv), with Hkv of the layer that has the most heads.
        device: where they are.

    Attributes:
        newest: [layers, 1] int64, index of the newest token in the memory that steps write to.
        packed, recent: [layers, B, Hkv] int32, tokens in use in pages, and in that memory.
        padding: [B] int32, the tokens in front of each sequence that steps hide, if `padded`.
    """

    def __init__(self, layers: int, shape: tuple[int, int], device: torch.device) -> None:
        self.newest = torch.zeros(layers, 1, dtype=torch.int64, device=device)
        self.packed = torch.zeros(layers, *shape, dtype=torch.int32, device=device)
        self.recent = torch.zeros(layers, *shape, dtype=torch.int32, device=device)
        self._starts = torch.zeros_like(self.recent)
        self._slots = torch.full_like(self.newest, ENDLESS)
        self._most = torch.full_like(self.recent, torch.iinfo(torch.int32).max)
        self._rings = self._windows = False
        self.padded = False
        self.padding = torch.zeros(shape[0], dtype=torch.int32, device=device)
        self._sinks = torch.zeros_like(self.packed)
        self._shown = torch.zeros(2, 3, *self.packed.shape, dtype=torch.int32, device=device)

    def bound(
        self, layer: int, heads: int, window: int | None = None, ring: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Set the bounds of a layer of `heads` KV heads, and return its counters.

        Args:
            layer: its index.
            heads: how many it has.
            window: the most tokens in use, which are the newest; None: no bound.
            ring: the slot after the last of the window is the first one.

        Returns:
            Index of the newest token [1]; tokens in use [B, heads]; the first of them [B, heads], or None
            where it is always slot 0.
        """
        self._slots[layer] = window if ring and window is not None else ENDLESS
        if window is not None:
            self._most[layer] = window
        slides = window is not None and not ring
        self._rings, self._windows = self._rings or ring, self._windows or slides
        starts = self._starts[layer, :, :heads] if slides else None
        return self.newest[layer], self.recent[layer, :, :heads], starts

    def shown(self, layer: int, heads: int, sinks: int) -> Shown:
        """What steps write where `padded`: which tokens of a packed layer count."""
        self._sinks[layer] = sinks
        return Shown(*self._shown[:, :, layer, :, :heads])

    def advance(self) -> None:
        """Count one more token in every layer, which the layers then write. Part of the captured step."""
        self.newest += 1
        self.recent += 1
        if self._rings:
            self.newest.remainder_(self._slots)
        if self._rings or self._windows:
            torch.minimum(self.recent, self._most, out=self.recent)
        if self._windows:
            self._starts.copy_(self.newest.unsqueeze(-1) + 1 - self.recent)
        if self.padded:
            ahead = self.padding[:, None].expand_as(self.packed)  # [layers, B, Hkv]
            for part, tokens in enumerate((self._sinks, self.packed, self.recent)):
                starts = torch.minimum(ahead.clamp(min=0), tokens)
                self._shown[0, part].copy_(tokens - starts)
                self._shown[1, part].copy_(starts)
                ahead = ahead - tokens
