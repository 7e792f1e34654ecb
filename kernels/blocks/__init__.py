"""The memory of a serving engine: `put_tokens` and `pack_blocks` write it, `decode_blocks` reads it.

The first two take fixed shapes and wait for nothing on the device, so that a CUDA graph may capture them:
what is not to be written is marked -1.

operands.py         where tokens and blocks go, and what is checked
reference.py        plain PyTorch: the truth that the kernels are held to
triton_blocks.py    launches the kernels of triton_kernel.py
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantpress.errors import InvalidInputError
from quantpress.kernels.available import runs_triton
from quantpress.kernels.blocks.operands import BlockCodec, BlockSide, TokenTarget, check_pack, check_put
from quantpress.kernels.blocks.reference import (
    decode_blocks_reference,
    pack_blocks_reference,
    put_tokens_reference,
)
from quantpress.kernels.encode.reference import encode_pages_reference
from quantpress.quantization.numerics import in_named_dtypes

__all__ = [
    "BlockCodec",
    "BlockSide",
    "TokenTarget",
    "decode_blocks",
    "encode_blocks",
    "pack_blocks",
    "put_tokens",
]


def put_tokens(keys: Tensor, values: Tensor, targets: Sequence[TokenTarget]) -> None:
    """Store tokens as they are in pages of pools, each token in every target whose row for it is not -1.

    Args:
        keys: [T, Hkv, D] floating, channels contiguous, any other strides.
        values: [T, Hkv, Dv] as the keys.
        targets: at most two; rows other than -1 are distinct within a target. Tokens are cast to the pool's
            dtype.

    Raises:
        InvalidInputError: there are more targets, or shapes or dtypes do not fit.
    """
    check_put(keys, values, targets)
    if not targets or not keys.shape[0]:
        return
    if runs_triton(keys.device):
        from quantpress.kernels.blocks.triton_blocks import put_tokens_triton, supports_put

        if supports_put(keys, values, targets):
            put_tokens_triton(keys, values, targets)
            return
    put_tokens_reference(keys, values, targets)


@in_named_dtypes
def pack_blocks(
    keys: Tensor, values: Tensor, pages: Tensor, blocks: Tensor, sides: tuple[BlockSide, BlockSide]
) -> None:
    """Encode pages of 128 tokens into packed blocks: page pages[f] goes to block blocks[f], for each head.

    The kernels cover codecs of one width of 2, 3 or 4 bits, a head_dim up to 256 and transforms without an
    order. They write what `encode_pages` would, but never wait for the device: a scale beyond its
    dtype becomes the largest that the dtype holds, and a vector that is not finite may get a scale of NaN.

    Other codecs run in plain PyTorch. On a GPU that writes the blocks marked -1 to block 0, which must be one
    that nobody reads (vLLM's null block is); it waits for the device only where the codec's `encode` does.

    Args:
        keys: [N, Hkv, 128, D] floating, any strides; pages may overlap.
        values: [N, Hkv, 128, Dv] as the keys.
        pages: [F] int32, the page to encode; anything where blocks[f] is -1.
        blocks: [F] int32, the block to write, or -1 for none; the others are distinct.
        sides: codecs, transforms and planes of the keys and of the values; the planes are written.

    Raises:
        InvalidInputError: shapes or dtypes do not fit.
        NonFiniteError: a page to encode holds NaN or infinity, in plain PyTorch.
    """
    check_pack(keys, values, pages, blocks, sides)
    if not pages.numel() or not keys.shape[0]:
        return
    if runs_triton(keys.device):
        from quantpress.kernels.blocks.triton_blocks import pack_blocks_triton, supports_pack

        if supports_pack(keys, values, sides):
            pack_blocks_triton(keys, values, pages, blocks, sides)
            return
    pack_blocks_reference(keys, values, pages, blocks, sides)


@in_named_dtypes
def decode_blocks(side: BlockSide, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Decode packed blocks to tokens, as attention over a prompt in chunks takes them.

    The kernels read the blocks where they lie, for codecs without a sketch; other codecs gather them first.

    Args:
        side: the keys or the values; its planes are read.
        blocks: [P] int32, the blocks in order.
        dtype: of the result.

    Returns:
        [P * 128, Hkv, D] `dtype`, contiguous.

    Raises:
        InvalidInputError: `blocks` are not [P] int32.
    """
    if blocks.dtype != torch.int32 or blocks.dim() != 1:
        raise InvalidInputError(
            f"blocks to decode are {blocks.dtype} {tuple(blocks.shape)}; give torch.int32 [P]"
        )
    if runs_triton(blocks.device):
        from quantpress.kernels.blocks.triton_blocks import decode_blocks_triton, supports_blocks

        if supports_blocks(side, dtype):
            return decode_blocks_triton(side, blocks, dtype)
    return decode_blocks_reference(side, blocks, dtype)


def encode_blocks(x: Tensor, side: BlockSide) -> dict[str, Tensor]:
    """Encode whole pages as `pack_blocks` does: a scale beyond its dtype becomes the largest that it holds.

    Args:
        x: [1, Hkv, T, D] floating and finite, T a multiple of `PAGE_TOKENS`.
        side: the keys or the values; its planes are not written.

    Returns:
        The codec's planes [1, Hkv, T / 128, ...].
    """
    if side.spec is None:
        return side.codec.encode(x, side.transform)
    if runs_triton(x.device):
        from quantpress.kernels.blocks.triton_blocks import encode_blocks_triton, supports_encode_blocks

        if supports_encode_blocks(x, side.spec):
            return encode_blocks_triton(x, side)
    return encode_pages_reference(x, side.spec, side.transform, side.queries)
