"""Writes to an engine's memory, and reads of it, in plain PyTorch: the truth that the kernels are held to."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantpress.kernels.blocks.operands import BlockSide, TokenTarget
from quantpress.kernels.encode.reference import encode_pages_reference


def put_tokens_reference(keys: Tensor, values: Tensor, targets: Sequence[TokenTarget]) -> None:
    """Store tokens in pages of pools; see `quantpress.kernels.blocks.put_tokens`."""
    for target in targets:
        kept = target.rows >= 0
        rows, size = target.rows[kept].long(), target.keys.shape[2]
        for states, pool in ((keys, target.keys), (values, target.values)):
            pool[rows // size, :, rows % size] = states[kept].to(pool.dtype)


def pack_blocks_reference(
    keys: Tensor, values: Tensor, pages: Tensor, blocks: Tensor, sides: tuple[BlockSide, BlockSide]
) -> None:
    """Encode pages into packed blocks; see `quantpress.kernels.blocks.pack_blocks`."""
    kept = blocks >= 0
    if not blocks.is_cuda:
        pages, blocks = pages[kept], blocks[kept]
    for x, side in zip((keys, values), sides, strict=True):
        if blocks.is_cuda:  # to choose some would wait for the device
            chosen = x[pages.where(kept, 0).long()].masked_fill(~kept.view(-1, 1, 1, 1), 0.0)
        else:
            chosen = x[pages.long()]
        if len(chosen):
            _store(_encoded(chosen, side), blocks.clamp(min=0).long(), side)


def decode_blocks_reference(side: BlockSide, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Decode packed blocks to tokens; see `quantpress.kernels.blocks.decode_blocks`."""
    planes = {name: plane[:, blocks.long()].unsqueeze(0) for name, plane in side.planes.items()}
    return side.codec.decode(planes, side.transform, dtype)[0].transpose(0, 1).contiguous()


def _encoded(x: Tensor, side: BlockSide) -> dict[str, Tensor]:
    """Planes [F, Hkv, 1, ...] of pages [F, Hkv, 128, D]; scales that are too large are not refused."""
    if side.spec is not None:
        return encode_pages_reference(x, side.spec, side.transform, side.queries)
    return side.codec.encode(x, side.transform)


def _store(encoded: dict[str, Tensor], blocks: Tensor, side: BlockSide) -> None:
    for name, plane in side.planes.items():
        plane[:, blocks] = encoded[name][:, :, 0].transpose(0, 1).to(plane.dtype)
