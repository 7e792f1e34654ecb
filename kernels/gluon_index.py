"""Indices along one dimension of several, in Gluon kernels whose layouts are written out."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def layout_along(dim, rank, layout):
    """The layout of the indices of one dimension."""
    for k in reversed(range(rank)):
        if k != dim:
            layout = gl.SliceLayout(k, layout)
    return layout


@gluon.jit
def index_along(dim: gl.constexpr, n: gl.constexpr, rank: gl.constexpr, layout: gl.constexpr):
    """0 to n - 1 along dimension `dim` of `rank` dimensions, the others of length 1."""
    x = gl.arange(0, n, layout=layout_along(dim, rank, layout))
    for k in gl.static_range(rank):
        if k != dim:
            x = gl.expand_dims(x, k)
    return x
