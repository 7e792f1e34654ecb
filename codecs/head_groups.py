"""`HeadGroups`: groups of a layer's KV heads, each with a codec of its own.

The pages of a group are planes [B, heads of the group, P, ...], named by the number of the group. Attention
reads one group after the other, each as a layer of fewer heads (`quantpress.cache.attention.by_heads`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantpress.codecs.heads import Heads, join_heads, take_heads, transform_of
from quantpress.codecs.parts import Parts, kind_of, portable
from quantpress.codecs.protocol import PageCodec, Planes, codec_of
from quantpress.errors import InvalidInputError
from quantpress.quantization.budget import ChannelGroup
from quantpress.quantization.transform import ChannelTransform


@portable("head_groups")
@dataclass(frozen=True)
class HeadGroups(PageCodec):
    """A codec for each group of KV heads.

    Args:
        heads: the heads of each group, ascending; together they are all KV heads of a layer, each once.
        codecs: the codec of each group, for vectors of one head_dim; all of them want statistics, or none.

    Raises:
        InvalidInputError: the heads are not 0 to Hkv - 1, or the codecs do not fit each other.

    Example:
        >>> from quantpress.codecs.uniform import UniformPages
        >>> codec = HeadGroups(((0, 2), (1,)), (UniformPages(64, 2), UniformPages(64, 8)))
        >>> codec.kv_heads, codec.bits_per_value
        (3, 4.5)
    """

    heads: tuple[Heads, ...] = field()  # without the default of `PageCodec`
    codecs: tuple[PageCodec, ...]

    def __post_init__(self) -> None:
        every = sorted(head for group in self.heads for head in group)
        ascending = all(list(group) == sorted(group) for group in self.heads)
        if not all(self.heads) or every != list(range(len(every))) or not every or not ascending:
            raise InvalidInputError(
                f"heads are {self.heads!r}; give groups in which each of the heads 0 to Hkv - 1 is once, in "
                "ascending order, such as ((0, 2), (1,))"
            )
        kinds = {(one.head_dim, one.wants_statistics) for one in self.codecs}
        if len(self.codecs) != len(self.heads) or len(kinds) != 1 or any(one.heads for one in self.codecs):
            raise InvalidInputError(
                f"{len(self.heads)} groups of heads with codecs {self.codecs!r}; give one for each group, of "
                "one head_dim, none of them of groups again, and all with statistics or all without"
            )

    @property
    def head_dim(self) -> int:  # type: ignore[override]  # that of its codecs
        return self.codecs[0].head_dim

    @property
    def wants_statistics(self) -> bool:  # type: ignore[override]
        return self.codecs[0].wants_statistics

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:  # type: ignore[override]
        """Those of the codec that has most; an order of channels does not harm codecs with one group."""
        return max((codec.groups for codec in self.codecs), key=len)

    @property
    def bits_per_value(self) -> float:
        bits = (
            len(heads) * codec.bits_per_value for heads, codec in zip(self.heads, self.codecs, strict=True)
        )
        return sum(bits) / sum(map(len, self.heads))

    @property
    def in_one_dtype(self) -> "HeadGroups":
        return HeadGroups(self.heads, tuple(codec.in_one_dtype for codec in self.codecs))

    def encode(self, x: Tensor, transform: ChannelTransform) -> Planes:
        """Pack x as `PageCodec.encode` describes.

        Raises:
            InvalidInputError: x has another number of heads.
        """
        if x.dim() != 4 or x.shape[1] != self.kv_heads:
            raise InvalidInputError(
                f"keys or values of shape {tuple(x.shape)}, but the codes are for {self.kv_heads} KV heads; "
                "give one for each head of a layer"
            )
        planes = {}
        for number, (heads, codec) in enumerate(zip(self.heads, self.codecs, strict=True)):
            own = codec.encode(take_heads(x, heads), transform_of(transform, heads))
            planes.update({f"{number}.{name}": plane for name, plane in own.items()})
        return planes

    def of_heads(
        self, planes: Planes, transform: ChannelTransform, heads: Heads
    ) -> tuple[PageCodec, Planes, ChannelTransform]:
        """Codec, planes and transform of one of the groups; nothing is copied but parts of the transform.

        Raises:
            InvalidInputError: the heads are not those of a group.
        """
        if heads not in self.heads:
            raise InvalidInputError(f"heads {heads} are no group of {self.heads}; read a whole group")
        number = self.heads.index(heads)
        own = {
            name.partition(".")[2]: plane
            for name, plane in planes.items()
            if name.partition(".")[0] == str(number)
        }
        return self.codecs[number], own, transform_of(transform, heads)

    def decode(self, planes: Planes, transform: ChannelTransform, dtype: torch.dtype) -> Tensor:
        parts = (self.of_heads(planes, transform, heads) for heads in self.heads)
        return join_heads([codec.decode(own, part, dtype) for codec, own, part in parts], self.heads)

    def decode_code_space(self, planes: Planes) -> Tensor:
        parts = (self.of_heads(planes, ChannelTransform(), heads) for heads in self.heads)
        return join_heads([codec.decode_code_space(own) for codec, own, _ in parts], self.heads)

    def to_code_space(self, x: Tensor) -> Tensor:
        """Map [B, Hkv, ..., D] float32 into the code space of each head."""
        return self._each(x, [codec.to_code_space for codec in self.codecs])

    def from_code_space(self, y: Tensor) -> Tensor:
        """Undo `to_code_space`: [B, Hkv, ..., D] float32."""
        return self._each(y, [codec.from_code_space for codec in self.codecs])

    def _each(self, x: Tensor, work: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
        parts = [one(take_heads(x, heads)) for one, heads in zip(work, self.heads, strict=True)]
        return join_heads(parts, self.heads)

    def gather(self, planes: Planes, tokens: Tensor) -> Planes:
        found = {}
        for number, heads in enumerate(self.heads):
            codec, own, _ = self.of_heads(planes, ChannelTransform(), heads)
            gathered = codec.gather(own, take_heads(tokens, heads))
            found.update({f"{number}.{name}": plane for name, plane in gathered.items()})
        return found

    def parts(self) -> Parts:
        """The heads, and the parts of each codec."""
        inner = {str(number): codec.parts() for number, codec in enumerate(self.codecs)}
        return Parts(kind_of(self), {"heads": [list(heads) for heads in self.heads]}, inner=inner)

    @classmethod
    def from_parts(cls, parts: Parts) -> "HeadGroups":
        """The codec that `parts` described."""
        codecs = (codec_of(parts.inner[str(number)]) for number in range(len(parts.inner)))
        return cls(tuple(map(tuple, parts.about["heads"])), tuple(codecs))


def by_head(keys: Sequence[PageCodec], values: Sequence[PageCodec]) -> tuple[PageCodec, PageCodec]:
    """The codecs of keys and of values of a layer, from those of each head.

    Heads with the same pair of codecs are a group, so that keys and values have the same groups, and no more
    than there are pairs.

    Args:
        keys: codec of the keys of each head.
        values: codec of the values of each head.

    Returns:
        A `HeadGroups` for the keys and one for the values; where all heads are alike, their codecs.

    Example:
        >>> from quantpress.codecs.uniform import UniformPages
        >>> two, four = UniformPages(64, 2), UniformPages(64, 4)
        >>> by_head([two, four, two], [two, two, two])[0].heads
        ((0, 2), (1,))
    """
    pairs = list(zip(keys, values, strict=True))
    every = list(dict.fromkeys(pairs))
    if len(every) == 1:
        return every[0]
    heads = tuple(tuple(head for head, own in enumerate(pairs) if own == pair) for pair in every)
    return HeadGroups(heads, tuple(pair[0] for pair in every)), HeadGroups(heads, tuple(p[1] for p in every))
