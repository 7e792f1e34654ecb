"""`TextCache`: a cache whose length is that of the text, however many of its tokens are kept."""

from typing import Any

import torch
from transformers.cache_utils import DynamicCache


class TextCache(DynamicCache):
    """A `DynamicCache` that counts the tokens it has read, not those it still keeps.

    transformers takes a cache's length for three things: the position of the next token, how many of the
    given ids are new, and where to crop after a rejected guess. After an eviction all three are wrong. This
    cache answers with the length of the text, and tells the mask how far its slots are shifted. Layers,
    their storage and everything else are those of `DynamicCache`.

    Attributes:
        evicted: tokens of the text that a layer no longer keeps, by layer index.
        position_shift: how far the position of the next token lies before its place in the text, for presses
            that number the kept tokens anew.
        masked: kvpress's `masked_key_indices` of layers that still hold what single heads have evicted, by
            layer index: (batch, head, slot) entries that attention must not see.

    Example:
        >>> cache = TextCache()
        >>> for _ in range(2):  # two layers
        ...     _ = cache.update(torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 5, 4), len(cache.layers))
        >>> for layer in cache.layers:  # a press keeps two of five tokens
        ...     layer.keys, layer.values = layer.keys[:, :, 3:], layer.values[:, :, 3:]
        >>> cache.has_read(5)
        >>> cache.get_seq_length(), cache.get_mask_sizes(torch.tensor([5]), 0)
        (5, (3, 3))
    """

    evicted: dict[int, int]
    position_shift: int
    masked: dict[int, Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._forget()

    @classmethod
    def of(cls, cache: DynamicCache) -> "TextCache":
        """A cache with the layers and settings of an empty `DynamicCache`, which is not used afterwards."""
        made = cls()
        vars(made).update(vars(cache))
        return made

    def _forget(self) -> None:
        self.evicted, self.masked, self.position_shift = {}, {}, 0

    def has_read(self, tokens: int) -> None:
        """Say how long the text is that the layers stem from, after a press has worked on them.

        Args:
            tokens: of the text, each of which every layer has seen; a layer that nothing was written to has
                seen none.
        """
        self.evicted = {
            index: tokens - layer.get_seq_length()
            for index, layer in enumerate(self.layers)
            if layer.is_initialized and tokens != layer.get_seq_length()
        }

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read."""
        length: int = super().get_seq_length(layer_idx)
        return length + self.evicted.get(layer_idx, 0)

    def get_mask_sizes(self, cache_position: torch.Tensor, layer_idx: int) -> tuple[int, int]:
        """(slots of the layer and tokens arriving, place of the first slot if slots were the newest)."""
        length, offset = super().get_mask_sizes(cache_position, layer_idx)
        return length, offset + self.evicted.get(layer_idx, 0)

    def crop(self, max_length: int) -> None:
        """Go back to the first `max_length` tokens of the text; a negative value drops that many.

        The newest tokens go, none of which may have been evicted.
        """
        length = self.get_seq_length()
        drop = -max_length if max_length < 0 else length - max_length
        if drop > 0:
            for layer in self.layers:
                layer.crop(-drop)  # type: ignore[attr-defined]

    def reset(self) -> None:
        """Forget every token."""
        super().reset()
        self._forget()
