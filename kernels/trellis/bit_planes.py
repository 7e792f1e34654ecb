"""The layout of trellis codes: pages of single bits, one for each bit of the codes.

The codes of 128 tokens of one KV head are b pages of 1 bit, one after the other. Page k is `pack_pages` of
bit k of all codes at 1 bit, so that every bit has its place from `quantpress.kernels.layout`: a stored bit is
1 where bit k of the code is 0, the negative level. Attention can multiply stored bits as signs, because the
levels of trellises with taps are linear in them.
"""

import torch
from torch import Tensor

from quantpress.kept import kept
from quantpress.kernels.layout import PAGE_TOKENS, pack_pages, page_table, read_pages


def pack_bit_planes(codes: Tensor, bits: int, role: str) -> Tensor:
    """Pack codes into pages of single bits.

    Args:
        codes: [..., P, 128, D] uint8, each below 2**bits, which is not checked.
        bits: code width b.
        role: "key" or "value".

    Returns:
        [..., P, b * 16 * D] uint8.

    Raises:
        InvalidInputError: `role` is neither, or `codes` has the wrong dtype or shape.
    """
    pages = [pack_pages(codes >> k & 1, 1, role, checked=True) for k in range(bits)]
    return torch.cat(pages, dim=-1)


def unpack_bit_planes(packed: Tensor, bits: int, head_dim: int, role: str) -> Tensor:
    """Undo `pack_bit_planes`.

    Args:
        packed: [..., P, b * 16 * D] uint8.
        bits: code width b.
        head_dim: D.
        role: "key" or "value".

    Returns:
        Codes [..., P, 128, D] uint8.

    Raises:
        InvalidInputError: `role` is neither, or `packed` has not the size of such pages.
    """
    table = _bit_table(packed.device)
    pages = packed.tensor_split(bits, dim=-1)
    codes = read_pages(pages[-1], table, 1, head_dim, role)
    for page in pages[-2::-1]:  # highest bit first
        codes = codes.add_(codes).bitwise_or_(read_pages(page, table, 1, head_dim, role))
    return codes.reshape(*packed.shape[:-1], PAGE_TOKENS, head_dim)


@kept
def _bit_table(device: torch.device) -> Tensor:
    """Table of `read_pages` from stored bits to bits of codes; shared: do not write to it."""
    return page_table(torch.arange(2, dtype=torch.uint8, device=device), 1)
