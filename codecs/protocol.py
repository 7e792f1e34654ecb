"""`PageCodec`: what the cache and attention ask of a codec.

A codec turns whole pages of keys or values into *planes*: named tensors whose first three dimensions are
[B, Hkv, P] (batch, KV heads, pages). The cache never looks inside a plane; it appends, crops, indexes and
moves planes, so it works with any codec. Where groups of heads have codecs of their own (`HeadGroups`), a
plane has the heads of its group.

Attention works in *code space*, where decoding is cheapest. For any vector x and query q,

    q . x = to_code_space(transform.query(q)) . decode_code_space(encode(x)) + transform.bias(q)

up to the codec's own error. Keys are scored in code space; values are summed there and brought back once per
query.

A new codec is one file with a frozen dataclass that has a `head_dim` and two methods::

    @portable("my_codec")  # the name in saved files
    @dataclass(frozen=True)
    class MyPages(PageCodec):
        head_dim: int

        def encode(self, x: Tensor, transform: ChannelTransform) -> Planes: ...
        def decode_code_space(self, planes: Planes) -> Tensor: ...

`TurboQuant(codec=lambda head_dim, role, layer_idx: MyPages(head_dim))` packs a cache with it.
"""

from abc import ABC, abstractmethod
from functools import lru_cache

import torch
from torch import Tensor

from quantpress.codecs.heads import Heads, take_planes, transform_of
from quantpress.codecs.parts import Parts, kind_of, rebuild
from quantpress.errors import InvalidInputError
from quantpress.kernels.attend.operands import KernelOperands
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.quantization.budget import ChannelGroup
from quantpress.quantization.transform import ChannelTransform

Planes = dict[str, Tensor]


class PageCodec(ABC):
    """Packs whole pages of vectors and decodes them; a frozen dataclass, so that equal codecs compare equal.

    Attributes:
        head_dim: dimension D of the vectors.
        groups: how the channels are split over code widths. With more than one group the transform gets a
            channel order; none means that the codec asks for no order.
        wants_statistics: whether the cache takes a mean and channel weights from its tokens before the first
            `encode`. Without, `transform` is the identity everywhere.
        heads: the KV heads of each group, where groups have codecs of their own; none: every head has this
            codec.
    """

    head_dim: int
    groups: tuple[ChannelGroup, ...] = ()
    wants_statistics: bool = False
    heads: tuple[Heads, ...] = ()

    @property
    def kv_heads(self) -> int | None:
        """The number of KV heads that it packs; None: any."""
        return sum(map(len, self.heads)) or None

    @abstractmethod
    def encode(self, x: Tensor, transform: ChannelTransform) -> Planes:
        """Pack x [B, Hkv, T, D] floating, T a multiple of `PAGE_TOKENS`, into planes [B, Hkv, P, ...]."""

    @abstractmethod
    def decode_code_space(self, planes: Planes) -> Tensor:
        """Decode planes to [B, Hkv, T, D] float32 in code space."""

    def to_code_space(self, x: Tensor) -> Tensor:
        """Map [..., D] float32, already through the transform, into code space; the identity by default."""
        return x

    def from_code_space(self, y: Tensor) -> Tensor:
        """Undo `to_code_space`: [..., D] float32."""
        return y

    def decode(self, planes: Planes, transform: ChannelTransform, dtype: torch.dtype) -> Tensor:
        """Bring planes back to [B, Hkv, T, D] in `dtype`."""
        return transform.invert(self.from_code_space(self.decode_code_space(planes))).to(dtype)

    def of_heads(
        self, planes: Planes, transform: ChannelTransform, heads: Heads
    ) -> tuple["PageCodec", Planes, ChannelTransform]:
        """How the pages of some heads are read.

        Args:
            planes: [B, Hkv, P, ...].
            transform: that of all heads.
            heads: which; where the codec has `heads`, one of these groups.

        Returns:
            Codec, planes [B, len(heads), P, ...] and transform of these heads.
        """
        own = {name: take_planes(plane, heads) for name, plane in planes.items()}
        return self, own, transform_of(transform, heads)

    def gather(self, planes: Planes, tokens: Tensor) -> Planes:
        """Make pages of some of the tokens, with the codes that they have; eviction while decoding needs it.

        Args:
            planes: [B, Hkv, P, ...].
            tokens: [B, Hkv, N] int64, each in 0 to 128 * P - 1, N a multiple of `PAGE_TOKENS`.

        Returns:
            Planes [B, Hkv, N / 128, ...].

        Raises:
            InvalidInputError: the codec does not implement `gather`.
        """
        raise InvalidInputError(
            f"tokens of {type(self).__name__} cannot be moved: evict before they are packed, not while "
            "decoding"
        )

    @property
    def bits_per_value(self) -> float:
        """Stored bits per coordinate, scales included; by default counted from the planes of one page."""
        stored = sum(plane.nbytes for plane in one_page(self, torch.bfloat16).values())
        return 8 * stored / (PAGE_TOKENS * self.head_dim * (self.kv_heads or 1))

    @property
    def in_one_dtype(self) -> "PageCodec":
        """The same codec with planes of fixed dtypes, for memory that is allocated before there are vectors.

        A codec whose planes always have the same dtypes is this codec itself.
        """
        return self

    def kernel_operands(self) -> KernelOperands | None:
        """What the fast attention kernels need to read the planes; None: attention decodes page by page."""
        return None

    def parts(self) -> Parts:
        """What the codec is, for a file: by default its fields, which must be plain JSON values.

        Raises:
            InvalidInputError: the class is not registered by `portable`, so no file could name it.
        """
        return Parts(kind_of(self), dict(vars(self)))

    @classmethod
    def from_parts(cls, parts: Parts) -> "PageCodec":
        """The codec that `parts` described."""
        return cls(**parts.about)


def codec_of(parts: Parts) -> PageCodec:
    """The codec that `PageCodec.parts` described.

    Raises:
        InvalidInputError: these are parts of something else, or of a codec that is not registered here.
    """
    codec = rebuild(parts)
    if not isinstance(codec, PageCodec):
        raise InvalidInputError(
            f"parts of kind {parts.kind!r} are not those of a codec; pack the cache again"
        )
    return codec


@lru_cache(maxsize=64)
def one_page(codec: PageCodec, dtype: torch.dtype) -> Planes:
    """The planes of a page of zeros: every page has these names, dtypes and trailing shapes.

    The page is of one head, or of all heads where the codec has a fixed number of them.

    Args:
        codec: packs the page.
        dtype: of the vectors.

    Returns:
        Planes [1, 1, 1, ...], or [1, heads of the group, 1, ...], on the CPU. Cached and shared: do not
        write to them.
    """
    zeros = torch.zeros(1, codec.kv_heads or 1, PAGE_TOKENS, codec.head_dim, dtype=dtype, device="cpu")
    return codec.encode(zeros, ChannelTransform())
