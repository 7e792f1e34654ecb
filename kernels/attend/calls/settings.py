"""How many programs, rows and steps a call has, and what of it goes into registers or shared memory."""

import math

import torch

from quantpress.kernels.attend.merge.settings import MERGED
from quantpress.kernels.attend.operands import KernelOperands, PartOperands, ScalarOperands
from quantpress.kernels.attend.schedule import PROGRAMS
from quantpress.kernels.available import is_hopper
from quantpress.kernels.rotation_matrix import padded

FEW_ROWS = 4
"""Rows up to which a program computes no more than these; a product has room for so many."""

AHEAD_BITS = 6
"""Bits of a key and a value together, from which on starting early was faster."""

DENSE_TILE = 32
"""16-bit tokens per program."""

PAGES_OF_SCORES = 32
"""Pages whose mean and sink a program scores."""

STAGED_BYTES = 28 * 1024
"""Most shared memory of a program that stages keys and values of 3 bits: words, tables, the system's part."""

MOST_SPLITS = (128, 256)
"""Programs per block of rows: for any length, and where each has at least `PAGES_OF_SPLIT` pages. More would
cost more in the merge than they save."""

PAGES_OF_SPLIT = 3

PLAIN_PROGRAMS = 16
"""Programs of the plain kernel in all."""

LOG2_E = math.log2(math.e)


def opens_call(query: torch.Tensor, keys: KernelOperands, values: KernelOperands, rows: int) -> bool:
    """Whether the split kernel prepares its queries itself, and attends the 16-bit tokens.

    A head_dim of 256 leaves no room for it, in registers and in shared memory, and 16 rows would spill more.
    Any other than 64 and 128 has another rotation.

    Args:
        query: [BH, rows of a head, D].
        keys: operands of the keys.
        values: operands of the values.
        rows: rows that a program computes.
    """
    if isinstance(keys, PartOperands) or isinstance(values, PartOperands):
        return False
    small = rows <= 8 and max(keys.head_dim, values.head_dim) <= 128
    turned = keys.rotation.kind == "hadamard" and not keys.filters
    whole = whole_tile(keys.head_dim) and whole_tile(values.head_dim)
    return small and turned and whole and query.dtype in (torch.bfloat16, torch.float16)


def whole_tile(head_dim: int) -> bool:
    """Whether a tile has no channels beyond these, so that "hadamard" is one Walsh-Hadamard matrix."""
    return padded(head_dim) == head_dim


def block_rows(rows: int, head_dim: int, planes: int = 0) -> int:
    """How many rows share a program, 8 or 16; a head_dim of 256 or four bit planes leave registers for 8."""
    return 8 if rows <= 8 or head_dim > 128 or planes > 3 else 16


def steps_of_page(keys: KernelOperands, values: KernelOperands, rows: int, paged: bool) -> int:
    """Steps in which a page is read: two where a whole page would not fit into registers.

    Args:
        keys: operands of the keys.
        values: operands of the values.
        rows: rows that a program computes.
        paged: whether heads have page tables, which need registers too.
    """
    bits, few = max(keys.bits, values.bits), rows <= FEW_ROWS
    fine = bits == 4 and (keys.fine or values.fine)
    large = fine or bits > 4 or max(keys.head_dim, values.head_dim) > 128 or rows > 8
    planes = most_planes(keys, values)
    many = (bits == 4 and (paged or not few)) or (planes == 3 and not few) or planes > 3
    return 2 if large or many else 1


def numbers_in_lanes(keys: KernelOperands, values: KernelOperands, rows: int, device: torch.device) -> int:
    """Which numbers the split kernel keeps in lanes (its IN_LANES): where that was faster on Hopper.

    It is a matter of what the assembler makes of a kernel, and nothing else tells than the time: the head's
    number with 2-bit values and an even width of keys at a head_dim of 256, that of the program, too, with
    keys of 4 bits and eight rows at 128. The same was slower with four rows at 128, and at 4/4 and 3/2 bits
    with four rows at 256 (benchmarks/LOG.md).
    """
    for one in (keys, values):
        if not isinstance(one, ScalarOperands) or one.fine or one.page_keys or not is_hopper(device):
            return 0
    bits, head_dim = (keys.bits, values.bits), keys.head_dim
    if head_dim == 256:
        return int(bits in ((2, 2), (4, 2)))
    return 2 if head_dim == 128 and FEW_ROWS < rows <= 8 and bits in ((4, 4), (4, 2)) else 0


def stages_words(keys: KernelOperands, values: KernelOperands, steps: int, device: torch.device) -> bool:
    """Whether words of 3 bits, and of bit planes, wait in shared memory until they are read.

    With a head_dim of 256 there are too many for registers, and loading them for both steps of a page takes
    half as long again; four bit planes are too many for shared memory, too. Three or four bit planes in
    two steps need the registers for queries and sums, and codes of 8 bits beside them those for words.
    """
    bits, planes = (keys.bits, values.bits), most_planes(keys, values)
    large = max(keys.head_dim, values.head_dim) > 128
    wide = (3 in bits or planes > 1) and large
    beside = 8 in bits and (3 in bits or None in (keys.codebook, values.codebook))
    many = (wide or beside or (planes > 2 and steps == 2)) and not (large and planes > 3)
    return many and shared_memory(device) >= PROGRAMS * STAGED_BYTES


def most_planes(keys: KernelOperands, values: KernelOperands) -> int:
    """Bit planes of keys or of values, whichever has more; 0: neither has several."""
    return max(len(keys.filters), len(values.filters))


def split_count(pages: int, blocks: int, programs: int) -> int:
    """Number of programs per block of rows, so that all programs together fill the GPU once.

    Args:
        pages: P, the pages of a KV head.
        blocks: B * Hkv * blocks of rows.
        programs: programs that the GPU runs at a time.
    """
    few, many = MOST_SPLITS
    splits = max(1, min(pages, programs // blocks, max(few, min(many, pages // PAGES_OF_SPLIT))))
    return splits if splits < few else splits // MERGED[1] * MERGED[1]


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory per multiprocessor."""
    return int(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor)
