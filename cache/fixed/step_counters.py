"""What a captured step reads and counts on the device: where tokens go, and how many are in use."""

import torch

ENDLESS = 1 << 62


class StepCounters:
    """Where each layer's next token goes, and how many are in use, on the device.

    Args:
        layers: how many.
        shape: (B, Hkv) of each, the most that there are.
        device: where.

    Attributes:
        place: [layers, 1] int64, index of the newest token in the memory that steps write to.
        packed, recent: [layers, B, Hkv] int32, tokens in use in pages, and in that memory.
    """

    def __init__(self, layers: int, shape: tuple[int, int], device: torch.device) -> None:
        self.place = torch.zeros(layers, 1, dtype=torch.int64, device=device)
        self.packed = torch.zeros(layers, *shape, dtype=torch.int32, device=device)
        self.recent = torch.zeros(layers, *shape, dtype=torch.int32, device=device)
        self._starts = torch.zeros_like(self.recent)
        self._places = torch.full_like(self.place, ENDLESS)
        self._most = torch.full_like(self.recent, torch.iinfo(torch.int32).max)
        self._rings = self._windows = False

    def bound(
        self, layer: int, heads: int, window: int | None = None, ring: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The counters of a layer of `heads` KV heads.

        Args:
            layer: its number.
            heads: how many.
            window: most tokens in use, the newest; None: no bound.
            ring: the place after `window` is the first one.

        Returns:
            place [1]; tokens in use [B, heads]; the first of them [B, heads], or None where it is place 0.
        """
        self._places[layer] = window if ring and window is not None else ENDLESS
        if window is not None:
            self._most[layer] = window
        slides = window is not None and not ring
        self._rings, self._windows = self._rings or ring, self._windows or slides
        starts = self._starts[layer, :, :heads] if slides else None
        return self.place[layer], self.recent[layer, :, :heads], starts

    def advance(self) -> None:
        """One more token in every layer; the layers then write it. Belongs to the captured step."""
        self.place += 1
        self.recent += 1
        if self._rings:
            self.place.remainder_(self._places)
        if self._rings or self._windows:
            torch.minimum(self.recent, self._most, out=self.recent)
        if self._windows:
            self._starts.copy_(self.place.unsqueeze(-1) + 1 - self.recent)
