"""The Triton attention kernels: in the interpreter, compiled without a GPU, and on one."""

import json
import math
import re
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantpress.codecs.protocol import PageCodec
from quantpress.codecs.raw import RawPages
from quantpress.codecs.scalar import ScalarPages
from quantpress.codecs.trellis import TrellisPages
from quantpress.errors import InvalidInputError
from quantpress.kernels.attend import DenseSegment, PackedSegment, PackedSide, Segment, Visibility, attend
from quantpress.kernels.attend.calls.settings import (
    DENSE_TILE,
    PAGES_OF_SCORES,
    STAGED_BYTES,
    block_rows,
    split_count,
    steps_of_page,
)
from quantpress.kernels.attend.merge.settings import sums_by_matrix, warps_by_matrix
from quantpress.kernels.attend.opening.arguments import tile_tokens
from quantpress.kernels.attend.reference import attend_reference
from quantpress.kernels.attend.schedule import (
    PROGRAMS,
    SCHEDULE_TILE,
    PageSchedule,
    page_schedule,
    schedule_programs,
)
from quantpress.kernels.attend.triton_attend import HEAD_DIMS, in_tiles, pass_bounds, supports
from quantpress.kernels.available import FUSED
from quantpress.presses import TurboQuant
from quantpress.presses.presets import PRESETS
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform, key_statistics
from tests.kernels.attend.bit_planes import FILTERS
from tests.kernels.attend.test_attend import (
    KV_HEADS,
    causal_limit,
    dense,
    exact,
    packed,
    pooled,
    side_by_side,
)
from tests.kernels.interpreter import interpret
from tests.kernels.triton_cases import more, resources

PLAIN = ChannelTransform()
INTERPRETED = [
    [2, 3, 64, 1, "float16", "softcap lengths"],
    [3, 4, 128, 3, "bfloat16", "sinks softcap"],
    [4, 4, 64, 6, "float32", ""],  # 18 rows: two blocks
    [3, 2, 64, 3, "bfloat16", "lengths sinks out"],
    [2, 2, 64, 1, "float32", "lengths alone identity out"],
    [2, 3, 64, 3, "float32", "sinks softcap by_head"],
    [2, 3, 64, 1, "float32", "pool right alone few side_by_side"],
    [4, 3, 64, 6, "float32", "pool few"],
    [3, 3, 64, 1, "float32", "pool shared"],
    [3, 3, 64, 1, "float32", "pool shared sinks_in_pages few"],
    [4, 3, 64, 4, "float32", "pool dense_tables shared sinks_in_pages one_transform side_by_side"],
    [2, 8, 64, 1, "float32", "pool dense_tables no_sinks right"],
    [8, 2, 64, 2, "bfloat16", "haar one_transform"],
    [2, 3, 64, 3, "float32", "planes lengths"],
    [3, 2, 64, 1, "bfloat16", "planes pool"],
    [4, 4, 64, 3, "float32", "planes lengths"],
    [1, 1, 64, 3, "float32", "lengths softcap"],
    [3, 2, 64, 4, "float32", "passes lengths sinks softcap out"],
    [2, 3, 64, 2, "bfloat16", "two planes lengths sinks softcap"],
    [4, 3, 64, 1, "float32", "two alone haar"],
    [2, 3, 64, 4, "float32", "two pool dense_tables few passes"],
    [2, 3, 64, 6, "float32", "page_keys softcap"],
    [3, 3, 64, 1, "float32", "page_keys pool right alone side_by_side"],
    [4, 3, 64, 1, "float32", "page_keys pool dense_tables shared sinks_in_pages one_transform side_by_side"],
    [4, 3, 96, 3, "bfloat16", "lengths sinks softcap out"],
    [2, 4, 80, 1, "float32", "page_keys pool dense_tables few"],
    [3, 2, 192, 1, "float32", "two haar"],
]


def test_interpreter() -> None:
    """Every pair of layouts, several queries, all options, against float64."""
    script = Path(__file__).with_name("interpret_attend.py")
    errors = json.loads(interpret(str(script), json.dumps(INTERPRETED)).splitlines()[-1])
    assert len(errors) == len(INTERPRETED)
    assert max(errors) < 2e-4, dict(zip(map(str, INTERPRETED), errors, strict=True))


def test_programs_are_shared_out_by_pages() -> None:
    """Heads of any lengths get at most all programs, and no program much more than its share."""
    pytest.importorskip("triton")
    out = interpret(str(Path(__file__).with_name("interpret_schedule.py")))
    lines = [json.loads(line) for line in out.splitlines()]
    cases, schedules = lines[:12], lines[12:]
    for programs, there, chunks in cases:
        assert sum(chunks) <= programs
        assert all((count > 0) == (pages > 0) for count, pages in zip(chunks, there, strict=True))
        most = max(-(-pages // max(count, 1)) for count, pages in zip(chunks, there, strict=True))
        assert most <= -(-sum(there) // (programs - len(there)))
    programs, there, chunks = cases[-1]  # 64 sequences of 8 heads on an H100
    assert set(there) == {31} and set(chunks) == {2}
    assert len(schedules) == 8
    for used, starts, table, programs, bounds in schedules:
        assert [begin for begin, _ in bounds] == [0, *(end for _, end in bounds[:-1])]
        for head, (tokens, start, (begin, end)) in enumerate(zip(used, starts, bounds, strict=True)):
            own = programs[begin:end]
            assert all(program[0] == head for program in own)
            assert [page for _, first, last, _ in own for page in range(first, last)] == [
                *(range(start // 128, -(-(start + tokens) // 128)) if tokens else ())
            ]
            late = [first * 128 < start and last - first > 1 for _, first, last, _ in own]
            read = [program[1] + behind for program, behind in zip(own, late, strict=True)]
            assert [row for *_, row in own] == [table[head][page] for page in read]
        assert all(first == last for _, first, last, _ in programs[bounds[-1][1] :])


FLOATS = {"scale", "softcap", "unit", "turn_factor"}
POINTERS = {
    "start_ptr": "*i32",
    "q_ptr": "*i8",
    "k_ptr": "*i32",
    "v_ptr": "*i32",
    "ks_ptr": "*fp16",
    "vs_ptr": "*fp16",
    "halves_ptr": "*fp16",
    "query_ptr": "*bf16",
    "out_ptr": "*bf16",
    **{f"{run}used_ptr": "*i32" for run in ("", "first_", "recent_")},
    **{f"{run}starts_ptr": "*i32" for run in ("", "first_", "recent_")},
    **{f"{run}_table_ptr": "*i32" for run in ("first", "recent")},
    **{f"{name}_ptr": "*i32" for name in ("lookup", "page_table", "schedule", "programs", "heads")},
    "slots_ptr": "*i64",
    "order_ptr": "*i16",
    "levels_ptr": "*fp16",
    "tables_ptr": "*i32",
    **{f"{side}2_ptr": "*i32" for side in "kv"},
    **{f"{side}2s_ptr": "*fp16" for side in "kv"},
    "means_ptr": "*fp16",
    "sinks_ptr": "*fp16",
    **{f"{run}_{side}_ptr": "*bf16" for run in ("first", "recent") for side in "kv"},
}


def compiled(kernel: Any, constants: dict[str, Any], capability: int, warps: int, stages: int = 3) -> Any:
    """A kernel as machine code for a GPU that need not be here."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source_type: Any = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon import _runtime

        source_type = _runtime.GluonASTSource
    names = kernel.arg_names
    signature = {
        name: "constexpr"
        if name in constants
        else POINTERS.get(name, "*fp32" if name.endswith("_ptr") else "fp32" if name in FLOATS else "i32")
        for name in names
    }
    aligned = [
        index
        for index, name in enumerate(names)
        if name not in constants and name.endswith(("_ptr", "_head", "_page"))
    ]
    source = source_type(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages} | FUSED
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize(
    ("key_bits", "value_bits", "dim", "rows", "capability", "heads"),
    [
        more(4, 4, 128, 8, 80, 0),
        (4, 4, 128, 4, 90, 0),
        (4, 4, 128, 8, 90, 0),
        (3, 3, 128, 4, 90, 0),
        (4, 4, 128, 4, 100, 0),
        more(2, 2, 128, 8, 100, 0),
        more(3, 2, 128, 4, 90, 1),
        more(4, 3, 128, 16, 90, 64),
        (2, 4, 64, 16, 90, 1),
        more(3, 3, 256, 8, 80, 0),
        (3, 3, 256, 8, 90, 64),
        more(4, 3, 256, 8, 100, 0),
        (-2, -2, 128, 4, 80, 0),
        more(-3, -3, 128, 4, 90, 0),
        more(-3, -3, 128, 8, 90, 1),
        more(4, -2, 64, 16, 100, 64),
        (-4, -4, 128, 4, 90, 0),
        more(-4, 3, 64, 8, 80, 64),
        (-3, -3, 256, 4, 90, 0),
        more(-2, -2, 256, 8, 100, 1),
        more(-4, -4, 256, 4, 80, 0),
        more(1, 3, 128, 8, 90, 1),
        (1, 1, 256, 8, 90, 1),
        (8, 4, 128, 8, 80, 0),
        more(8, 3, 128, 8, 90, 1),
        (4.1, 4.1, 128, 4, 90, 0),
        more(3.1, 2.1, 128, 8, 80, 1),
        more(4, 3.1, 64, 16, 100, 0),
        (4, 4, 96, 4, 90, 0),
        (2, 2, 80, 16, 100, 64),
        more(3, 3, 192, 8, 90, 1),
    ],
)
def test_split_kernel_compiles_without_a_gpu(
    heads: int, capability: int, key_bits: float, value_bits: float, dim: int, rows: int
) -> None:
    """On int8 tensor cores; codes go from memory to registers, 3 bits at head_dim 256 by shared memory.

    Negative bits are bit planes, and a tenth more means levels of two bytes.
    """
    pytest.importorskip("triton")
    from quantpress.kernels.attend.split_mma import split_mma_kernel

    fine = {"K_FINE": key_bits != int(key_bits), "V_FINE": value_bits != int(value_bits)}
    form = "lloyd_max" if any(fine.values()) else "int8"
    key_bits, value_bits = int(key_bits), int(value_bits)
    keys, values = (
        ScalarPages(CodecSpec(dim, bits, role, codebook=form)) if bits > 0 else TrellisPages(dim, -bits, role)
        for bits, role in ((key_bits, "key"), (value_bits, "value"))
    )
    halves = steps_of_page(*(codec.kernel_operands() for codec in (keys, values)), rows, heads > 0)
    staged = 3 in (key_bits, value_bits) and (dim > 128 or key_bits == 8)
    planes = -min(key_bits, value_bits)
    if dim == 256:  # four planes are too many
        staged = (staged or planes > 1) and planes < 4
    else:
        staged = staged or planes > 3 or (planes == 3 and rows > 4)
    staged = staged and capability >= 90
    constants = {"D": dim, "DV": dim, "R": max(rows, 8), "ROWS": rows}
    constants |= fine | {"K_BITS": abs(key_bits), "V_BITS": abs(value_bits)}
    constants |= {"K_SIGNS": key_bits < 2, "V_SIGNS": value_bits < 2, "USED": heads > 0}
    constants |= {"HALVES": halves}
    constants |= {
        "CAPPED": capability == 80,
        "CHAINED": capability >= 90,
        "STAGED": staged,
        "HEADS": heads,
        "SCHEDULED": heads == 1,
        "STARTS": heads > 0,
        "PAGE_KEYS": heads == 1,
    }
    opens = key_bits > 2 and dim == 128 and rows <= 8 and capability < 100
    ahead = opens and rows == 4 and not heads
    constants |= {"TILE": tile_tokens(rows, dim), "OPENS": opens, "SHARED": heads == 0, "SLOTS": heads > 0}
    constants |= dict.fromkeys(("HAS_WEIGHT", "HAS_MEAN", "RECENT_USED", "RECENT_STARTS"), True)
    constants |= {"FIRST_USED": heads > 0, "FIRST_STARTS": False, "AHEAD": ahead}
    constants |= {"FIRST_PAGE": heads and 4, "RECENT_PAGE": heads and 128}
    lanes = (rows == 8) * 2 if dim == 128 else dim == 256
    constants |= {"IN_LANES": int(lanes) if capability == 90 and heads == 0 and not ahead else 0}
    constants |= without_second_parts(split_mma_kernel)
    kernel = compiled(split_mma_kernel, constants, capability, 1)
    assert "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32" in kernel.asm["ptx"]
    assert ("griddepcontrol.wait" in kernel.asm["ptx"]) == (capability >= 90)
    if capability >= 90:  # tables of levels and the first codes are on their way before the queries are there
        signal = "griddepcontrol.launch_dependents" if opens else "griddepcontrol.wait"
        before = kernel.asm["ptx"].split(signal)[0]
        codes = re.findall(r"ld\.global\.L1::evict_first\.L2::cache_hint\.v4", before)
        assert (codes or (staged and "cp.async.cg" in before)) and before.count("ld.global.b32") >= 4
    room = STAGED_BYTES - 1024 if staged else 8 * 1024  # else the output's way out
    assert kernel.metadata.shared <= room and PROGRAMS * STAGED_BYTES <= 228 * 1024
    assert ("cp.async" in kernel.asm["ptx"]) == staged
    if staged:  # an empty split's words must not come after the output has taken their place
        assert re.search(r"cp\.async\.wait_group\s+0", kernel.asm["ptx"].rsplit("mma.sync", 1)[1])
    if planes > 3 and capability >= 90:
        assert resources(kernel)["STACK"] <= 64, "registers are spilled"
    if dim == 256 and 0 < planes < 4:
        each = 16 if capability < 100 else 48  # Triton 3.9 spills 368 bytes for 10.0, where 3.7 spills 96
        assert resources(kernel)["STACK"] <= each * rows, "registers are spilled"
    if opens:  # the first codes are on their way before the queries are turned, which takes many shuffles
        code = machine_code(kernel)
        first = code.index("LDG.E.EF")
        assert "SHFL" not in code[code.rindex("EXIT", 0, first) : first]
    if (opens or dim == 96) and rows == 4:
        most = 8 if dim == 128 else 16
        assert resources(kernel)["STACK"] <= most * (key_bits == value_bits == 4), "registers are spilled"
    assert len(kernel.asm["cubin"]) > 0


def without_second_parts(kernel: Any, keys: bool = True, values: bool = True, order: bool = True) -> Any:
    """The constants of the split kernel where keys, or values, are in one part."""
    sides = [side for side, alone in (("k2", keys), ("v2", values)) if alone]
    found = {name: None for name in kernel.arg_names if name[:2] in sides}
    found |= {f"{side.upper()}_BITS": 0 for side in sides} | ({"order_ptr": None} if order else {})
    return found | {"SKETCH": False}


def machine_code(kernel: Any) -> str:
    """Its instructions."""
    import triton

    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def taps(planes: int) -> tuple[float, ...]:
    return sum(FILTERS[planes], ()) if planes else ()


@pytest.mark.parametrize(
    ("capability", "heads", "dim"),
    [(80, 0, 64), (90, 64, 256), (100, 32, 128), more(90, 32, 256), more(90, 0, 96)],
)
def test_kernels_around_it_compile_without_a_gpu(capability: int, heads: int, dim: int) -> None:
    pytest.importorskip("triton")
    from quantpress.kernels.attend.merge.by_matrix import merge_kernel
    from quantpress.kernels.attend.prepare import prepare_kernel
    from quantpress.kernels.attend.schedule_kernel import schedule_kernel
    from quantpress.kernels.score.page_scores import page_scores_kernel

    chained = {"CHAINED": capability >= 90, "R": 8, "DV": dim}
    first = chained | {"D": dim, "TILE": DENSE_TILE, "HAS_WEIGHT": True, "HAS_MEAN": True}
    first |= {"FIRST_USED": True, "RECENT_USED": True, "PLAIN": False, "ALONE": heads == 32}
    first |= {"HALVES": 2 if heads == 0 else 1, "PLANES": heads and 2, "FILTERS": taps(heads and 2)}
    first |= {"FIRST_STARTS": heads == 0, "RECENT_STARTS": True, "SLOTS": heads == 64, "SHARED": heads == 32}
    first |= {"FIRST_PAGE": 4 if heads < 64 else 0, "RECENT_PAGE": 128 if heads < 64 else 0}
    merge = chained | {"HAS_SINKS": True, "HEADS": heads, "STARTS": heads > 0}
    planes = {0: 0, 64: 3, 32: 4}[heads]
    merge["SIZE"] = sums_by_matrix(128 if heads else 1, dim, planes)
    merge |= {"EACH": 4 if heads else 1, "SCHEDULED": heads == 32, "PLANES": planes}
    merge |= {"FILTERS": taps(planes), "PARTIAL": heads == 64}
    schedule = {"HEADS": max(heads, 2), "SIZE": SCHEDULE_TILE, "STARTS": heads == 64}
    means = {"D": dim, "R": 8, "SIZE": PAGES_OF_SCORES, "HAS_WEIGHT": True, "SHARED": heads == 32}
    means |= {"SLOTS": heads == 64, "USED": True, "STARTS": heads > 0, "PAGED": heads > 0}
    kernels = {
        prepare_kernel: first,
        merge_kernel: merge,
        schedule_kernel: schedule,
        page_scores_kernel: means,
    }
    for kernel, constants in kernels.items():
        warps = warps_by_matrix(dim, planes if kernel is merge_kernel else 0)
        binary = compiled(kernel, constants, capability, warps)
        assert len(binary.asm["cubin"]) > 0
        assert binary.metadata.shared <= 99 * 1024  # of consumer GPUs
        if kernel is merge_kernel and planes > 3:
            assert resources(binary)["STACK"] <= (192 if dim > 128 else 0), "registers are spilled"


@pytest.mark.parametrize("page", [0, 128])
def test_the_next_kernel_starts_behind_the_loads(page: int) -> None:
    """Its own, of several MB, would go before them."""
    pytest.importorskip("triton")
    from quantpress.kernels.attend.prepare import prepare_kernel

    constants = {
        "D": 128,
        "DV": 128,
        "R": 8,
        "TILE": DENSE_TILE,
        "HALVES": 1,
        "PLANES": 0,
        "FILTERS": (),
        "PLAIN": False,
        "CHAINED": True,
        "ALONE": False,
    }
    constants |= dict.fromkeys(("HAS_WEIGHT", "HAS_MEAN", "RECENT_USED"), True)
    constants |= dict.fromkeys(("FIRST_USED", "FIRST_STARTS", "RECENT_STARTS", "SLOTS", "SHARED"), False)
    constants |= {"FIRST_PAGE": page and 4, "RECENT_PAGE": page}
    ptx = compiled(prepare_kernel, constants, 90, 4).asm["ptx"]
    query, tokens, rest = ptx.split("griddepcontrol.launch_dependents")
    assert "ld.global" in query and "ld.global" in tokens and "ld.global" not in rest
    matrix = 128 * 128 // (8 * 4 * 32)  # loads of 16 bytes
    assert query.count("ld.global.v4") == matrix, "the rotation"
    assert len(re.findall(r"ld\.global\.b(16|32)", query)) == 3, "query, mean and weights"


def test_tiles_have_as_many_channels_everywhere() -> None:
    """Launches, and kernels in Triton and in Gluon, have a function each for it."""
    pytest.importorskip("triton")
    from quantpress.kernels.attend.words import operand_channels
    from quantpress.kernels.padding import padded
    from quantpress.kernels.rotation_matrix import padded as of_launches

    for dim in range(1, 257):
        assert padded(dim) == of_launches(dim)
        assert not in_tiles(dim) or operand_channels(dim) == of_launches(dim) in HEAD_DIMS


def test_calls_that_are_covered() -> None:
    pages, tail = packed(64, 64, 4), dense(20, 64, 64)
    query = torch.randn(2, KV_HEADS * 3, 1, 64)
    tokens = pages.tokens + 20

    def covered(q: torch.Tensor, segments: list[Segment], visibility: Visibility) -> bool:
        return supports(q, segments, visibility)

    assert covered(query, [pages, tail], Visibility(1, tokens))
    many, room = torch.randn(2, KV_HEADS * 3, 300, 64), dense(300, 64, 64)
    mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool)
    assert covered(many, [pages, room], Visibility(300, pages.tokens + 300))
    assert not covered(many, [pages, tail], Visibility(300, tokens))
    assert not covered(query, [pages, tail], Visibility(1, tokens, mask=mask))
    assert not covered(query, [tail], Visibility(1, 20))
    two = pages.tokens + tokens
    assert covered(query, [tail, pages, packed(64, 64, 2), tail], Visibility(1, two + 20))
    assert not covered(query, [pages, tail, pages], Visibility(1, two))
    assert covered(query, [pages, packed(64, 64, 2.5), tail], Visibility(1, two))
    assert covered(query, [packed(64, 64, 2.5), tail], Visibility(1, tokens))
    assert covered(query, [packed(64, 64, 3, "prod"), tail], Visibility(1, tokens))
    for dim, bits in ((80, 2.5), (80, 4), (8, 1), (36, 8), (256, 3.5)):
        own = torch.randn(2, KV_HEADS * 3, 1, dim)
        assert covered(own, [packed(dim, dim, bits), dense(20, dim, dim)], Visibility(1, tokens))
    assert covered(query, [packed(64, 96, 4), dense(20, 64, 96)], Visibility(1, tokens))
    assert not covered(query, [packed(264, 264, 4), tail], Visibility(1, tokens))
    assert covered(query, [packed(96, 96, 4, page_keys=True), tail], Visibility(1, tokens))
    assert not covered(query, [packed(72, 72, 4, page_keys=True), tail], Visibility(1, tokens))
    assert covered(query, [packed(64, 64, 8), tail], Visibility(1, tokens))
    assert covered(query, [packed(64, 64, 8, codebook="lloyd_max"), tail], Visibility(1, tokens))
    for planes in (1, 2):
        mixed = PackedSegment(packed(64, 64, planes, planes=True).keys, packed(64, 64, 2.5).values)
        assert covered(query, [mixed, tail], Visibility(1, tokens))
    raw = PackedSide(
        RawPages(64), RawPages(64).encode(torch.randn(2, 2, 128, 64), ChannelTransform()), ChannelTransform()
    )
    assert not covered(query, [PackedSegment(raw, raw)], Visibility(1, 128))


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_covered(name: str, dim: int) -> None:
    module: Any = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=2), layer_idx=0)
    settings = TurboQuant.preset(name).layer_settings(module, dim, dim, sink_tokens=4)
    assert settings is not None
    sides = []
    for codec in (settings.key_codec, settings.value_codec):
        sides.append(PackedSide(codec, codec.encode(torch.randn(1, 2, 128, dim), PLAIN), PLAIN))
    assert supports(torch.randn(1, 6, 1, dim), [PackedSegment(*sides)], Visibility(1, 128))


@pytest.mark.parametrize("blocks", [1, 8, 64, 5000])
@pytest.mark.parametrize("pages", [1, 2, 7, 64, 1024])
def test_splits_fill_the_gpu_once(pages: int, blocks: int) -> None:
    splits = split_count(pages, blocks, 1056)
    assert 1 <= splits <= pages
    assert splits == 1 or splits * blocks <= 1056
    bounds = [split * pages // splits for split in range(splits + 1)]  # as the kernels have it
    sizes = {high - low for low, high in pairwise(bounds)}
    assert bounds[-1] == pages and max(sizes) - min(sizes) <= 1


def test_passes_over_queries_are_equally_long() -> None:
    found = [pass_bounds(queries) for queries in (1, 128, 129, 300)]
    assert found == [[0, 1], [0, 128], [0, 64, 129], [0, 100, 200, 300]]


@pytest.mark.parametrize(("rows", "dim", "expected"), [(1, 128, 8), (8, 64, 8), (9, 128, 16), (64, 256, 8)])
def test_rows_of_a_program(rows: int, dim: int, expected: int) -> None:
    assert block_rows(rows, dim) == expected


def on_device(
    batch: int,
    heads: int,
    tokens: int,
    dim: int,
    bits: tuple[int, int],
    size: float = 1.0,
    rotation: str = "hadamard",
    page_keys: bool = False,
) -> PackedSegment:
    """Random packed pages with a mean key, weights, and values of any size, encoded on the GPU.

    Negative bits are those of trellis codes.
    """
    codecs: list[PageCodec] = [
        ScalarPages(CodecSpec(dim, b, r, rotation, page_keys=page_keys and r == "key"))
        if b > 0
        else TrellisPages(dim, -b, r, rotation)
        for b, r in zip(bits, ("key", "value"), strict=True)
    ]
    keys = torch.randn(batch, heads, tokens, dim, device="cuda") + 2 * torch.randn(dim, device="cuda")
    if page_keys:
        keys += torch.randn(batch, heads, tokens // 128, dim, device="cuda").repeat_interleave(128, 2)
    values = size * torch.randn(batch, heads, tokens, dim, device="cuda")
    values[:, :, 5] = 0
    transform = key_statistics(keys, torch.rand(batch, heads, dim, device="cuda") + 0.1, codecs[0].groups)
    plain = ChannelTransform()
    return PackedSegment(
        PackedSide(codecs[0], codecs[0].encode(keys, transform), transform),
        PackedSide(codecs[1], codecs[1].encode(values, plain), plain),
    )


def double_attention(
    query: torch.Tensor, segments: list[Segment], scaling: float, **options: Any
) -> torch.Tensor:
    group = query.shape[1] // 2
    tokens = sum(segment.tokens for segment in segments)
    limit = causal_limit(query.shape[2], tokens).to(query.device)
    repeated = [expand(segment, group) for segment in segments]
    import tests.kernels.attend.test_attend as oracle

    old, oracle.GROUP = oracle.GROUP, 1
    try:
        return exact(query, repeated, limit, scaling, **options)
    finally:
        oracle.GROUP = old


def expand(segment: Segment, group: int) -> DenseSegment:
    """Decoded to float64, one KV head for each query head."""
    if isinstance(segment, DenseSegment):
        keys, values = segment.keys.double(), segment.values.double()
    else:
        sides = (segment.keys, segment.values)
        keys, values = (s.codec.decode(s.planes, s.transform, torch.float64) for s in sides)
    return DenseSegment(keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [128, 384, 8192, 131072])
@pytest.mark.parametrize(
    "bits",
    [(4, 4), (3, 3), (2, 2), (4, 2), (3, 2), (2, 4), (4, 3), (8, 4), (8, 3), (8, 2), (8, 8), (3, 8)],
    ids=lambda b: f"{b[0]}_{b[1]}",
)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_error_on_a_gpu(dim: int, bits: tuple[int, int], tokens: int) -> None:
    """Under 2e-3 of float64 attention on the decoded cache, 3e-3 after rounding to bfloat16."""
    pages = on_device(1, 2, tokens, dim, bits)
    dtypes = (torch.float32, torch.bfloat16)
    for dtype, limit in zip(dtypes, (2e-3, 3e-3), strict=True):
        query = (2 * torch.randn(1, 8, 1, dim, device="cuda")).to(dtype)
        recent = torch.randn(1, 2, 130, dim, device="cuda").to(dtype)
        segments: list[Segment] = [pages, DenseSegment(recent, recent)]
        visibility = Visibility(1, tokens + 130)
        assert supports(query, segments, visibility)
        got = attend(query, segments, visibility, scaling=dim**-0.5)
        expected = double_attention(query, segments, dim**-0.5)
        assert got.dtype == dtype
        assert float((got.double() - expected).norm() / expected.norm()) < limit


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize(
    ("dim", "bits"),
    [
        *((dim, bits) for dim in (80, 96, 192) for bits in ((4, 4), (3, 3), (2, 2))),
        *((48, (4, 4)), (72, (4, 3)), (96, (8, 4)), (112, (2, 8)), (160, (3, 4)), (240, (4, 2))),
    ],
    ids=str,
)
def test_other_head_dims_on_a_gpu(dim: int, bits: tuple[int, int], queries: int) -> None:
    """Channels that do not fill a tile, pages in rows and by table."""
    pages, tokens = on_device(2, 2, 40 * 128, dim, bits), 40 * 128 + 130
    query = (2 * torch.randn(2, 8, queries, dim, device="cuda")).bfloat16()
    recent = torch.randn(2, 2, 130, dim, device="cuda").bfloat16()
    segments: list[Segment] = [pages, DenseSegment(recent, recent)]
    assert supports(query, segments, Visibility(queries, tokens))
    got = attend(query, segments, Visibility(queries, tokens), scaling=dim**-0.5)
    expected = double_attention(query, segments, dim**-0.5)
    assert float((got.double() - expected).norm() / expected.norm()) < 3e-3
    used = torch.full((2, 2), 40 * 128, dtype=torch.int32, device="cuda")
    segments = [side_by_side(pooled(pages, used, 0 * used)), DenseSegment(recent, recent)]
    assert supports(query, segments, Visibility(queries, tokens))
    got = attend(query, segments, Visibility(queries, tokens), scaling=dim**-0.5)
    assert float((got.double() - expected).norm() / expected.norm()) < 3e-3


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("tokens", [128, 384, 8192, 131072])
@pytest.mark.parametrize(
    "bits",
    [
        *((-2, -2), (-3, -3), (-3, -2), (4, -2), (-3, 3), (-4, -4), (-4, -3)),
        *((1, 1), (3, 1), (8, 1), (8, -2), (-3, 8), (4, -4)),
    ],
    ids=lambda b: f"{b[0]}_{b[1]}",
)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_bit_planes_on_a_gpu(dim: int, bits: tuple[int, int], tokens: int, queries: int) -> None:
    pages = on_device(1, 2, tokens, dim, bits)
    query = 2 * torch.randn(1, 8, queries, dim, device="cuda")
    recent = torch.randn(1, 2, 130, dim, device="cuda")
    segments: list[Segment] = [pages, DenseSegment(recent, recent)]
    assert supports(query, segments, Visibility(queries, tokens + 130))
    got = attend(query, segments, Visibility(queries, tokens + 130), scaling=dim**-0.5)
    expected = double_attention(query, segments, dim**-0.5)
    assert float((got.double() - expected).norm() / expected.norm()) < 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [(4, 3), (8, 4)], ids=lambda b: f"{b[0]}_{b[1]}")
@pytest.mark.parametrize("queries", [1, 2, 7, 16, 100, 129, 400])
@pytest.mark.parametrize("group", [1, 3, 4, 8, 32])
def test_groups_and_query_tokens(group: int, queries: int, bits: tuple[int, int]) -> None:
    pages = on_device(2, 2, 1024, 128, bits)
    query = torch.randn(2, 2 * group, queries, 128, device="cuda", dtype=torch.float16)
    tail = 150 if queries < 150 else 437
    first, recent = (torch.randn(2, 2, n, 128, device="cuda", dtype=torch.float16) for n in (4, tail))
    segments: list[Segment] = [DenseSegment(first, first), pages, DenseSegment(recent, recent)]
    sinks = torch.randn(2 * group, device="cuda")
    options: dict[str, Any] = {"softcap": 20.0, "sinks": sinks}
    visibility = Visibility(queries, 1028 + tail)
    assert supports(query, segments, visibility)
    got = attend(query, segments, visibility, scaling=0.1, **options)
    expected = double_attention(query, segments, 0.1, **options)
    assert float((got.double() - expected).norm() / expected.norm()) < 2.5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 7, 200])
@pytest.mark.parametrize(
    ("demoted", "others"),
    [((2, 2), (4, 4)), ((1, 1), (3, 3)), ((-2, 3), (4, 2)), ((-1, -1), (-3, -1))],
    ids=lambda bits: f"{bits[0]}_{bits[1]}",
)
def test_two_packed_segments_on_a_gpu(
    demoted: tuple[int, int], others: tuple[int, int], queries: int
) -> None:
    """In a graph, replayed with other queries."""
    pages = on_device(2, 2, 40 * 128, 128, others), on_device(2, 2, 9 * 128, 128, demoted)
    query = torch.randn(2, 8, queries, 128, device="cuda", dtype=torch.float16)
    first, recent = (torch.randn(2, 2, n, 128, device="cuda", dtype=torch.float16) for n in (4, 250))
    segments: list[Segment] = [DenseSegment(first, first), *pages, DenseSegment(recent, recent)]
    visibility = Visibility(queries, 49 * 128 + 254)
    options: dict[str, Any] = {"scaling": 0.1, "sinks": torch.randn(8, device="cuda")}
    assert supports(query, segments, visibility)
    attend(query, segments, visibility, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attend(query, segments, visibility, **options)
    query.normal_()
    graph.replay()
    expected = double_attention(query, segments, **options)
    assert float((got.double() - expected).norm() / expected.norm()) < 3e-3


def unused(tokens: int, starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Which tokens are not in use: [B, Hkv, tokens]."""
    token = torch.arange(tokens, device=starts.device)
    return (token < starts.unsqueeze(-1)) | (token >= (starts + lengths).unsqueeze(-1))


@pytest.mark.gpu
@pytest.mark.parametrize("page_keys", [False, True])
@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize(
    "bits", [(4, 4), (3, 3), (2, 2), (4, 2), (-2, -3), (8, 4), (8, 3)], ids=lambda b: f"{b[0]}_{b[1]}"
)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_pages_by_table_on_a_gpu(dim: int, bits: tuple[int, int], queries: int, page_keys: bool) -> None:
    """Single pages anywhere in a pool, heads of very different lengths, tokens in use from any place on."""
    if min(bits) < 0 and page_keys:
        pytest.skip("trellis codes store no keys of pages")
    pages = on_device(2, 3, 64 * 128, dim, bits, page_keys=page_keys)
    recent = torch.randn(2, 3, 200, dim, device="cuda", dtype=torch.float16)
    lengths = torch.tensor([[5000, 128, 0], [1, 8192, 3333]], dtype=torch.int32, device="cuda")
    begins = torch.tensor([[0, 77, 3], [150, 1, 193]], dtype=torch.int32, device="cuda")
    starts = 64 * 128 - lengths
    query = torch.randn(2, 12, queries, dim, device="cuda", dtype=torch.float16)
    dropped = torch.cat([unused(64 * 128, starts, lengths), unused(200, begins, 200 - begins)], -1)
    segments: list[Segment] = [
        side_by_side(pooled(pages, lengths, starts)),
        DenseSegment(recent, recent, 200 - begins, begins),
    ]
    visibility = Visibility(queries, 64 * 128 + 200)
    assert supports(query, segments, visibility)
    got = attend(query, segments, visibility, scaling=dim**-0.5)
    whole = Visibility(queries, 64 * 128 + 200, dropped=dropped)
    plain: list[Segment] = [pages, DenseSegment(recent, recent)]
    expected = attend_reference(query.double(), plain, whole, scaling=dim**-0.5)
    assert float((got.double() - expected).norm() / expected.norm()) < 2.5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("batch", [1, 40])
def test_a_schedule_made_before_give_the_same_on_a_gpu(batch: int, queries: int) -> None:
    pages = on_device(batch, 3, 20 * 128, 128, (3, 4))
    lengths = torch.randint(20 * 128 + 1, (batch, 3), dtype=torch.int32, device="cuda")
    lengths[0, 1] = 0
    found = pooled(pages, lengths, 0 * lengths)
    assert found.table is not None
    out = PageSchedule.empty(batch * 3, schedule_programs(found.table), found.device)
    recent = torch.randn(batch, 3, 40, 128, device="cuda", dtype=torch.float16)
    query = torch.randn(batch, 12, queries, 128, device="cuda", dtype=torch.float16)
    visibility = Visibility(queries, 20 * 128 + 40)
    starts = torch.minimum(torch.full_like(lengths, 4), 20 * 128 - lengths)
    for begins in (None, starts):
        schedule = page_schedule(lengths, found.table, begins, out)
        assert schedule is out
        pairs = (replace(found, starts=begins, schedule=one) for one in (schedule, None))
        got, expected = (
            attend(query, [one, DenseSegment(recent, recent)], visibility, scaling=0.1) for one in pairs
        )
        least = 2.0**-10 * expected.abs().max()  # the sums are joined in another order, then rounded
        assert (got - expected).abs().max() <= least
    with pytest.raises(InvalidInputError, match="the schedule to write is for"):
        page_schedule(lengths, found.table, None, PageSchedule.empty(1, 2, found.device))


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_keys_of_pages_on_a_gpu(softcap: float | None) -> None:
    pages = on_device(2, 2, 40 * 128, 128, (3, 4), page_keys=True)
    query = torch.randn(2, 8, 5, 128, device="cuda", dtype=torch.bfloat16)
    recent = torch.randn(2, 2, 40, 128, device="cuda", dtype=torch.bfloat16)
    segments: list[Segment] = [pages, DenseSegment(recent, recent)]
    assert supports(query, segments, Visibility(5, 41 * 128 - 88))
    got = attend(query, segments, Visibility(5, 41 * 128 - 88), scaling=0.1, softcap=softcap)
    expected = double_attention(query, segments, 0.1, softcap=softcap)
    assert float((got.double() - expected).norm() / expected.norm()) < 3e-3


@pytest.mark.gpu
@pytest.mark.parametrize("rotation", ["haar", "identity"])
def test_other_rotations_on_a_gpu(rotation: str) -> None:
    pages = on_device(1, 2, 2048, 128, (4, 3), rotation=rotation)
    query = torch.randn(1, 8, 3, 128, device="cuda")
    recent = torch.randn(1, 2, 40, 128, device="cuda")
    segments: list[Segment] = [pages, DenseSegment(recent, recent)]
    assert supports(query, segments, Visibility(3, 2088))
    got = attend(query, segments, Visibility(3, 2088), scaling=0.1)
    expected = double_attention(query, segments, 0.1)
    assert float((got - expected).norm() / expected.norm()) < 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1e-6, 1e-3, 300.0])
def test_values_of_any_size(size: float) -> None:
    pages = on_device(1, 2, 2048, 128, (4, 4), size)
    query = torch.randn(1, 8, 1, 128, device="cuda")
    got = attend(query, [pages], Visibility(1, 2048), scaling=0.1)
    expected = attend_reference(query, [pages], Visibility(1, 2048), scaling=0.1)
    assert float((got - expected).norm() / expected.norm()) < 2e-3


@pytest.mark.gpu
def test_one_graph_for_all_lengths() -> None:
    """A captured call reads lengths from the device: what changes between replays counts."""
    pages = on_device(1, 2, 2048, 128, (4, 4))
    recent = torch.randn(1, 2, 256, 128, device="cuda", dtype=torch.bfloat16)
    used, newest = (torch.zeros(1, 2, dtype=torch.int32, device="cuda") for _ in range(2))
    query = torch.randn(1, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
    segments: list[Segment] = [
        PackedSegment(pages.keys, pages.values, used),
        DenseSegment(recent, recent, newest),
    ]

    def step() -> torch.Tensor:
        return attend(query, segments, Visibility(1, 2048 + 256), scaling=0.1)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for packed_tokens, recent_tokens in ((2048, 256), (256, 1), (300, 77), (2048, 0)):
        used.fill_(packed_tokens)
        newest.fill_(recent_tokens)
        recent[:, :, recent_tokens:] = math.nan
        graph.replay()
        recent[:, :, recent_tokens:] = 0
        keys, values = (
            s.codec.decode(s.planes, s.transform, torch.float64) for s in (pages.keys, pages.values)
        )
        tail = recent[:, :, :recent_tokens].double()
        whole = DenseSegment(
            torch.cat([keys[:, :, :packed_tokens], tail], 2),
            torch.cat([values[:, :, :packed_tokens], tail], 2),
        )
        expected = double_attention(query, [whole], 0.1)
        assert float((out.double() - expected).norm() / expected.norm()) < 3e-3
        recent.normal_()
