"""Where codes and scales lie in a block of vLLM's cache.

vLLM hands each layer one tensor of bytes, [blocks, Hkv, 128, C] logically. The 128 * C bytes of a block and
KV head are one page of ours: the planes of the keys and of the values, one after the other.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantpress.cache.engine_memory import PLANE_ALIGNMENT
from quantpress.codecs.protocol import PageCodec, Planes, one_page
from quantpress.errors import InvalidInputError
from quantpress.kernels.layout import PAGE_TOKENS


def row_steps(compact: bool, blocks: int, kv_heads: int) -> tuple[int, int]:
    """Rows of a layer's pool of pages from block to block, and from head to head.

    Args:
        compact: whether all heads of a block lie together (LBHNC), or all blocks of a head do (LHBNC).
        blocks: of vLLM's cache.
        kv_heads: Hkv.
    """
    return (kv_heads, 1) if compact else (1, blocks)


@dataclass(frozen=True)
class _Part:
    role: int  # 0: keys, 1: values
    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class PageLayout:
    """The page of a block and KV head.

    Args:
        codecs: of keys and of values.
        dtype: of the vectors that are packed.
    """

    codecs: tuple[PageCodec, PageCodec]
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """C, bytes of a page for each of its tokens."""
        size = max(part.offset + _nbytes(part) for part in self._parts())
        return -(-size // PAGE_TOKENS)

    def _parts(self) -> Iterator[_Part]:
        offset = 0
        for role, codec in enumerate(self.codecs):
            for name, plane in one_page(codec, self.dtype).items():
                yield (part := _Part(role, name, offset, tuple(plane.shape[3:]), plane.dtype))
                offset += -(-_nbytes(part) // PLANE_ALIGNMENT) * PLANE_ALIGNMENT


def _nbytes(part: _Part) -> int:
    return torch.Size(part.shape).numel() * part.dtype.itemsize


@dataclass(frozen=True, eq=False)
class BlockPages:
    """Views of the planes in the cache of one layer.

    Args:
        layout: of a page.
        cache: [blocks, Hkv, 128, C] uint8, any order of blocks and heads in memory.

    Raises:
        InvalidInputError: the tokens of a page do not lie together, or pages are not equally far apart.
    """

    layout: PageLayout
    cache: Tensor

    def __post_init__(self) -> None:
        tokens, width = self.cache.shape[2:]
        steps = self.cache.stride()
        together = tokens == PAGE_TOKENS and steps[2:] == (width, 1) and width == self.layout.token_bytes
        if not together or any(step % (tokens * width) for step in steps[:2]):
            raise InvalidInputError(
                f"vLLM's cache is {list(self.cache.shape)} with strides {list(steps)}, but a page of "
                f"{PAGE_TOKENS} tokens of {self.layout.token_bytes} bytes must lie in one piece; leave "
                "vLLM's block size and its layout of the cache (LHBNC, LBHNC) as the plugin sets them"
            )

    @property
    def blocks(self) -> int:
        return self.cache.shape[0]

    @property
    def heads(self) -> int:
        return self.cache.shape[1]

    @property
    def page_bytes(self) -> int:
        return PAGE_TOKENS * self.layout.token_bytes

    @property
    def steps(self) -> tuple[int, int]:
        """Rows of the pool from block to block, and from head to head."""
        return self.cache.stride(0) // self.page_bytes, self.cache.stride(1) // self.page_bytes

    def by_head(self) -> tuple[Planes, Planes]:
        """Planes of keys and of values, [Hkv, blocks, ...] views."""
        return self._views((self.heads, self.blocks), (self.cache.stride(1), self.cache.stride(0)))

    def pool(self) -> tuple[Planes, Planes]:
        """The same as pools [rows, ...]; `steps` says which row is a block's and a head's."""
        (of_block, of_head), size = self.steps, self.page_bytes
        rows = (self.blocks - 1) * of_block + (self.heads - 1) * of_head + 1
        return self._views((rows,), (size,))

    def _views(self, lead: tuple[int, ...], strides: tuple[int, ...]) -> tuple[Planes, Planes]:
        """The planes with these leading dimensions, their strides in bytes."""
        planes: tuple[Planes, Planes] = ({}, {})
        for part in self.layout._parts():
            size = part.dtype.itemsize
            start = self.cache.storage_offset() + part.offset
            raw = self.cache.as_strided((*lead, _nbytes(part)), (*strides, 1), start)
            plane = raw.view(part.dtype)
            inner = torch.empty(part.shape, device="meta").stride()
            planes[part.role][part.name] = plane.as_strided(
                (*lead, *part.shape), (*(step // size for step in strides), *inner), plane.storage_offset()
            )
        return planes
