"""The tensors of paged attention, and how tokens become pages in them."""

from collections.abc import Sequence

import torch

from quantpress.cache.paged.pool_pages import Packing, Pages, first_pages
from quantpress.cache.paged.pool_side import PoolSide, PoolSize
from quantpress.cache.settings import LayerSettings
from quantpress.codecs.page_codec import PageCodec
from quantpress.errors import InvalidInputError
from quantpress.kernels.layout import PAGE_TOKENS


class PoolStorage:
    """Blocks and slots of a number of layers; see `quantpress.cache.paged.page_pool`.

    Args:
        settings: codecs and windows; `recent_tokens` is the least that stays in a window behind pages. Scales
            of "auto" are float16: the memory is there before the vectors.
        size: how much there is room for.
        dtype: of the 16-bit tokens.
        device: where.

    Attributes:
        keys, values: the tensors.
        window_tokens: room of a window, sink_tokens + recent_tokens + 128.
    """

    def __init__(
        self, settings: LayerSettings, size: PoolSize, dtype: torch.dtype, device: torch.device
    ) -> None:
        settings = settings.in_one_dtype
        self.settings, self.size, self.dtype, self.device = settings, size, dtype, device
        self.window_tokens = settings.sink_tokens + settings.recent_tokens + PAGE_TOKENS
        self._head = torch.arange(size.kv_heads, device=device)
        self._moments: dict[tuple[int, int], torch.Tensor] = {}  # by layer and slot, until the first page

        def side(codec: PageCodec, **parts: bool) -> PoolSide:
            wanted = {**parts, "order": len(codec.groups) > 1}
            names = [name for name in wanted if wanted[name] and codec.wants_statistics]
            return PoolSide(codec, names, size, settings.sink_tokens, self.window_tokens, dtype, device)

        self.keys = side(settings.key_codec, mean=settings.mean_key, weight=settings.balance)
        self.values = side(settings.value_codec)

    def pages_of(self, tokens: int) -> int:
        """Pages of a sequence of so many tokens: what no longer fits into a window is packed."""
        settings = self.settings
        return max(0, tokens - 1 - settings.sink_tokens - settings.recent_tokens) // PAGE_TOKENS

    @torch.no_grad()
    def fill(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        slot: int,
        blocks: Sequence[int],
        *,
        layer: int = 0,
        query_moment: torch.Tensor | None = None,
    ) -> None:
        """Take in the tokens of a prompt in one layer.

        Args:
            keys: [Hkv, T, D], post-RoPE.
            values: [Hkv, T, Dv].
            slot: one that holds nothing.
            blocks: `pages_of(T)` blocks.
            layer: which layer.
            query_moment: [Hkv, D] mean square of the queries that will read these keys, for the balance of
                channels; without it they are not balanced.

        Raises:
            NonFiniteError: what is to be packed holds NaN or infinity; nothing was changed.
            InvalidInputError: wrong shapes, or the wrong number of blocks; a scale that its dtype does not
                hold, and then nothing was changed.
        """
        tokens = keys.shape[1] if keys.dim() == 3 else 0
        self.check_states(keys, values, (self.size.kv_heads, tokens))
        if len(blocks) != self.pages_of(tokens):
            raise InvalidInputError(f"{tokens} tokens need {self.pages_of(tokens)} blocks, got {len(blocks)}")
        states, start = (keys.to(self.dtype), values.to(self.dtype)), 0
        self._moments.pop((layer, slot), None)
        if query_moment is not None and self.settings.balance:
            self._moments[layer, slot] = query_moment.detach().to(self.device, torch.float32, copy=True)
        if blocks:
            first = self.settings.sink_tokens
            start = first + len(blocks) * PAGE_TOKENS
            packed = (s[:, first:start] for s in states)
            self._store(self._first_pages(layer, slot, blocks, *packed))
            self._moments.pop((layer, slot), None)
            self.keys.sinks[layer, slot], self.values.sinks[layer, slot] = (s[:, :first] for s in states)
        for side, rest in zip((self.keys, self.values), states, strict=True):
            side.window[layer, slot, :, : tokens - start] = rest[:, start:]

    @torch.no_grad()
    def pack(self, packings: Sequence[Packing]) -> None:
        """Make pages of the oldest tokens in windows, in all layers.

        Raises:
            NonFiniteError: they hold NaN or infinity; nothing was changed.
        """
        pages = [page for size in {len(p.blocks) for p in packings} for page in self._further(packings, size)]
        for packing in packings:
            if packing.first:
                start = self.settings.sink_tokens
                window = slice(start, start + len(packing.blocks) * PAGE_TOKENS)
                for layer in range(self.size.layers):
                    states = (
                        side.window[layer, packing.slot, :, window] for side in (self.keys, self.values)
                    )
                    pages.append(self._first_pages(layer, packing.slot, packing.blocks, *states))
        for encoded in pages:
            self._store(encoded)
        for packing in packings:
            self._shift(packing)

    def _further(self, packings: Sequence[Packing], size: int) -> list[Pages]:
        """Pages of all slots that have some already and get `size` more, encoded together."""
        chosen = [p for p in packings if len(p.blocks) == size and not p.first]
        if not chosen:
            return []
        slots = torch.tensor([p.slot for p in chosen], dtype=torch.int64, device=self.device)
        planes = []
        for side in (self.keys, self.values):
            states = side.window[:, slots, :, : size * PAGE_TOKENS].flatten(0, 1)
            planes.append(side.codec.encode(states, side.transforms(slots)))
        layers = [layer for layer in range(self.size.layers) for _ in chosen]
        blocks = [p.blocks for p in chosen] * self.size.layers
        return [Pages(layers, blocks, (planes[0], planes[1]))]

    def _first_pages(
        self, layer: int, slot: int, blocks: Sequence[int], keys: torch.Tensor, values: torch.Tensor
    ) -> Pages:
        moment = self._moments.get((layer, slot))
        return first_pages(self.settings, layer, slot, blocks, keys, values, moment)

    def _store(self, pages: Pages) -> None:
        layers, places = (
            torch.tensor(pages.layers, dtype=torch.int64, device=self.device),
            self._places(pages.blocks),
        )
        for side, planes in zip((self.keys, self.values), pages.planes, strict=True):
            side.store(planes, layers, places)
        if pages.made is not None:
            slot, transforms = pages.made
            for side, transform in zip((self.keys, self.values), transforms, strict=True):
                side.keep_transform(pages.layers[0], slot, transform)

    def _shift(self, packing: Packing) -> None:
        """Take what was packed, and the sinks if it was the first time, out of a window."""
        slot, front = packing.slot, self.settings.sink_tokens if packing.first else 0
        for side in (self.keys, self.values):
            if packing.first:
                side.sinks[:, slot] = side.window[:, slot, :, :front]
            side.drop(slot, front + len(packing.blocks) * PAGE_TOKENS, packing.tokens)
        if packing.first:
            self.forget(slot)

    @torch.no_grad()
    def copy(self, source: int, target: int) -> None:
        """Let a slot hold what another one holds."""
        for side in (self.keys, self.values):
            side.copy(source, target)
        self.forget(target)
        for layer in range(self.size.layers):
            if (layer, source) in self._moments:
                self._moments[layer, target] = self._moments[layer, source]

    def forget(self, slot: int) -> None:
        """Let go of what was kept for the first page of a slot."""
        for layer in range(self.size.layers):
            self._moments.pop((layer, slot), None)

    @torch.no_grad()
    def decode(
        self, slot: int, blocks: Sequence[int], tokens: int, *, layer: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Every token of a sequence in one layer, decoded: keys [Hkv, T, D] and values [Hkv, T, Dv].

        Args:
            slot: its slot.
            blocks: its blocks, in order.
            tokens: T.
            layer: which layer.
        """
        whole = []
        front = self.settings.sink_tokens if blocks else 0
        held = tokens - front - len(blocks) * PAGE_TOKENS
        slots, places = torch.tensor([slot], dtype=torch.int64, device=self.device), self._places([blocks])[0]
        for side in (self.keys, self.values):
            parts = [side.sinks[layer, slot, :, :front]]
            if blocks:
                planes = {name: plane[layer, places].unsqueeze(0) for name, plane in side.planes.items()}
                parts.append(side.codec.decode(planes, side.transform(layer, slots), self.dtype)[0])
            whole.append(torch.cat([*parts, side.window[layer, slot, :, :held]], dim=1))
        return whole[0], whole[1]

    def _places(self, blocks: Sequence[Sequence[int]]) -> torch.Tensor:
        """Rows of the planes: blocks [A, P] -> [A, Hkv, P] int64."""
        return self.size.rows(torch.tensor(blocks, dtype=torch.int64, device=self.device))

    def check_states(self, keys: torch.Tensor, values: torch.Tensor, lead: tuple[int, ...]) -> None:
        """Refuse keys that are not floating [*lead, D], and values that are not [*lead, Dv].

        Raises:
            InvalidInputError: that is so.
        """
        for name, states, side in (("keys", keys, self.keys), ("values", values, self.values)):
            wanted = (*lead, side.codec.head_dim)
            if tuple(states.shape) != wanted or not states.is_floating_point():
                raise InvalidInputError(
                    f"{name} are {states.dtype} {tuple(states.shape)}; give floating {list(wanted)}"
                )

    def packed_tensors(self) -> list[torch.Tensor]:
        """The planes: codes and scales."""
        return [*self.keys.planes.values(), *self.values.planes.values()]

    def dense_tensors(self) -> list[torch.Tensor]:
        """The room for 16-bit tokens."""
        return [tensor for side in (self.keys, self.values) for tensor in (side.sinks, side.window)]

    def metadata_tensors(self) -> list[torch.Tensor]:
        """The channel transforms, and query moments that wait for a first page."""
        return [*self.keys.metadata, *self.values.metadata, *self._moments.values()]
