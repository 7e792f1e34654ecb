"""Where tokens and blocks are written: `TokenTarget` and `BlockSide`, and the checks of both operations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from quantpress.errors import InvalidInputError
from quantpress.kernels.dequantize.reference import check_planes
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.quantization.query_moments import QueryMoments
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform

MOST_TARGETS = 2


@dataclass(frozen=True, eq=False)
class TokenTarget:
    """A pool of pages of n tokens, and where in it tokens are put.

    Args:
        rows: [T] int32, page * n + place in the page of each token, or -1: not stored here.
        keys: [N, Hkv, n, D] floating, any strides, written.
        values: [N, Hkv, n, Dv] floating, any strides, written.
    """

    rows: Tensor
    keys: Tensor
    values: Tensor


class BlockCodec(Protocol):
    """What packed blocks ask of a codec; `quantpress.codecs.protocol.PageCodec` describes each method."""

    @property
    def head_dim(self) -> int: ...
    def encode(self, x: Tensor, transform: ChannelTransform) -> dict[str, Tensor]: ...
    def decode(
        self, planes: dict[str, Tensor], transform: ChannelTransform, dtype: torch.dtype
    ) -> Tensor: ...


@runtime_checkable
class ScalarCodec(Protocol):
    """A codec of scalar codes, described by its parameters."""

    @property
    def spec(self) -> CodecSpec: ...


@dataclass(frozen=True, eq=False)
class BlockSide:
    """The keys, or the values, of packed blocks of `PAGE_TOKENS` tokens.

    Args:
        codec: encodes pages.
        transform: the channel transform of all blocks, parts [1, Hkv, D].
        planes: the codec's planes of single pages, [Hkv, blocks, ...] each, with any strides from head to
            head and from block to block; those of scalar codes with bytes and scales contiguous in a page.
        queries: of keys with `page_keys`, the moments of scaled queries, by which the sink of each page is
            chosen; None: the sink is the key furthest from the mean.

    Raises:
        InvalidInputError: the planes, or the dtype of the scales, are not the codec's; or the transform does
            not fit them.
    """

    codec: BlockCodec
    transform: ChannelTransform
    planes: dict[str, Tensor]
    queries: QueryMoments | None = None

    def __post_init__(self) -> None:
        leads = {tuple(plane.shape[:2]) for plane in self.planes.values()}
        if len(leads) != 1:
            raise InvalidInputError(f"planes of blocks must share [Hkv, blocks], got {sorted(leads)}")
        for name, part in self.transform.tensors().items():
            if tuple(part.shape) != (1, self.heads, self.codec.head_dim):
                raise InvalidInputError(
                    f"the transform's {name} is {tuple(part.shape)}; blocks need "
                    f"{(1, self.heads, self.codec.head_dim)}"
                )
        spec = self.spec
        if spec is None:
            return
        check_planes({name: plane.unsqueeze(0) for name, plane in self.planes.items()}, spec)
        for name, plane in self.planes.items():
            wanted = torch.uint8 if name.startswith(("codes", "sketch")) else spec.torch_scale_dtype
            if plane.dtype != wanted:
                raise InvalidInputError(
                    f"plane {name!r} of blocks is {plane.dtype}; the codec needs {wanted}"
                )

    @property
    def spec(self) -> CodecSpec | None:
        """The parameters of a codec of scalar codes; None for another codec."""
        return self.codec.spec if isinstance(self.codec, ScalarCodec) else None

    @property
    def heads(self) -> int:
        return next(iter(self.planes.values())).shape[0]


def check_put(keys: Tensor, values: Tensor, targets: Sequence[TokenTarget]) -> None:
    """Check the arguments of `put_tokens`."""
    if len(targets) > MOST_TARGETS:
        raise InvalidInputError(f"{len(targets)} targets; put tokens into at most {MOST_TARGETS} at a time")
    if keys.dim() != 3 or values.dim() != 3 or keys.shape[:2] != values.shape[:2]:
        raise InvalidInputError(
            f"keys of shape {tuple(keys.shape)} and values of shape {tuple(values.shape)} are not "
            "[T, Hkv, D] and [T, Hkv, Dv]"
        )
    tokens, heads, dim = keys.shape
    for target in targets:
        rows = target.rows
        if rows.dtype != torch.int32 or tuple(rows.shape) != (tokens,):
            raise InvalidInputError(
                f"rows are {rows.dtype} {tuple(rows.shape)}; give torch.int32 [{tokens}], one for each token"
            )
        sizes = [tuple(pool.shape) for pool in (target.keys, target.values)]
        wanted = [(*sizes[0][:1], heads, *sizes[0][2:3], one) for one in (dim, values.shape[2])]
        if sizes != wanted:
            raise InvalidInputError(
                f"pools of shapes {sizes[0]} and {sizes[1]} do not take keys {tuple(keys.shape)} and values "
                f"{tuple(values.shape)}; give [N, Hkv, n, D] and [N, Hkv, n, Dv]"
            )


def check_pack(
    keys: Tensor, values: Tensor, pages: Tensor, blocks: Tensor, sides: tuple[BlockSide, BlockSide]
) -> None:
    """Check the arguments of `pack_blocks`."""
    for name, x, side in zip(("keys", "values"), (keys, values), sides, strict=True):
        wanted = (keys.shape[0], side.heads, PAGE_TOKENS, side.codec.head_dim)
        if tuple(x.shape) != wanted or not x.is_floating_point():
            raise InvalidInputError(
                f"{name} to pack are {x.dtype} {tuple(x.shape)}; give floating [N, Hkv, {PAGE_TOKENS}, D] = "
                f"{wanted}"
            )
    if not pages.dtype == blocks.dtype == torch.int32 or pages.dim() != 1 or pages.shape != blocks.shape:
        raise InvalidInputError(
            f"pages are {pages.dtype} {tuple(pages.shape)} and blocks {blocks.dtype} {tuple(blocks.shape)}; "
            "give torch.int32 [F] both"
        )
