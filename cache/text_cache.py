"""`TextCache`: a cache whose length is the length of the text, however many of its tokens are kept."""

from typing import Any

from transformers.cache_utils import DynamicCache

from quantpress.cache import host


class TextCache(DynamicCache):
    """A `DynamicCache` that counts the tokens it has read, not those it still keeps.

    transformers uses a cache's length for three things: the position of the next token, how many of the given
    ids are new, and where to crop after a rejected guess. After an eviction all three are wrong. This cache
    returns the length of the text instead, and tells the mask how far its slots are shifted. Layers, their
    storage and everything else are those of `DynamicCache`.

    Attributes:
        evicted: tokens of the text that a layer no longer keeps, by layer index.
        position_shift: by how much the position of the next token is less than its index in the text, under
            presses that number the kept tokens anew.
        masked: kvpress's `masked_key_indices` of layers that still hold what single heads have evicted, by
            layer index: (batch, head, slot) indices that attention must not see.

    Example:
        >>> import torch
        >>> cache = TextCache()
        >>> for _ in range(2):  # two layers
        ...     _ = cache.update(torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 5, 4), len(cache.layers))
        >>> for layer in cache.layers:  # a press keeps two of five tokens
        ...     layer.keys, layer.values = layer.keys[:, :, 3:], layer.values[:, :, 3:]
        >>> cache.has_read(5)
        >>> cache.get_seq_length(), cache.get_mask_sizes(host.mask_query(1), 0)
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
        only_full = getattr(cache, "only_non_sliding", False)
        made = cls(offloading=cache.offloading, offload_only_non_sliding=only_full)
        made.layers, made.layer_class_to_replicate = cache.layers, cache.layer_class_to_replicate
        return made

    def _forget(self) -> None:
        self.evicted, self.masked, self.position_shift = {}, {}, 0

    def has_read(self, tokens: int) -> None:
        """Tell the length of the text that was read, after a press has worked on the layers.

        Args:
            tokens: length of the text. Every layer that anything was written to has seen all of it.
        """
        self.evicted = {
            index: tokens - layer.get_seq_length()
            for index, layer in enumerate(self.layers)
            if hasattr(layer, "get_seq_length") and layer.is_initialized and tokens != layer.get_seq_length()
        }

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read."""
        length: int = super().get_seq_length(layer_idx)
        return length + self.evicted.get(self._counted(layer_idx), 0)

    def get_mask_sizes(self, query: Any, layer_idx: int) -> tuple[int, int]:
        """Sizes for the attention mask.

        Args:
            query: how many tokens arrive, or their positions, as the version of transformers gives it.
            layer_idx: the layer that the mask is for.

        Returns:
            How many slots the layer has, with the arriving tokens, and the index in the text of the first
            slot if the slots were the newest tokens.
        """
        length, offset = super().get_mask_sizes(query, layer_idx)
        return length, offset + self.evicted.get(self._counted(layer_idx), 0)

    def _counted(self, layer_idx: int) -> int:
        """The layer that transformers looks at: for a first layer of states, the first that keeps tokens."""
        if layer_idx:
            return layer_idx
        return next((index for index, layer in enumerate(self.layers) if host.keeps_tokens(layer)), 0)

    def crop(self, max_length: int) -> None:
        """Go back to the first `max_length` tokens of the text; a negative value drops that many.

        The newest tokens are dropped. None of them may have been evicted.
        """
        length = self.get_seq_length()
        relative = max_length < 0 or (host.CROP_REMOVES and max_length == 0)
        drop = -max_length if relative else length - max_length
        for layer in self.layers if drop >= 0 else ():
            if drop or getattr(layer, "record_past", False):
                layer.crop(-drop)  # type: ignore[attr-defined]

    def reset(self) -> None:
        """Forget every token."""
        super().reset()
        self._forget()
