"""RMSNorm in one launch (Triton), adding in the order of PyTorch's mean; see `AddingOrder`."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantpress.kernels.joined import reference

_ROUNDED_THEN_WEIGHED = tl.constexpr(reference.ROUNDED_THEN_WEIGHED)
_ONE_PLUS_WEIGHT = tl.constexpr(reference.ONE_PLUS_WEIGHT)


@triton.jit
def _elements(turn, thread, of_four, THREADS: tl.constexpr, VECTORIZED: tl.constexpr):
    """The element that a thread adds to one of its four sums in one turn."""
    if VECTORIZED:
        return (turn * THREADS + thread) * 4 + of_four
    return (turn * 4 + of_four) * THREADS + thread


@triton.jit
def _total(sums, WIDTH: tl.constexpr, HEIGHT: tl.constexpr, NEIGHBOURS_FIRST: tl.constexpr):
    """The sum of [WIDTH * HEIGHT, 4]: the four of a thread, then a line of threads, then the lines."""
    even, odd = tl.split(tl.reshape(sums, [WIDTH * HEIGHT, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    line = tl.reshape(((first + second) + third) + fourth, [HEIGHT, WIDTH])
    for i in tl.static_range(9):  # 512 is 2**9
        if WIDTH >> i > 1:
            if NEIGHBOURS_FIRST and WIDTH >> i <= 32:
                line = tl.sum(tl.reshape(line, [HEIGHT, WIDTH >> (i + 1), 2]), 2)
            else:
                line = tl.sum(tl.reshape(line, [HEIGHT, 2, WIDTH >> (i + 1)]), 1)
    total = tl.reshape(line, [HEIGHT])
    for i in tl.static_range(9):
        if HEIGHT >> i > 1:
            total = tl.sum(tl.reshape(total, [2, HEIGHT >> (i + 1)]), 0)
    return tl.sum(total, 0)  # of one element


@triton.jit
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    output_ptr,
    inverse,
    eps,
    SIZE: tl.constexpr,
    TURNS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    VECTORIZED: tl.constexpr,
    NEIGHBOURS_FIRST: tl.constexpr,
    FORM: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Norm one row (axis 0).

    x, output: [rows, SIZE], contiguous; weight: [SIZE]; inverse: 1 / SIZE; TURNS: a power of two, in which
    all threads add SIZE elements at least; WIDTH, HEIGHT, VECTORIZED, NEIGHBOURS_FIRST: an `AddingOrder`;
    FORM: one of `NORM_FORMS`; CHAINED: it may start before the kernel before it has ended, which does not
    write weight. Launch it with `ROUNDED`.
    """
    if CHAINED:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) * SIZE
    threads: tl.constexpr = WIDTH * HEIGHT
    thread, of_four = tl.arange(0, threads), tl.arange(0, 4)
    turn = tl.arange(0, TURNS)[:, None, None]
    every = _elements(turn, thread[None, :, None], of_four[None, None, :], threads, VECTORIZED)
    weight = tl.load(weight_ptr + every, mask=every < SIZE, other=0.0)  # both before anything waits
    if CHAINED:
        gdc_wait()
    whole = tl.load(x_ptr + row + every, mask=every < SIZE, other=0.0)
    sums = tl.zeros([threads, 4], tl.float32)
    for turn in tl.static_range(TURNS):
        at = _elements(turn, thread[:, None], of_four[None, :], threads, VECTORIZED)
        x = tl.load(x_ptr + row + at, mask=at < SIZE, other=0.0).to(tl.float32)
        sums += x * x
    scale = tl.rsqrt(_total(sums, WIDTH, HEIGHT, NEIGHBOURS_FIRST) * inverse + eps)
    scaled = whole.to(tl.float32) * scale
    if FORM == _ROUNDED_THEN_WEIGHED:
        scaled = scaled.to(x_ptr.dtype.element_ty).to(tl.float32)
    factor = weight.to(tl.float32)
    if FORM == _ONE_PLUS_WEIGHT:
        factor = 1.0 + factor
    tl.store(output_ptr + row + every, (factor * scaled).to(output_ptr.dtype.element_ty), mask=every < SIZE)
