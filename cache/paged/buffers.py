"""The tensors of a page pool for the keys, or for the values, of all sequences; allocated once."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from quantpress.codecs.protocol import PageCodec, Planes
from quantpress.errors import InvalidInputError
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.quantization.transform import ChannelTransform


@dataclass(frozen=True)
class PoolSize:
    """The capacity of a page pool.

    Args:
        blocks: pages of 128 tokens that all sequences together may hold, in every layer and KV head.
        sequences: S, the number of sequences at a time.
        layers: L.
        kv_heads: Hkv.

    Raises:
        InvalidInputError: one of them is not a whole number of 1 or more.
    """

    blocks: int
    sequences: int
    layers: int
    kv_heads: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise InvalidInputError(f"{field.name} is {value!r}; give a whole number, 1 or more")

    def rows(self, blocks: torch.Tensor) -> torch.Tensor:
        """Rows of the planes: blocks [A, P] -> [A, Hkv, P], of the same dtype.

        The pages of a head are adjacent. With all heads of a block side by side, 64 KB at 4 bits, 64
        sequences were read 4 % slower on an H100.
        """
        heads = torch.arange(self.kv_heads, dtype=blocks.dtype, device=blocks.device)
        return blocks.unsqueeze(1) + heads.view(1, -1, 1) * self.blocks


class PoolBuffers:
    """Packed pages, 16-bit tokens and channel transforms of the keys (or the values) of every sequence.

    Args:
        codec: packs the pages.
        parts: names of the parts of the channel transforms: "mean", "weight", "order".
        size: the capacity.
        sink_tokens: capacity for 16-bit tokens in front of the pages.
        window_tokens: capacity for 16-bit tokens behind the pages.
        dtype: dtype of the 16-bit tokens.
        device: device of all tensors.

    Attributes:
        planes: by name, [L, Hkv * blocks, ...]; the page of block b and head h is row h * blocks + b.
        sinks: [L, S, Hkv, sink_tokens, D].
        window: [L, S, Hkv, window_tokens, D].
        parts: by name, [L, S, Hkv, D]; neutral values until the first page of a sequence.
    """

    def __init__(
        self,
        codec: PageCodec,
        parts: Sequence[str],
        size: PoolSize,
        sink_tokens: int,
        window_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.codec, dim = codec, codec.head_dim
        lead = (size.layers, size.sequences, size.kv_heads)
        with torch.inference_mode(False), torch.no_grad():  # so that any mode may write to it later
            empty = torch.zeros(1, 1, PAGE_TOKENS, dim, dtype=dtype, device=device)
            page = codec.encode(empty, ChannelTransform())
            self.planes: Planes = {
                name: plane.new_zeros(size.layers, size.kv_heads * size.blocks, *plane.shape[3:])
                for name, plane in page.items()
            }
            self.sinks = empty.new_zeros(*lead, sink_tokens, dim)
            self.window = empty.new_zeros(*lead, window_tokens, dim)
            neutral = {
                "mean": torch.zeros(dim, dtype=torch.float32, device=device),
                "weight": torch.ones(dim, dtype=torch.float32, device=device),
                "order": torch.arange(dim, dtype=torch.int16, device=device),
            }
            self._neutral = {name: neutral[name] for name in parts}
            self.parts = {name: part.repeat(*lead, 1) for name, part in self._neutral.items()}

    @property
    def metadata(self) -> list[torch.Tensor]:
        """The tensors of the channel transforms."""
        return [*self.parts.values(), *self._neutral.values()]

    def transform(self, layer: int, sequences: torch.Tensor | None) -> ChannelTransform:
        """The transforms of sequences [B], or of all (None), in one layer: parts [B, Hkv, D]."""
        parts = {name: part[layer] for name, part in self.parts.items()}
        if sequences is not None:
            parts = {name: part.index_select(0, sequences) for name, part in parts.items()}
        return ChannelTransform(**parts)

    def transforms(self, sequences: torch.Tensor) -> ChannelTransform:
        """The transforms of sequences [n] in all layers: parts [L * n, Hkv, D]."""
        return ChannelTransform(**{name: p[:, sequences].flatten(0, 1) for name, p in self.parts.items()})

    def set_transform(self, layer: int, sequence: int, transform: ChannelTransform) -> None:
        """Store the transform [1, Hkv, D] that the first pages of a sequence were packed with."""
        given = transform.tensors()
        for name, part in self.parts.items():
            part[layer, sequence] = given[name][0] if name in given else self._neutral[name]

    def store(self, planes: Planes, layers: torch.Tensor, rows: torch.Tensor) -> None:
        """Write encoded pages [A, Hkv, P, ...] of layers [A] to rows [A, Hkv, P] of the planes."""
        for name, plane in planes.items():
            self.planes[name][layers[:, None, None], rows] = plane

    def drop(self, sequence: int, tokens: int, used: int) -> None:
        """Remove the oldest `tokens` of the `used` tokens in a window; move the others to its start."""
        window = self.window[:, sequence]
        window[..., : used - tokens, :] = window[..., tokens:used, :].clone()

    def copy(self, source: int, target: int) -> None:
        """Copy everything of sequence `source` but its pages to sequence `target`."""
        for buffer in (self.sinks, self.window, *self.parts.values()):
            buffer[:, target] = buffer[:, source]
