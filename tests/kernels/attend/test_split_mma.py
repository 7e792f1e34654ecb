"""The split kernel for tensor cores: its source in PyTorch, its assembly in numpy, through its own launch."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from quantpress.kernels.attend import PackedSegment, Visibility
from quantpress.kernels.attend.calls import call as calling
from quantpress.kernels.attend.calls import settings
from quantpress.kernels.attend.calls.call import Call
from quantpress.kernels.attend.calls.settings import LOG2_E
from quantpress.kernels.attend.lookup import FINE, bytes_of_levels
from quantpress.kernels.attend.operands import ScalarOperands
from quantpress.kernels.attend.reference import attend_reference
from quantpress.kernels.attend.schedule import PageSchedule
from quantpress.kernels.rotation_matrix import padded
from quantpress.quantization.codebook import codebook
from quantpress.quantization.rotation import Rotation
from tests.kernels.attend import emulate_gluon
from tests.kernels.attend.test_attend import (
    BATCH,
    GROUP,
    KV_HEADS,
    PAGES,
    in_use,
    packed,
    pooled,
    some_lengths,
)

pytest.importorskip("triton")

MOST = 127 * 256
PROGRAMS = 8  # of one multiprocessor: most have more than one page


class Emulated:
    """In the place of a kernel: `kernel[grid](...)` runs every program here."""

    def __init__(self) -> None:
        from quantpress.kernels.attend import split_mma

        kernel = split_mma.split_mma_kernel
        self.module, self.fn, self.arg_names = split_mma, kernel.fn, kernel.arg_names
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        from tests.kernels.attend.emulate_gluon import emulate

        def launch(
            *arguments: Any,
            num_warps: int,
            maxnreg: int,
            launch_pdl: bool,
            enable_fp_fusion: bool,
            **constants: Any,
        ) -> None:
            assert (num_warps, maxnreg) == (1, 255) and enable_fp_fusion and launch_pdl
            given = dict(zip(self.arg_names, arguments, strict=False)) | constants
            self.launches.append(given)
            emulate(self.module, "split_mma_kernel", given, grid)

        return launch


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Emulated:
    """The launch finds a GPU of one multiprocessor."""
    kernel = Emulated()
    monkeypatch.setattr(kernel.module, "split_mma_kernel", kernel)
    monkeypatch.setattr(calling, "programs_at_a_time", lambda device: PROGRAMS)
    monkeypatch.setattr(calling, "chains", lambda device: True)
    monkeypatch.setattr(settings, "shared_memory", lambda device: 228 * 1024)
    return kernel


def prepared(call: Any, scale: float) -> list[torch.Tensor]:
    """What the first kernel hands on: q, factor, start and bias, as `split_mma_kernel` has them."""
    transform, rows, dim = call.packed.keys.transform, call.rows, call.keys.head_dim
    query = call.query.double()  # [BH, rows, D]
    bias = (query * transform.mean.flatten(0, 1).unsqueeze(1)).sum(-1) * scale
    y = call.keys.rotation.forward(query / transform.weight.flatten(0, 1).unsqueeze(1))
    y = y.unsqueeze(-2)  # [BH, rows, planes, D]
    if call.keys.filters:
        taps = [[tap * y.roll(-lag, -1) for lag, tap in enumerate(one)] for one in call.keys.filters]
        y = torch.cat([sum(one) for one in taps], -2)
    largest = y.abs().amax((-2, -1), keepdim=True)
    numbers = (y * (MOST / largest)).round().int()
    high = (numbers + 128) >> 8
    largest = largest.squeeze(-1)
    count, block, blocks = call.heads * call.blocks, call.block, call.blocks

    def by_block(x: torch.Tensor) -> torch.Tensor:
        padded = torch.zeros(call.heads, blocks * block, *x.shape[2:], dtype=x.dtype)
        padded[:, :rows] = x
        return padded.view(count, block, *x.shape[2:])

    parts = torch.stack((by_block(high), by_block(numbers - 256 * high)), 1)  # [N, high or low, R, planes, D]
    q = parts.transpose(1, 2).flatten(1, 2).transpose(1, 2).contiguous()  # row 2 r, and 2 r + 1
    sums = by_block(numbers.sum((-2, -1), dtype=torch.int32) >> 1)
    start = torch.stack((torch.zeros_like(sums), sums), 2).flatten(1)
    if call.keys.page_keys:
        planes = call.packed.keys.planes
        stored = torch.stack((planes["mean0"], planes["sink0"]), -2).double()  # [..., P, 2, D]
        if call.table is not None:
            stored = stored[call.table.long()]
        turned = query / transform.weight.flatten(0, 1).unsqueeze(1)
        scores = torch.einsum("hrd,hpkd->hrpk", turned, stored.flatten(0, 1)) * scale
        call.page_scores = by_block(scores).permute(0, 2, 3, 1).float().contiguous()  # [N, P, 2, R]
    factor = by_block((2 * largest / MOST * scale * call.keys.unit).squeeze(-1).float())
    assert q.shape == (count, max(len(call.keys.filters), 1), 2 * block, dim)
    q = torch.nn.functional.pad(q, (0, padded(dim) - dim))
    assert start.shape == (count, 2 * block)
    return [q.to(torch.int8), factor, start, by_block(bias.float())]


def joined(call: Any, sums: list[torch.Tensor]) -> torch.Tensor:
    """What the merge makes of the splits: [B, Hq, Tq, Dv]."""
    o, m, totals = (x.double() for x in sums)  # [A, S, R, DV], [A, R, S] twice
    out = torch.zeros(call.heads, call.rows, o.shape[-1], dtype=torch.float64)
    assert o.shape[-1] == padded(call.values.head_dim) * max(len(call.values.filters), 1)
    bounds = None if call.schedule is None else call.schedule.heads
    if call.table is not None and bounds is None:
        bounds = bounds_of_call(call)
    for head in range(call.heads):
        for row in range(call.rows):
            at, local = row // call.block, row % call.block
            held = slice(None) if bounds is None else slice(*bounds[head].tolist())
            at = at if bounds is not None else head * call.blocks + at
            parts, largest, total = o[at, held, local], m[at, local, held], totals[at, local, held]
            if not len(parts):
                continue
            weights = (largest - largest.max()).exp2()
            whole = (weights * total).sum()
            if whole > 0:
                out[head, row] = (weights.unsqueeze(-1) * parts).sum(0) / whole
    if call.values.filters:
        planes = out.unflatten(-1, (len(call.values.filters), -1)).unbind(-2)
        of_plane = zip(planes, call.values.filters, strict=True)
        out = sum(tap * one.roll(lag, -1) for one, taps in of_plane for lag, tap in enumerate(taps))
    out = call.values.rotation.inverse(out[..., : call.values.head_dim] * call.values.unit)
    return out.view(call.batch, call.query_heads, call.queries, -1)


def bounds_of_call(call: Any) -> torch.Tensor:
    """[heads, 2]: the programs of each head, in order, as many as its share of the pages asks for."""
    starts = torch.zeros_like(call.used) if call.starts is None else call.starts
    there = torch.where(call.used > 0, (starts + call.used + 127) // 128 - starts // 128, 0).flatten()
    at_a_time = calling.programs_at_a_time(call.query.device)
    return bounds_of(there, calling.scheduled_programs(call.pages, call.heads, at_a_time // call.blocks))


def bounds_of(there: torch.Tensor, programs: int) -> torch.Tensor:
    size = max(math.ceil(int(there.sum()) / (programs - len(there))), 1)
    ends = torch.ceil(there / size).long().cumsum(0)
    return torch.stack((torch.cat((ends.new_zeros(1), ends[:-1])), ends), 1)


def with_schedule(pages: PackedSegment) -> PackedSegment:
    """Pages by table, with what `page_schedule` writes down for one block of rows."""
    assert isinstance(pages.lengths, torch.Tensor) and pages.table is not None and pages.starts is not None
    rows, used, starts = pages.table.flatten(0, 1), pages.lengths.flatten(), pages.starts.flatten()
    begins = starts // 128
    there = torch.where(used > 0, (starts + used + 127) // 128 - begins, 0)
    count = calling.scheduled_programs(pages.pages, len(there), calling.programs_at_a_time(rows.device))
    bounds, programs = bounds_of(there, count), torch.zeros(count, 4, dtype=torch.int32)
    for head, (begin, end) in enumerate(bounds.tolist()):
        parts = end - begin
        edges = [local * int(there[head]) // max(parts, 1) for local in range(parts + 1)]
        for local, (first, last) in enumerate(itertools.pairwise(edges)):
            low, high = first + int(begins[head]), last + int(begins[head])
            read = low + int(low * 128 < starts[head] and high - low > 1)
            programs[begin + local] = torch.tensor((head, low, high, int(rows[head, read])))
    return replace(pages, schedule=PageSchedule(programs, bounds.int()))


def run(
    pages: PackedSegment, queries: int, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over packed tokens alone, and what it should be."""
    dim, scaling = pages.keys.codec.head_dim, 0.2
    query = torch.randn(BATCH, KV_HEADS * GROUP, queries, dim)
    scale = scaling * LOG2_E
    cap = 0.0 if softcap is None else softcap * LOG2_E
    call = Call(query, pages, None, scale, cap, plain=False)
    got = joined(call, call.attend(prepared(call, scale)))
    visibility = Visibility(queries, pages.tokens, causal=False)
    expected = attend_reference(query.double(), [pages], visibility, scaling=scaling, softcap=softcap)
    return got, expected


def check(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-4) -> None:
    assert got.shape == expected.shape
    assert float((got - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize(
    ("key_bits", "value_bits", "dim", "queries"),
    [
        *((key, value, 128, 1) for key in (2, 3, 4) for value in (2, 3, 4)),
        (3, 3, 64, 1),
        (4, 4, 64, 1),
        (1, 1, 128, 1),
        (1, 1, 256, 1),
        (1, 3, 64, 5),
        (4, 1, 128, 1),
        *((bits, bits, 256, 1) for bits in (2, 3, 4)),
        (3, 3, 128, 5),
        (3, 2, 64, 12),
        (2, 4, 256, 5),
        *((8, value, 128, 1) for value in (1, 2, 3, 4, 8)),
        (3, 8, 64, 1),
        (8, 4, 64, 12),
        (8, 4, 256, 1),
        (2, 8, 256, 5),
        (4, 3, 96, 1),
        (3, 4, 80, 5),
        (2, 8, 112, 1),
        (3, 3, 192, 1),
        (4, 2, 48, 1),
    ],
)
def test_widths_and_head_dims(
    key_bits: int, value_bits: int, dim: int, queries: int, emulated: Emulated
) -> None:
    keys, values = packed(dim, dim, key_bits), packed(dim, dim, value_bits)
    check(
        *run(PackedSegment(keys.keys, values.values), queries), 1e-3 if 1 in (key_bits, value_bits) else 2e-4
    )
    assert len(emulated.launches) == 1


@pytest.mark.parametrize(
    ("key_bits", "value_bits", "dim", "queries"),
    [(4, 4, 128, 1), (3, 2, 64, 5), (2, 3, 256, 1), (4, 3, 96, 1)],
)
def test_levels_of_two_bytes(
    key_bits: int, value_bits: int, dim: int, queries: int, emulated: Emulated
) -> None:
    """Those of Lloyd and Max; keys alone, and both."""
    keys, plain = packed(dim, dim, key_bits, codebook="lloyd_max"), packed(dim, dim, value_bits)
    check(*run(PackedSegment(keys.keys, plain.values), queries))
    values = packed(dim, dim, value_bits, codebook="lloyd_max")
    check(*run(PackedSegment(keys.keys, values.values), queries))


@pytest.mark.parametrize(("dim", "value_dim"), [(192, 128), (96, 64)])
def test_values_of_another_head_dim(dim: int, value_dim: int, emulated: Emulated) -> None:
    """192 and 128 are those of DeepSeek V2 and V3."""
    keys, values = packed(dim, value_dim, 4), packed(dim, value_dim, 3)
    check(*run(PackedSegment(keys.keys, values.values), 1))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_two_bytes_are_as_fine_as_16_bits(dim: int, bits: int) -> None:
    book = codebook(bits, dim, "lloyd_max")
    operands = ScalarOperands(Rotation(dim), book)
    coarse, fine = bytes_of_levels(book)
    assert all(level % 2 == 1 and abs(level) <= 255 for level in coarse + fine)
    assert coarse == [-level for level in reversed(coarse)] and fine == [-level for level in reversed(fine)]
    found = [(one + other * FINE) * operands.unit for one, other in zip(coarse, fine, strict=True)]
    off = max(abs(got - exact) for got, exact in zip(found, book.levels, strict=True))
    assert off <= 1.001 / (255 * 256) * book.levels[-1]


@pytest.mark.parametrize(
    ("key_bits", "value_bits", "planes", "dim", "queries"),
    [
        (2, 2, "keys values", 128, 1),
        (3, 3, "keys values", 128, 1),
        (2, 3, "keys values", 64, 5),
        (3, 2, "keys values", 128, 5),
        (4, 2, "values", 128, 1),
        (3, 3, "keys", 64, 1),
        (8, 3, "values", 64, 1),
        (4, 4, "keys values", 64, 5),
        (4, 2, "keys", 128, 1),
        (3, 2, "keys values", 256, 1),
        (2, 4, "keys values", 256, 5),
    ],
)
def test_bit_planes(
    key_bits: int, value_bits: int, planes: str, dim: int, queries: int, emulated: Emulated
) -> None:
    keys = packed(dim, dim, key_bits, planes="keys" in planes)
    values = packed(dim, dim, value_bits, planes="values" in planes)
    pages = PackedSegment(keys.keys, values.values)
    check(*run(pages, queries), 1e-3)
    lengths = some_lengths(pages.tokens)
    starts = (torch.rand(lengths.shape) * (pages.tokens - lengths + 1)).int()
    check(*run(with_schedule(pooled(pages, lengths, starts)), queries), 1e-3)


def test_scales_beyond_float16(emulated: Emulated) -> None:
    pages = packed(128, 128, 3)
    values = {
        name: plane if plane.dtype == torch.uint8 else plane.float() * 2**20
        for name, plane in pages.values.planes.items()
    }
    check(*run(replace(pages, values=replace(pages.values, planes=values)), 1))


@pytest.mark.parametrize(
    ("key_bits", "value_bits", "dim", "programs"),
    [
        (2, 2, 128, PROGRAMS),
        (3, 3, 128, 3 * PROGRAMS),
        (4, 4, 128, PROGRAMS),
        (4, 3, 128, 3 * PROGRAMS),
        (3, 3, 256, PROGRAMS),
        (8, 8, 64, PROGRAMS),
        (8, 3, 128, 3 * PROGRAMS),
        (4, 3, 96, PROGRAMS),
    ],
)
def test_lengths_starts_and_tables(
    key_bits: int,
    value_bits: int,
    dim: int,
    programs: int,
    emulated: Emulated,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens not in use are NaN or noise; none of a head, all of another; a page a program, or more."""
    monkeypatch.setattr(calling, "programs_at_a_time", lambda device: programs)
    keys, values = packed(dim, dim, key_bits), packed(dim, dim, value_bits)
    pages = PackedSegment(keys.keys, values.values)
    lengths = some_lengths(pages.tokens)
    poisoned, _ = in_use(pages, lengths)
    assert isinstance(poisoned, PackedSegment)
    check(*run(poisoned, 1))
    starts = (torch.rand(lengths.shape) * (pages.tokens - lengths + 1)).int()
    check(*run(pooled(pages, lengths, starts), 1))
    check(*run(replace(pooled(pages, lengths, 0 * starts), starts=None), 1))
    check(*run(replace(pages, lengths=lengths, starts=starts), 1))
    check(*run(replace(with_schedule(pooled(pages, lengths, 0 * starts)), starts=None), 1))
    check(*run(with_schedule(pooled(pages, lengths, starts)), 1))
    means = replace(pages, keys=packed(dim, dim, key_bits, page_keys=True).keys)
    check(*run(with_schedule(pooled(means, lengths, starts)), 1))
    assert emulated.launches.pop()["PAGE_KEYS"]
    given = [tuple(launch[name] for name in ("STARTS", "HEADS", "SCHEDULED")) for launch in emulated.launches]
    padded = given[1][1]
    assert padded > 1 and given == [
        (False, 0, False),
        (True, padded, False),
        (False, padded, False),
        (True, 0, False),
        (False, 1, True),
        (True, 1, True),
    ]


@pytest.mark.parametrize(
    ("key_bits", "value_bits", "dim", "queries", "held"),
    [
        (4, 4, 128, 5, "registers"),
        (4, 3, 128, 5, "registers"),
        (3, 4, 64, 5, "registers"),
        (3, 3, 128, 5, "registers"),
        (3, 3, 256, 1, "shared memory"),
        (2, 3, 256, 1, "shared memory"),
        (3, 4, 256, 1, "shared memory"),
        (8, 4, 128, 1, "registers"),
        (8, 3, 128, 1, "shared memory"),
        (3, 8, 64, 5, "shared memory"),
    ],
)
def test_words_are_read_once(
    key_bits: int,
    value_bits: int,
    dim: int,
    queries: int,
    held: str,
    emulated: Emulated,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a page is taken in two steps: words of 3 bits hold tokens of both."""
    keys, values = packed(dim, dim, key_bits), packed(dim, dim, value_bits)
    pages = PackedSegment(keys.keys, values.values)
    counts = {side.planes["codes0"].data_ptr(): [] for side in (pages.keys, pages.values)}
    read = emulate_gluon.Pointer.read

    def counted(pointer: Any, mask: Any = True, other: float = 0) -> torch.Tensor:
        offsets = counts.get(pointer.memory.data_ptr())
        if offsets is not None:
            offsets.append(torch.as_tensor(pointer.offset).flatten())
        return read(pointer, mask, other)

    monkeypatch.setattr(emulate_gluon.Pointer, "read", counted)
    check(*run(pages, queries))
    launch = emulated.launches[0]
    assert (launch["HALVES"], launch["STAGED"]) == (2, held == "shared memory")
    times = [torch.cat(offsets).unique(return_counts=True)[1] for offsets in counts.values()]
    words = pages.values.planes["codes0"].view(torch.int32).numel()
    assert times[1].shape == (words,) and bool((times[1] == 1).all())
    programs = launch["o_ptr"].shape[:2].numel()
    ahead = 0 if launch["STAGED"] and key_bits == 3 else programs  # a page that is there already
    words = pages.keys.planes["codes0"].view(torch.int32).numel()
    page = words // (pages.pages * launch["heads"])
    assert times[0].shape == (words,) and int(times[0].sum()) <= words + ahead * page
    assert int((times[0] > 1).sum()) <= ahead * page // 32, "behind the last page all lanes load the same"


@pytest.mark.parametrize(
    ("key_bits", "value_bits", "dim", "queries", "lanes"),
    [(4, 2, 128, 2, 2), (4, 4, 128, 2, 2), (4, 4, 128, 1, 0), (2, 2, 256, 1, 1), (4, 4, 256, 1, 0)],
)
def test_numbers_in_lanes(
    key_bits: int,
    value_bits: int,
    dim: int,
    queries: int,
    lanes: int,
    emulated: Emulated,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On Hopper, where it was faster; sums are the same."""
    keys, values = packed(dim, dim, key_bits), packed(dim, dim, value_bits)
    pages = PackedSegment(keys.keys, values.values)
    check(*run(pages, queries))
    monkeypatch.setattr(settings, "is_hopper", lambda device: True)
    check(*run(pages, queries))
    assert [launch["IN_LANES"] for launch in emulated.launches] == [0, lanes]


def test_padding_in_front(emulated: Emulated) -> None:
    """Some tokens of a page, or all pages of a sequence."""
    pages = packed(128, 128, 3)
    starts = torch.tensor([200, pages.tokens], dtype=torch.int32).unsqueeze(1).repeat(1, KV_HEADS)
    got, expected = run(replace(pages, lengths=pages.tokens - starts, starts=starts), 3)
    check(got, expected)
    assert not got[1].any()


def test_softcap_and_one_page(emulated: Emulated) -> None:
    pages = packed(128, 128, 3)
    check(*run(pages, 1, softcap=3.0))
    check(*run(packed(128, 128, 3, page_keys=True), 5, softcap=3.0))
    emulated.launches.pop()
    (keys, values) = pages.narrow(0, 1)
    check(*run(PackedSegment(keys, values), 1))
    assert pages.pages == PAGES and emulated.launches[1]["pages"] == 1
