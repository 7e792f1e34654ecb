"""The tensors of paged attention, and how tokens become pages in them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantpress.cache.paged.buffers import PoolBuffers, PoolSize
from quantpress.cache.settings import LayerSettings
from quantpress.codecs.protocol import PageCodec, Planes
from quantpress.errors import InvalidInputError
from quantpress.kernels.attend import DenseSegment
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.quantization.transform import ChannelTransform


@dataclass(frozen=True)
class Packing:
    """An order to make pages of the oldest tokens in the window of one sequence.

    Args:
        sequence: the sequence.
        blocks: blocks for the pages, in order.
        tokens: tokens in the window now.
        first: whether the sequence has no page yet.
    """

    sequence: int
    blocks: Sequence[int]
    tokens: int
    first: bool


@dataclass(frozen=True)
class _EncodedPages:
    """Pages of keys and values, [A, Hkv, P, ...], that are not in the pool yet.

    Args:
        layers: A layers.
        blocks: A lists of P blocks.
        planes: planes of keys and of values.
        transforms: sequence and its transforms [1, Hkv, D], if these are its first pages.
    """

    layers: Sequence[int]
    blocks: Sequence[Sequence[int]]
    planes: tuple[Planes, Planes]
    transforms: tuple[int, tuple[ChannelTransform, ChannelTransform]] | None = None


class PoolStorage:
    """The memory of a page pool; see `quantpress.cache.paged.pool`.

    Args:
        settings: how the tokens are stored; at least `recent_tokens` stay in a window behind pages. Scales of
            dtype "auto" are float16, because the memory is allocated before any vector is known.
        size: the capacity.
        dtype: dtype of the 16-bit tokens.
        device: device of all tensors.

    Attributes:
        keys: the tensors of the keys.
        values: the tensors of the values.
        window_tokens: capacity of a window, sink_tokens + recent_tokens + 128.

    Raises:
        InvalidInputError: heads have widths of their own.
    """

    def __init__(
        self, settings: LayerSettings, size: PoolSize, dtype: torch.dtype, device: torch.device
    ) -> None:
        settings.check_heads_alike("paged attention")
        settings = settings.in_one_dtype
        self.settings, self.size, self.dtype, self.device = settings, size, dtype, device
        self.window_tokens = settings.sink_tokens + settings.recent_tokens + PAGE_TOKENS
        self._head = torch.arange(size.kv_heads, device=device)
        self._moments: dict[tuple[int, int], torch.Tensor] = {}  # by layer and sequence, until the first page

        def buffers(codec: PageCodec, **parts: bool) -> PoolBuffers:
            wanted = {**parts, "order": len(codec.groups) > 1}
            names = [name for name in wanted if wanted[name] and codec.wants_statistics]
            return PoolBuffers(codec, names, size, settings.sink_tokens, self.window_tokens, dtype, device)

        self.keys = buffers(settings.key_codec, mean=settings.mean_key, weight=settings.balance)
        self.values = buffers(settings.value_codec)

    def pages_of(self, tokens: int) -> int:
        """Number of pages of a sequence of `tokens` tokens, which packs what does not fit into a window."""
        settings = self.settings
        return max(0, tokens - 1 - settings.sink_tokens - settings.recent_tokens) // PAGE_TOKENS

    @torch.no_grad()
    def fill(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        sequence: int,
        blocks: Sequence[int],
        *,
        layer: int = 0,
        query_moment: torch.Tensor | None = None,
    ) -> None:
        """Write the tokens of a prompt in one layer.

        Args:
            keys: [Hkv, T, D], post-RoPE.
            values: [Hkv, T, Dv].
            sequence: index of a sequence that has no tokens.
            blocks: `pages_of(T)` blocks.
            layer: index of the layer.
            query_moment: [Hkv, D] mean square of the queries that will read these keys, to balance channels;
                None: no balance.

        Raises:
            NonFiniteError: tokens to be packed contain NaN or infinity; nothing was changed.
            InvalidInputError: wrong shapes or number of blocks, or a scale that does not fit its dtype;
                nothing was changed.
        """
        tokens = keys.shape[1] if keys.dim() == 3 else 0
        self.check_states(keys, values, (self.size.kv_heads, tokens))
        if len(blocks) != self.pages_of(tokens):
            raise InvalidInputError(f"{tokens} tokens need {self.pages_of(tokens)} blocks, got {len(blocks)}")
        states, start = (keys.to(self.dtype), values.to(self.dtype)), 0
        self._moments.pop((layer, sequence), None)
        if query_moment is not None and self.settings.balance:
            moment = query_moment.detach().to(self.device, torch.float32, copy=True)
            self._moments[layer, sequence] = moment
        if blocks:
            first = self.settings.sink_tokens
            start = first + len(blocks) * PAGE_TOKENS
            packed = (s[:, first:start] for s in states)
            self._store(self._first_pages(layer, sequence, blocks, *packed))
            self._moments.pop((layer, sequence), None)
            for side, given in zip((self.keys, self.values), states, strict=True):
                side.sinks[layer, sequence] = given[:, :first]
        for side, rest in zip((self.keys, self.values), states, strict=True):
            side.window[layer, sequence, :, : tokens - start] = rest[:, start:]

    @torch.no_grad()
    def pack(self, packings: Sequence[Packing]) -> None:
        """Make pages of the oldest tokens in windows, in all layers.

        Raises:
            NonFiniteError: the tokens contain NaN or infinity; nothing was changed.
        """
        counts = {len(p.blocks) for p in packings}
        pages = [page for count in counts for page in self._further_pages(packings, count)]
        for packing in packings:
            if packing.first:
                start = self.settings.sink_tokens
                window = slice(start, start + len(packing.blocks) * PAGE_TOKENS)
                for layer in range(self.size.layers):
                    states = (s.window[layer, packing.sequence, :, window] for s in (self.keys, self.values))
                    pages.append(self._first_pages(layer, packing.sequence, packing.blocks, *states))
        for encoded in pages:
            self._store(encoded)
        for packing in packings:
            self._shift(packing)

    def _first_pages(
        self, layer: int, sequence: int, blocks: Sequence[int], keys: torch.Tensor, values: torch.Tensor
    ) -> _EncodedPages:
        """Encode the first pages of a sequence, keys [Hkv, P * 128, D], and compute its transforms."""
        moment = self._moments.get((layer, sequence))
        moment = None if moment is None else moment.unsqueeze(0)
        tokens = DenseSegment(keys.unsqueeze(0), values.unsqueeze(0))
        transforms = self.settings.channel_transforms(tokens, moment)
        planes = (
            self.settings.key_codec.encode(tokens.keys, transforms[0]),
            self.settings.value_codec.encode(tokens.values, transforms[1]),
        )
        return _EncodedPages([layer], [blocks], planes, (sequence, transforms))

    def _further_pages(self, packings: Sequence[Packing], count: int) -> list[_EncodedPages]:
        """Encode, together, the pages of all sequences that have some already and get `count` more."""
        chosen = [p for p in packings if len(p.blocks) == count and not p.first]
        if not chosen:
            return []
        sequences = torch.tensor([p.sequence for p in chosen], dtype=torch.int64, device=self.device)
        planes = []
        for side in (self.keys, self.values):
            states = side.window[:, sequences, :, : count * PAGE_TOKENS].flatten(0, 1)
            planes.append(side.codec.encode(states, side.transforms(sequences)))
        layers = [layer for layer in range(self.size.layers) for _ in chosen]
        blocks = [p.blocks for p in chosen] * self.size.layers
        return [_EncodedPages(layers, blocks, (planes[0], planes[1]))]

    def _store(self, pages: _EncodedPages) -> None:
        layers = torch.tensor(pages.layers, dtype=torch.int64, device=self.device)
        rows = self._rows(pages.blocks)
        for side, planes in zip((self.keys, self.values), pages.planes, strict=True):
            side.store(planes, layers, rows)
        if pages.transforms is not None:
            sequence, transforms = pages.transforms
            for side, transform in zip((self.keys, self.values), transforms, strict=True):
                side.set_transform(pages.layers[0], sequence, transform)

    def _shift(self, packing: Packing) -> None:
        """Remove the packed tokens from a window; at the first packing, move its sinks out as well."""
        sequence, front = packing.sequence, self.settings.sink_tokens if packing.first else 0
        for side in (self.keys, self.values):
            if packing.first:
                side.sinks[:, sequence] = side.window[:, sequence, :, :front]
            side.drop(sequence, front + len(packing.blocks) * PAGE_TOKENS, packing.tokens)
        if packing.first:
            self.forget(sequence)

    @torch.no_grad()
    def copy(self, source: int, target: int) -> None:
        """Copy everything of sequence `source` but its pages to sequence `target`."""
        for side in (self.keys, self.values):
            side.copy(source, target)
        self.forget(target)
        for layer in range(self.size.layers):
            if (layer, source) in self._moments:
                self._moments[layer, target] = self._moments[layer, source]

    def forget(self, sequence: int) -> None:
        """Drop the query moments that a sequence keeps for its first page."""
        for layer in range(self.size.layers):
            self._moments.pop((layer, sequence), None)

    @torch.no_grad()
    def decode(
        self, sequence: int, blocks: Sequence[int], tokens: int, *, layer: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Every token of a sequence in one layer, decoded: keys [Hkv, T, D] and values [Hkv, T, Dv].

        Args:
            sequence: its index.
            blocks: its blocks, in order.
            tokens: T.
            layer: index of the layer.
        """
        states = []
        front = self.settings.sink_tokens if blocks else 0
        in_window = tokens - front - len(blocks) * PAGE_TOKENS
        rows, index = self._rows([blocks])[0], torch.tensor([sequence], dtype=torch.int64, device=self.device)
        for side in (self.keys, self.values):
            parts = [side.sinks[layer, sequence, :, :front]]
            if blocks:
                planes = {name: plane[layer, rows].unsqueeze(0) for name, plane in side.planes.items()}
                parts.append(side.codec.decode(planes, side.transform(layer, index), self.dtype)[0])
            states.append(torch.cat([*parts, side.window[layer, sequence, :, :in_window]], dim=1))
        return states[0], states[1]

    def _rows(self, blocks: Sequence[Sequence[int]]) -> torch.Tensor:
        """Rows of the planes: blocks [A, P] -> [A, Hkv, P] int64."""
        return self.size.rows(torch.tensor(blocks, dtype=torch.int64, device=self.device))

    def check_states(self, keys: torch.Tensor, values: torch.Tensor, lead: tuple[int, ...]) -> None:
        """Check that keys are floating [*lead, D], and values floating [*lead, Dv].

        Raises:
            InvalidInputError: keys or values have another shape or dtype.
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
        """The tensors for 16-bit tokens: sinks and windows."""
        return [tensor for side in (self.keys, self.values) for tensor in (side.sinks, side.window)]

    def metadata_tensors(self) -> list[torch.Tensor]:
        """The channel transforms, and query moments that are kept for a first page."""
        return [*self.keys.metadata, *self.values.metadata, *self._moments.values()]
