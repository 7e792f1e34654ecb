"""The keys, or the values, of a page pool: one set of tensors, allocated once."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from quantpress.codecs.page_codec import PageCodec, Planes
from quantpress.errors import InvalidInputError
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.quantization.transform import ChannelTransform


@dataclass(frozen=True)
class PoolSize:
    """How much a page pool has room for.

    Args:
        blocks: pages of 128 tokens that sequences may hold, in every layer and KV head.
        slots: sequences at a time, S.
        layers: L.
        kv_heads: Hkv.

    Raises:
        InvalidInputError: one of them is not a whole number from 1 on.
    """

    blocks: int
    slots: int
    layers: int
    kv_heads: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise InvalidInputError(f"{field.name} is {value!r}; give a whole number, 1 or more")

    def rows(self, blocks: torch.Tensor) -> torch.Tensor:
        """Rows of the planes: blocks [A, P] -> [A, Hkv, P], of the same dtype.

        The pages of a head lie in a row. With all heads of a block side by side, 64 KB at 4 bits, 64
        sequences were read 4 % slower on an H100.
        """
        heads = torch.arange(self.kv_heads, dtype=blocks.dtype, device=blocks.device)
        return blocks.unsqueeze(1) + heads.view(1, -1, 1) * self.blocks


class PoolSide:
    """Packed pages, 16-bit tokens and channel transforms of the keys (or of the values) of every slot.

    Args:
        codec: packs the pages.
        parts: names of the parts that the channel transforms have: "mean", "weight", "order".
        size: how much there is room for.
        sink_tokens: 16-bit tokens in front of the pages.
        window_tokens: room for 16-bit tokens behind the pages.
        dtype: of the 16-bit tokens.
        device: where.

    Attributes:
        planes: by name, [L, Hkv * blocks, ...]; the page of block b and head h is row h * blocks + b.
        sinks: [L, S, Hkv, sink_tokens, D].
        window: [L, S, Hkv, window_tokens, D].
        parts: by name, [L, S, Hkv, D]; finite also where no page depends on them yet.
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
        lead = (size.layers, size.slots, size.kv_heads)
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

    def transform(self, layer: int, slots: torch.Tensor | None) -> ChannelTransform:
        """The transforms of slots [B], or of all of them, in one layer: parts [B, Hkv, D]."""
        return ChannelTransform(**{name: rows(part[layer], slots) for name, part in self.parts.items()})

    def transforms(self, slots: torch.Tensor) -> ChannelTransform:
        """The transforms of slots [n] in all layers: parts [L * n, Hkv, D]."""
        return ChannelTransform(**{name: part[:, slots].flatten(0, 1) for name, part in self.parts.items()})

    def keep_transform(self, layer: int, slot: int, transform: ChannelTransform) -> None:
        """Remember the transform [1, Hkv, D] with which the first pages of a slot were made."""
        made = transform.tensors()
        for name, part in self.parts.items():
            part[layer, slot] = made[name][0] if name in made else self._neutral[name]

    def store(self, planes: Planes, layers: torch.Tensor, places: torch.Tensor) -> None:
        """Put encoded pages [A, Hkv, P, ...] of layers [A] into rows `places` [A, Hkv, P] of the planes."""
        for name, plane in planes.items():
            self.planes[name][layers[:, None, None], places] = plane

    def drop(self, slot: int, tokens: int, used: int) -> None:
        """Let the oldest of `used` tokens in a window go; the others move to its front."""
        window = self.window[:, slot]
        window[..., : used - tokens, :] = window[..., tokens:used, :].clone()

    def copy(self, source: int, target: int) -> None:
        """Make a slot hold what another one holds."""
        for buffer in (self.sinks, self.window, *self.parts.values()):
            buffer[:, target] = buffer[:, source]


def rows(tensor: torch.Tensor, slots: torch.Tensor | None) -> torch.Tensor:
    """Rows of the first dimension; the tensor itself for None."""
    return tensor if slots is None else tensor.index_select(0, slots)
