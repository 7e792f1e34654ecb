"""Shapes of the programs of the last launch."""

MERGED = (16, 64)
"""Partial sums that a program of `by_matrix` joins at a time, where a head has at most 16 and where it may
have more."""

MERGES = 4
"""Programs of `by_matrix` per multiprocessor; where there are more rows, a program takes several."""

FEW_SUMS = 16
"""Partial sums of a row that one warp joins; more are shared by several warps."""


def warps_of_merge(sums: int, rows: int) -> tuple[int, int, int, int]:
    """PARTS, WARPS, SIZE and TILES of `merge_by_warps_kernel`.

    Args:
        sums: partial sums over packed tokens of each row, on average.
        rows: rows of a KV head.
    """
    if sums > FEW_SUMS:
        return 8, 8, (8 if sums <= 64 else 16), 2
    return 1, min(4, 1 << (rows - 1).bit_length()), (4 if sums <= 4 else 16), 16


def warps_by_matrix(head_dim: int, planes: int) -> int:
    """Warps of a program of `by_matrix`: sums of four bit planes need the registers of eight."""
    return 8 if head_dim > 128 or planes > 3 else 4


def sums_by_matrix(splits: int, head_dim: int, planes: int) -> int:
    """Partial sums that a program of `by_matrix` joins at a time.

    Args:
        splits: partial sums over packed tokens of a head, on average.
        head_dim: that of values.
        planes: bit planes of values, each of which has sums: four large ones leave registers for half.
    """
    few, many = MERGED
    if splits <= few:
        return few
    return many // 2 if head_dim > 128 and planes > 3 else many


def rows_of_merge(rows: int, heads: int, multiprocessors: int) -> int:
    """How many rows a program of `by_matrix` takes one after the other; it reads the matrix once for all.

    Args:
        rows: rows of a KV head.
        heads: B * Hkv.
        multiprocessors: number of multiprocessors of the GPU.
    """
    each = 1
    while each < rows and heads * -(-rows // each) > MERGES * multiprocessors:
        each *= 2
    return each
