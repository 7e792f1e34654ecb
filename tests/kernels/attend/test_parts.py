"""Attention over codes in parts, and over levels that are no bytes."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from quantpress.codecs.protocol import PageCodec
from quantpress.codecs.scalar import ScalarPages
from quantpress.codecs.trellis import TrellisPages
from quantpress.kernels.attend import DenseSegment, PackedSegment, PackedSide, Segment, Visibility, attend
from quantpress.kernels.attend.calls.settings import block_rows
from quantpress.kernels.attend.operands import CodePart, PartOperands, SignOperands
from quantpress.kernels.attend.parts.operands import (
    MOST_LEVELS,
    as_parts,
    half_levels,
    level_rows,
    padded_channels,
    turn_matrix,
)
from quantpress.kernels.attend.reference import attend_reference
from quantpress.kernels.attend.triton_attend import _readable_side as readable_side
from quantpress.kernels.attend.triton_attend import supports
from quantpress.kernels.layout import unpack_pages
from quantpress.kernels.trellis.bit_planes import pack_bit_planes
from quantpress.quantization.codebook import codebook
from quantpress.quantization.rotation import Rotation
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform, key_statistics, value_statistics
from quantpress.quantization.trellis import trellis
from tests.kernels.attend.test_attend import pooled, side_by_side
from tests.kernels.attend.test_triton_attend import compiled, double_attention, unused
from tests.kernels.interpreter import interpret
from tests.kernels.ptx import run_ptx
from tests.kernels.triton_cases import more, resources

CPU = torch.device("cpu")
INTERPRETED = [
    [8, 2, 64, 3, "bfloat16", "lloyd lengths sinks softcap out"],
    [2.25, 3.75, 64, 1, "float32", "haar alone"],
    [2, 4, 64, 3, "float32", "prod pool few side_by_side"],
    [3.5, 2.5, 64, 6, "float32", "pool dense_tables shared sinks_in_pages one_transform side_by_side"],
    [3.5, 4, 64, 1, "float32", "two lengths sinks"],
    [1, 1, 64, 3, "bfloat16", "planes lengths softcap sinks"],
    [2, 1, 64, 1, "float32", "planes pool shared side_by_side"],
    [1, 3, 64, 1, "float32", "planes two alone"],
    [2, 1, 80, 1, "float32", "planes two sinks"],
    [1, 1, 192, 1, "float32", "alone"],
    [3.5, 1, 80, 1, "float32", "pool dense_tables one_transform side_by_side"],
    [3, 2, 36, 3, "float32", "two lengths sinks"],
    [2, 4, 96, 1, "float32", "prod"],
]


def test_interpreter() -> None:
    """Every way of reading parts, against float64; levels that float16 rounds are all that is lost.

    Those that codes of several channels choose ("planes") are 256 or 512 numbers of any size.
    """
    script = Path(__file__).with_name("interpret_attend.py")
    errors = json.loads(interpret(str(script), json.dumps(INTERPRETED)).splitlines()[-1])
    found = dict(zip(map(str, INTERPRETED), errors, strict=True))
    assert max(errors) < 1.5e-3, found
    exact = [error for case, error in found.items() if "lloyd" not in case and "planes" not in case]
    assert max(exact) < 1e-4, found


def operands(bits: float, **options: Any) -> PartOperands:
    found = as_parts(ScalarPages(CodecSpec(64, bits, "key", **options)).kernel_operands())
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("bits", "options"), [(3.5, {}), (2.25, {"rotation": "haar"}), (4, {"estimator": "prod"}), (1, {})]
)
def test_parts_add_up_to_what_is_decoded(bits: float, options: dict[str, Any]) -> None:
    codec = ScalarPages(CodecSpec(64, bits, "key", **options))
    keys = torch.randn(1, 2, 256, 64)
    transform = key_statistics(keys, torch.rand(1, 2, 64), codec.groups, mean=False)
    planes = codec.encode(keys, transform)
    own, at, total = operands(bits, **options), 0, torch.zeros(1, 2, 256, 64, dtype=torch.float64)
    for part in own.parts:
        codes = unpack_pages(planes[part.codes], part.bits, part.channels, "key").flatten(2, 3)
        levels = torch.tensor(part.levels, dtype=torch.float64)[codes.long()]
        scaled = levels * planes[part.scales].flatten(2, 3).double().unsqueeze(-1)
        total += scaled @ own.turn[at : at + part.channels]
        at += part.channels
    expected = codec.decode(planes, transform, torch.float64)
    assert (transform.invert(total) - expected).norm() < 1e-6 * expected.norm()
    padded = turn_matrix(own, CPU)
    assert padded.shape == (sum(map(padded_channels, own.parts)), 64) and padded.dtype == torch.float32


def test_operands_are_equal_by_value() -> None:
    """A codec that makes them anew at each call has the same tables."""
    part, turn = CodePart("codes0", "scale0", 1, 64, (-1.0, 1.0)), torch.eye(64, dtype=torch.float64)
    one, same = (PartOperands((part,), turn.clone()) for _ in range(2))
    assert one == same and hash(one) == hash(same) and turn_matrix(one, CPU) is turn_matrix(same, CPU)
    assert one != PartOperands((part,), 2 * turn) and one != part


@pytest.mark.parametrize(
    ("planes", "lags", "by_signs", "in_parts"),
    [
        *((2, 4, True, True), (4, 2, True, True), (3, 3, True, True), (2, 5, False, False)),
        *((1, 8, False, True), (1, 9, False, False), (4, 3, True, False)),
    ],
)
def test_filters_that_are_read(planes: int, lags: int, by_signs: bool, in_parts: bool) -> None:
    """Others go page by page: int8 kernels have four lags and two planes at least, windows nine bits."""
    operands = SignOperands(Rotation(64), 1.0, ((0.5,) * lags,) * planes)
    assert (as_parts(operands) is not None) == in_parts
    side: Any = SimpleNamespace(
        codec=SimpleNamespace(kernel_operands=lambda: operands), transform=ChannelTransform()
    )
    assert readable_side(side) == by_signs


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_trellis_codes_are_one_part(bits: int) -> None:
    """Levels by windows: bit k * reach + j of a number is bit k of the code j channels back."""
    codec = TrellisPages(64, bits, "key")
    codes = torch.randint(1 << bits, (1, 2, 1, 128, 64), dtype=torch.uint8)
    planes = {"codes0": pack_bit_planes(codes, bits, "key"), "scale0": torch.rand(1, 2, 1, 128)}
    own = as_parts(codec.kernel_operands())
    assert own is not None and as_parts(codec.kernel_operands()) is own
    part = own.parts[0]
    assert len(own.parts) == 1 and part.bits == bits and len(part.levels) == 1 << bits * part.reach
    number = torch.zeros_like(codes, dtype=torch.int64)
    for k in range(bits):
        for j in range(part.reach):
            number |= (codes.long() >> k & 1).roll(j, -1) << k * part.reach + j
    levels = torch.tensor(part.levels, dtype=torch.float64)[number] * planes["scale0"].unsqueeze(-1)
    expected = codec.decode(planes, ChannelTransform(), torch.float64)
    torch.testing.assert_close(levels.flatten(2, 3) @ own.turn, expected, rtol=1e-5, atol=1e-6)
    rows, _ = level_rows(own, own, CPU)
    stored = (len(part.levels) - 1 - number).flatten()  # a stored bit is 1 where the code's is 0
    factor = half_levels(part.levels)[1]
    lost = (rows[0][stored].double() * factor - torch.tensor(part.levels)[number].flatten()).abs()
    assert lost.max() < 5e-4 * max(part.levels)


@pytest.mark.parametrize(("bits", "most"), [(1, 1e-6), (2, 5e-6), (3, 2e-5), (4, 1e-4), (8, 3e-4)])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_levels_lose_little_in_float16(dim: int, bits: int, most: float) -> None:
    exact = torch.tensor(codebook(bits, dim, "lloyd_max").scaled, dtype=torch.float64)
    levels, factor = half_levels(tuple(exact.tolist()))
    assert levels.dtype == torch.float16
    assert (levels.double() * factor - exact).abs().max() < most * exact.max()
    odd = codebook(bits, dim).scaled
    assert half_levels(odd)[1] == 1 and half_levels(odd)[0].tolist() == list(odd)


@pytest.mark.parametrize("form", ["int8", "lloyd_max"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_assembly_looks_levels_up(bits: int, form: str) -> None:
    pytest.importorskip("triton")
    from quantpress.kernels.attend.parts.levels import LOOKUP

    own = operands(bits, codebook=form)
    rows, tables = level_rows(own, own, CPU)
    code = torch.randint(2**bits, (512, 4))
    half = 2 ** (bits - 1)
    picked, sign = code, torch.zeros_like(code)
    if bits in (1, 4):  # magnitude and sign
        picked, sign = torch.where(code < half, half - 1 - code, code - half), (code < half).long()
    spare = torch.randint(2**7, (512, 4))  # other bits where the signs are
    words = [(picked << 4 * torch.arange(4)).sum(1), ((sign << 7 | spare) << 8 * torch.arange(4)).sum(1)]
    inputs = [word.to(torch.int64).numpy().astype(np.uint32) for word in words]
    inputs += [np.full(512, int(word) & 0xFFFFFFFF, np.uint32) for word in tables[2]]
    outputs = run_ptx(str(LOOKUP.value), inputs, 4)
    got = np.stack([word.astype(np.uint16).view(np.float16) for word in outputs], 1)
    assert torch.equal(torch.from_numpy(got), rows[2][code])


@pytest.mark.parametrize(
    ("keys", "values", "bits", "dim", "rows", "capability", "heads"),
    [
        ((128,), (128,), (4, 2), 128, 4, 80, 0),
        ((64, 64), (64, 64), (4, 3, 4, 3), 128, 8, 90, 1),
        more((128, 128), (128,), (3, 1, 3), 128, 8, 90, 0),
        ((32, 96), (128,), (3, 2, 8), 128, 16, 100, 64),
        more((256,), (256,), (1, 4), 256, 8, 100, 0),
        more((128,), (128,), (-1, -1), 128, 4, 90, 0),
        ((64,), (64,), (-3, -1), 64, 8, 100, 1),
        ((64,), (64,), (-2, -4), 64, 16, 80, 64),
        more((48, 48), (96,), (4, 3, 2), 96, 8, 90, 0),
        more((200,), (200,), (4, 3), 200, 8, 100, 1),
    ],
)
def test_kernels_compile_without_a_gpu(
    keys: tuple[int, ...],
    values: tuple[int, ...],
    bits: tuple[int, ...],
    dim: int,
    rows: int,
    capability: int,
    heads: int,
) -> None:
    """Negative bits are those of trellis codes."""
    pytest.importorskip("triton")
    from quantpress.kernels.attend.parts.merge import merge_parts_kernel
    from quantpress.kernels.attend.parts.queries import turn_queries_kernel
    from quantpress.kernels.attend.parts.split import split_parts_kernel

    channels = dict(zip(("K", "K2", "V", "V2"), (*keys, 0)[:2] + (*values, 0)[:2], strict=True))
    given = iter(bits)
    split: dict[str, Any] = dict(channels)
    widths = {name: next(given) if own else 0 for name, own in channels.items()}
    split |= {f"{name}_BITS": abs(width) for name, width in widths.items()}
    split |= {f"{name}_REACH": trellis(-widths[name]).reach if widths[name] < 0 else 0 for name in "KV"}
    windows = min(widths.values()) < 0
    padded = {f"{name}P": own and max(32, 1 << (own - 1).bit_length()) for name, own in channels.items()}
    division = {"STARTS": heads > 0, "HEADS": heads, "SCHEDULED": heads == 1}
    split |= padded | division | {"R": block_rows(rows, dim), "USED": heads > 0, "PLAIN": False}
    split["LEVELS"] = MOST_LEVELS
    kernel = compiled(split_parts_kernel, split, capability, len(values) * (1 + (dim > 128)), 1)
    assert "mma" in kernel.asm["ptx"] and (windows or "prmt.b32" in kernel.asm["ptx"])
    assert kernel.metadata.shared <= 99 * 1024 and len(kernel.asm["cubin"]) > 0
    if dim == 128 and rows <= 8:
        assert resources(kernel)["STACK"] <= 16, "registers are spilled"
    if len(values) == 2:  # six programs of two warps a multiprocessor
        assert resources(kernel)["REG"] <= 168
    shared = {"ORDERED": len(keys) > 1, "SHARED": heads == 64, "SLOTS": heads == 1}
    queries = shared | {"D": dim, "SIZE": 32, "HAS_WEIGHT": True, "HAS_MEAN": heads > 0}
    merge = shared | division | {"DV": dim, "V": padded["VP"], "V2": padded["V2P"], "R": 8, "SIZE": 32}
    merge |= {"HAS_SINKS": heads == 0, "PARTIAL": heads == 64}
    for other, constants in ((turn_queries_kernel, queries), (merge_parts_kernel, merge)):
        binary = compiled(other, constants, capability, 4 if other is turn_queries_kernel else 8)
        assert binary.metadata.shared <= 99 * 1024 and len(binary.asm["cubin"]) > 0


SIDES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "paper": ({"bits": 4, "codebook": "lloyd_max", "rotation": "haar", "scale": "norm"},) * 2,
    "lloyd_3_2": ({"bits": 3, "codebook": "lloyd_max"}, {"bits": 2, "codebook": "lloyd_max"}),
    "lloyd_8_8": ({"bits": 8, "codebook": "lloyd_max"},) * 2,
    "3.5": ({"bits": 3.5},) * 2,
    "2.5_1.5": ({"bits": 2.5}, {"bits": 1.5}),
    "prod_4_2.5": ({"bits": 4, "estimator": "prod"}, {"bits": 2.5}),
    "1.25_2.75": ({"bits": 1.25}, {"bits": 2.75}),
    "4_3.5": ({"bits": 4}, {"bits": 3.5}),
    "prod_4_3": ({"bits": 4, "estimator": "prod"}, {"bits": 3}),
    "prod_2_lloyd_4": ({"bits": 2, "estimator": "prod"}, {"bits": 4, "codebook": "lloyd_max"}),
    "1": ({"bits": 1},) * 2,
    "trellis_1": ({"bits": -1},) * 2,
    "trellis_3_1": ({"bits": -3}, {"bits": -1}),
    "trellis_1_4": ({"bits": -1}, {"bits": -4}),
    "8_trellis_1": ({"bits": 8}, {"bits": -1}),
}
"""Negative bits are those of trellis codes."""


def codec_of(dim: int, role: str, bits: float, **own: Any) -> PageCodec:
    if bits < 0:
        return TrellisPages(dim, -int(bits), role)
    return ScalarPages(CodecSpec(dim, bits, role, **own))


def on_device(name: str, dim: int, shape: tuple[int, int, int], size: float = 1.0) -> PackedSegment:
    """Packed pages with mean, weights and an order of channels, encoded on the GPU; shape: B, Hkv, T."""
    key, value = (codec_of(dim, role, **own) for role, own in zip(("key", "value"), SIDES[name], strict=True))
    keys = torch.randn(*shape, dim, device="cuda") * torch.rand(dim, device="cuda").exp()
    keys += 2 * torch.randn(dim, device="cuda")
    values = size * torch.randn(*shape, dim, device="cuda") * torch.rand(dim, device="cuda").exp()
    values[:, :, 5] = 0
    moment = torch.rand(*shape[:2], dim, device="cuda") + 0.1
    transforms = key_statistics(keys, moment, key.groups), value_statistics(values, value.groups)
    return PackedSegment(
        PackedSide(key, key.encode(keys, transforms[0]), transforms[0]),
        PackedSide(value, value.encode(values, transforms[1]), transforms[1]),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [128, 384, 8192, 131072])
@pytest.mark.parametrize("name", SIDES)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_error_on_a_gpu(dim: int, name: str, tokens: int) -> None:
    """Levels of 8 bits, and of trellis codes, are rounded to float16.

    A score s is then off by up to 2**-11 s, here 2e-3.
    """
    pages = on_device(name, dim, (1, 2, tokens))
    rounded = name == "lloyd_8_8" or "trellis" in name
    for dtype, limit in ((torch.float32, 2e-3 if rounded else 1e-3), (torch.bfloat16, 3e-3)):
        query = (2 * torch.randn(1, 8, 1, dim, device="cuda")).to(dtype)
        recent = torch.randn(1, 2, 130, dim, device="cuda").to(dtype)
        segments: list[Segment] = [pages, DenseSegment(recent, recent)]
        assert supports(query, segments, Visibility(1, tokens + 130))
        got = attend(query, segments, Visibility(1, tokens + 130), scaling=dim**-0.5)
        expected = double_attention(query, segments, dim**-0.5)
        assert got.dtype == dtype
        assert float((got.double() - expected).norm() / expected.norm()) < limit


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dim", "name"),
    [
        (96, "3.5"),
        (96, "trellis_3_1"),
        (80, "prod_4_3"),
        (192, "2.5_1.5"),
        (96, "paper"),
        (72, "1"),
        (40, "4_3.5"),
    ],
)
def test_other_head_dims_on_a_gpu(dim: int, name: str) -> None:
    pages = on_device(name, dim, (1, 2, 8192))
    query = (2 * torch.randn(1, 8, 5, dim, device="cuda")).bfloat16()
    recent = torch.randn(1, 2, 130, dim, device="cuda").bfloat16()
    segments: list[Segment] = [pages, DenseSegment(recent, recent)]
    assert supports(query, segments, Visibility(5, 8192 + 130))
    got = attend(query, segments, Visibility(5, 8192 + 130), scaling=dim**-0.5)
    expected = double_attention(query, segments, dim**-0.5)
    assert float((got.double() - expected).norm() / expected.norm()) < 3e-3


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["3.5", "prod_4_3", "trellis_3_1"])
@pytest.mark.parametrize("queries", [1, 7, 129])
@pytest.mark.parametrize("group", [1, 4, 32])
def test_groups_and_query_tokens(group: int, queries: int, name: str) -> None:
    """In a graph, replayed with other queries; beside pages of another kind."""
    pages = on_device(name, 128, (2, 2, 1024)), on_device("lloyd_3_2", 128, (2, 2, 384))
    query = torch.randn(2, 2 * group, queries, 128, device="cuda", dtype=torch.float16)
    first, recent = (torch.randn(2, 2, n, 128, device="cuda", dtype=torch.float16) for n in (4, 150))
    segments: list[Segment] = [DenseSegment(first, first), *pages, DenseSegment(recent, recent)]
    options: dict[str, Any] = {"softcap": 20.0, "sinks": torch.randn(2 * group, device="cuda")}
    visibility = Visibility(queries, 1408 + 154)
    assert supports(query, segments, visibility)
    attend(query, segments, visibility, scaling=0.1, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attend(query, segments, visibility, scaling=0.1, **options)
    query.normal_()
    graph.replay()
    expected = double_attention(query, segments, 0.1, **options)
    assert float((got.double() - expected).norm() / expected.norm()) < 2.5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("name", ["paper", "3.5", "1.25_2.75", "prod_2_lloyd_4", "trellis_3_1"])
def test_pages_by_table_on_a_gpu(name: str, queries: int) -> None:
    pages = on_device(name, 128, (2, 3, 64 * 128))
    recent = torch.randn(2, 3, 200, 128, device="cuda", dtype=torch.float16)
    lengths = torch.tensor([[5000, 128, 0], [1, 8192, 3333]], dtype=torch.int32, device="cuda")
    begins = torch.tensor([[0, 77, 3], [150, 1, 193]], dtype=torch.int32, device="cuda")
    starts = 64 * 128 - lengths
    query = torch.randn(2, 12, queries, 128, device="cuda", dtype=torch.float16)
    dropped = torch.cat([unused(64 * 128, starts, lengths), unused(200, begins, 200 - begins)], -1)
    segments: list[Segment] = [
        side_by_side(pooled(pages, lengths, starts)),
        DenseSegment(recent, recent, 200 - begins, begins),
    ]
    visibility = Visibility(queries, 64 * 128 + 200)
    assert supports(query, segments, visibility)
    got = attend(query, segments, visibility, scaling=128**-0.5)
    whole = Visibility(queries, 64 * 128 + 200, dropped=dropped)
    plain: list[Segment] = [pages, DenseSegment(recent, recent)]
    expected = attend_reference(query.double(), plain, whole, scaling=128**-0.5)
    assert float((got.double() - expected).norm() / expected.norm()) < 2.5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1e-6, 1e-3, 300.0])
def test_values_of_any_size(size: float) -> None:
    pages = on_device("3.5", 128, (1, 2, 2048), size)
    query = torch.randn(1, 8, 1, 128, device="cuda")
    got = attend(query, [pages], Visibility(1, 2048), scaling=0.1)
    expected = attend_reference(query, [pages], Visibility(1, 2048), scaling=0.1)
    assert float((got - expected).norm() / expected.norm()) < 1e-3
