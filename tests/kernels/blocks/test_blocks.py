"""Writes to an engine's memory: plain PyTorch, the kernels in the interpreter, compiled, and on a GPU."""

import re
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from quantpress.codecs.raw import RawPages
from quantpress.codecs.scalar import ScalarPages
from quantpress.errors import InvalidInputError
from quantpress.kernels.blocks import BlockSide, TokenTarget, decode_blocks, pack_blocks, put_tokens
from quantpress.kernels.blocks.reference import pack_blocks_reference, put_tokens_reference
from quantpress.kernels.encode.reference import encode_pages_reference
from quantpress.kernels.layout import page_bytes
from quantpress.quantization.query_moments import QueryMoments
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform
from tests.kernels.interpreter import interpret
from tests.kernels.triton_cases import compile_only, more, resources, vectors

HEADS, BLOCKS = 2, 5
CASES = [(64, 2, 3), (64, 4, 2), (128, 3, 4), (256, 4, 3), (96, 4, 2), (80, 3, 4), (192, 2, 3)]
EMPTY = 0xA5  # bytes of memory that nothing was written to


@dataclass(frozen=True)
class Engine:
    """Blocks in one memory, [BLOCKS, HEADS, bytes]: codes and scales of keys, then those of values."""

    memory: Tensor
    sides: tuple[BlockSide, BlockSide]


def engine(dim: int, bits: tuple[float, float], device: str = "cpu") -> Engine:
    """Pages of keys store two of them, but for a head_dim of 256; queries choose one, but for one of 64."""
    specs = [
        CodecSpec(dim, b, role, scale_dtype="float16", page_keys=role == "key" and dim < 256)
        for b, role in zip(bits, ("key", "value"), strict=True)
    ]
    sizes = [page_bytes(group.bits, group.channels) for spec in specs for group in spec.groups]
    total = sum(sizes) + 256 * len(sizes) + 4 * dim
    memory = torch.full((BLOCKS, HEADS, total), EMPTY, dtype=torch.uint8, device=device)
    at, sides = 0, []
    for spec in specs:
        planes = {}
        for i, group in enumerate(spec.groups):
            size = page_bytes(group.bits, group.channels)
            planes[f"codes{i}"] = memory[..., at : at + size].transpose(0, 1)
            planes[f"scale{i}"] = memory[..., at + size : at + size + 256].view(torch.float16).transpose(0, 1)
            at += size + 256
        if spec.page_keys:
            for name in ("mean0", "sink0"):
                planes[name] = memory[..., at : at + 2 * dim].view(torch.float16).transpose(0, 1)
                at += 2 * dim
        lead = (1, HEADS, dim)
        transform = ChannelTransform()
        if spec.role == "key":
            mean, weight = torch.randn(lead, device=device), torch.rand(lead, device=device) + 0.5
            transform = ChannelTransform(mean, weight)
        queries = None
        if spec.page_keys and dim > 64:
            queries = QueryMoments(*(torch.rand(2, HEADS, 3, dim, device=device) / dim))
        sides.append(BlockSide(ScalarPages(spec), transform, planes, queries))
    return Engine(memory, (sides[0], sides[1]))


def sliding(dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[N, HEADS, 128, dim], page n from token n on, a slice of wider vectors; NaN in tokens 0 and 1."""
    wide = vectors(2 * dim, dtype, tokens=300, heads=HEADS)[0].transpose(0, 1).contiguous()
    wide[:2] = torch.nan
    x = wide[..., dim:]
    steps = (x.stride(0), x.stride(1), x.stride(0), 1)
    return x.as_strided((300 - 127, HEADS, 128, dim), steps, x.storage_offset())


def pages_to_blocks(device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Entries 1 and 4 are not to be written; their pages hold NaN, or are none."""
    pages = torch.tensor([172, 0, 2, 67, -7], dtype=torch.int32, device=device)
    return pages, torch.tensor([3, -1, 1, 4, -1], dtype=torch.int32, device=device)


def one_by_one(x: Tensor, page: int, head: int) -> Tensor:
    return x[page, head].reshape(1, 1, 128, -1)


def test_pages_become_blocks() -> None:
    """Each as if it were encoded alone; everything else in the engine's memory stays."""
    made, (pages, blocks) = engine(64, (3, 2.5)), pages_to_blocks()
    sides = made.sides[0], replace(made.sides[1], transform=ChannelTransform(torch.randn(1, HEADS, 64)))
    keys, values = sliding(64), sliding(64)
    pack_blocks(keys, values, pages, blocks, sides)
    for x, side in zip((keys, values), sides, strict=True):
        for page, block in zip(pages.tolist(), blocks.tolist(), strict=True):
            for head in range(HEADS if block >= 0 else 0):
                own = side.transform.map(lambda part, head=head: part[:, head : head + 1])
                expected = side.codec.encode(one_by_one(x, page, head), own)
                for name, plane in side.planes.items():
                    assert torch.equal(plane[head, block], expected[name][0, 0, 0])
    assert (made.memory[[0, 2]] == EMPTY).all()


def filled(dim: int, bits: tuple[float, float]) -> Engine:
    made, blocks = engine(dim, bits), torch.arange(BLOCKS, dtype=torch.int32)
    pack_blocks_reference(sliding(dim)[2:], sliding(dim)[2:], 20 * blocks, blocks, made.sides)
    return made


def test_blocks_are_decoded() -> None:
    """As pages decoded one at a time; what a product of matrices rounds differs with how many it takes."""
    blocks = torch.tensor([3, 0, 3], dtype=torch.int32)
    for side in filled(64, (3, 2.5)).sides:
        got = decode_blocks(side, blocks, torch.bfloat16)
        assert got.shape == (3 * 128, HEADS, 64) and got.is_contiguous()
        for at, block in enumerate((3, 0, 3)):
            planes = {name: plane[None, :, block : block + 1] for name, plane in side.planes.items()}
            expected = side.codec.decode(planes, side.transform, torch.float32)[0]
            rounding = 2**-8 * expected.abs() + 2**-18 * expected.abs().max()
            assert ((got[128 * at : 128 * (at + 1)].transpose(0, 1) - expected).abs() <= rounding).all()
    with pytest.raises(InvalidInputError, match=r"blocks to decode are torch.int64"):
        decode_blocks(side, blocks.long(), torch.bfloat16)


def test_any_codec() -> None:
    pages, blocks = pages_to_blocks()
    planes = {"raw": torch.zeros(HEADS, BLOCKS, 128, 64, dtype=torch.bfloat16)}
    sides = tuple(BlockSide(RawPages(64), ChannelTransform(), {"raw": planes["raw"].clone()}) for _ in "kv")
    keys, values = sliding(64, torch.bfloat16), sliding(64, torch.bfloat16)
    pack_blocks(keys, values, pages, blocks, (sides[0], sides[1]))
    for x, side in zip((keys, values), sides, strict=True):
        assert torch.equal(side.planes["raw"][:, [3, 1, 4]], x[[172, 2, 67]].transpose(0, 1))
        assert not side.planes["raw"][:, [0, 2]].any()


def targets(dim: int, value_dim: int, device: str = "cpu") -> tuple[Tensor, Tensor, list[TokenTarget]]:
    """Seven tokens of a fused qkv; sinks in pages of 4, keys beside values, and recent pages of 128."""
    qkv = torch.randn(7, 3 * HEADS, max(dim, value_dim), device=device)
    keys, values = qkv[:, HEADS : 2 * HEADS, :dim], qkv[:, 2 * HEADS :, :value_dim]
    sinks = torch.zeros(6, HEADS, 4, dim + value_dim, device=device)
    recent = [torch.zeros(5, HEADS, 128, one, device=device) for one in (dim, value_dim)]
    rows = torch.tensor([[-1, 3, 17, -1, 0, -1, 23], [5, -1, -1, 639, 128, 511, 130]], dtype=torch.int32)
    rows = rows.to(device)
    first = TokenTarget(rows[0], sinks[..., :dim], sinks[..., dim:])
    return keys, values, [first, TokenTarget(rows[1], *recent)]


def check_put_tokens(keys: Tensor, values: Tensor, chosen: list[TokenTarget]) -> None:
    for target in chosen:
        size = target.keys.shape[2]
        for x, pool in ((keys, target.keys), (values, target.values)):
            expected = torch.zeros_like(pool)
            for token, row in enumerate(target.rows.tolist()):
                if row >= 0:
                    expected[row // size, :, row % size] = x[token]
            assert torch.equal(pool, expected)


def test_tokens_are_put() -> None:
    keys, values, chosen = targets(64, 80)
    put_tokens(keys, values, chosen)
    check_put_tokens(keys, values, chosen)
    put_tokens(keys, values, [])
    put_tokens(keys[:0], values[:0], [TokenTarget(chosen[0].rows[:0], chosen[0].keys, chosen[0].values)])


def test_what_does_not_fit_is_refused() -> None:
    keys, values, chosen = targets(64, 80)
    first = chosen[0]
    with pytest.raises(InvalidInputError, match="3 targets; put tokens into at most 2"):
        put_tokens(keys, values, [*chosen, first])
    with pytest.raises(InvalidInputError, match=r"rows are torch.int64 \(7,\); give torch.int32 \[7\]"):
        put_tokens(keys, values, [TokenTarget(first.rows.long(), first.keys, first.values)])
    with pytest.raises(InvalidInputError, match="do not take keys"):
        put_tokens(keys, values, [TokenTarget(first.rows, first.values, first.keys)])
    made, (pages, blocks), x = engine(64, (3, 3)), pages_to_blocks(), sliding(64)
    with pytest.raises(InvalidInputError, match=r"values to pack are .* give floating \[N, Hkv, 128, D\]"):
        pack_blocks(x, x[:, :1], pages, blocks, made.sides)
    with pytest.raises(InvalidInputError, match=r"blocks torch.int64 \(5,\); give torch.int32"):
        pack_blocks(x, x, pages, blocks.long(), made.sides)
    side = made.sides[0]
    with pytest.raises(InvalidInputError, match=r"plane 'scale0' of blocks is torch.float32"):
        replace(side, planes=side.planes | {"scale0": side.planes["scale0"].float()})
    with pytest.raises(InvalidInputError, match=r"the transform's mean is \(2, 2, 64\)"):
        replace(side, transform=side.transform.expanded(2))


def check_pack(dim: int, bits: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    """The kernel against `launch_encode`, bit by bit: with its settings, so that sums come in one order."""
    from quantpress.kernels.blocks.triton_blocks import (
        pack_arguments,
        pack_blocks_triton,
        pack_warps,
        supports_pack,
    )
    from quantpress.kernels.encode.triton_encode import EncodeSettings, launch_encode

    made, (pages, blocks) = engine(dim, bits, device), pages_to_blocks(device)
    keys, values = (sliding(dim, dtype).to(device) for _ in range(2))
    assert supports_pack(keys, values, made.sides)
    pack_blocks_triton(keys, values, pages, blocks, made.sides)
    arguments = pack_arguments(keys, values, pages, blocks, made.sides, device=device == "cuda")
    chosen, places = [172, 2, 67], [3, 1, 4]
    for name, x, side in zip("KV", (keys, values), made.sides, strict=True):
        assert side.spec is not None
        settings = EncodeSettings(pack_warps(arguments), 1, 4, arguments[f"{name}_BK"])
        spec, transform, expected = side.spec, side.transform, dict[str, Tensor]()
        if spec.page_keys:  # as if what is stored were the mean of all keys
            assert transform.mean is not None and transform.weight is not None
            stored = side.planes["mean0"][:, places].transpose(0, 1)
            means = transform.mean + stored.float() / transform.weight
            plain = ChannelTransform(means, transform.weight.expand_as(means))
            without = encode_pages_reference(x[chosen], spec, transform, side.queries)
            assert torch.allclose(stored.float(), without["mean0"][:, :, 0].float(), rtol=2e-3, atol=1e-5)
            sinks = (without["scale0"] < 0).transpose(2, 3)[..., 0]  # [3, Hkv, 128]
            assert bool((sinks.sum(-1) == 1).all())
            expected = {"mean0": stored.unsqueeze(2), "sink0": without["sink0"]}
            spec, transform = replace(spec, page_keys=False), plain
        expected |= launch_encode(x[chosen], spec, transform, settings, direct=False)[0]
        if "sink0" in expected:
            expected["scale0"][:, :, 0][sinks] = -1
        for name, plane in side.planes.items():
            assert torch.equal(plane[:, places], expected[name][:, :, 0].transpose(0, 1)), (dim, bits, name)
    assert (made.memory[[0, 2]] == EMPTY).all()


def test_interpreted() -> None:
    pytest.importorskip("triton")
    assert interpret(__file__).splitlines() == ["put", *map(str, CASES), "large and not finite", "decoded"]


def interpreted() -> None:
    """What `test_interpreted` runs in Triton's interpreter, a line for each check."""
    from quantpress.kernels.blocks import triton_blocks
    from quantpress.kernels.blocks.triton_blocks import pack_blocks_triton, put_tokens_triton

    keys, values, chosen = targets(64, 80)
    put_tokens_triton(keys, values, chosen)
    check_put_tokens(keys, values, chosen)
    keys, values, chosen = targets(80, 64)
    put_tokens_triton(keys, values, chosen[1:])
    check_put_tokens(keys, values, chosen[1:])
    print("put")
    for dim, key_bits, value_bits in CASES:
        triton_blocks.PROGRAMS = 8 if key_bits == 2 else 256  # few: one does several entries
        check_pack(dim, (key_bits, value_bits), torch.float32, "cpu")
        print((dim, key_bits, value_bits))
    made, x = engine(64, (3, 3)), sliding(64)
    x[5, 0] = 1e30
    place = torch.tensor([5, 0], dtype=torch.int32), torch.tensor([1, 2], dtype=torch.int32)
    pack_blocks_triton(x, x, *place, made.sides)
    scale = made.sides[1].planes["scale0"]
    assert (scale[0, 1] == torch.finfo(torch.float16).max).all() and torch.isfinite(scale[0, 2, 2:]).all()
    print("large and not finite")
    for side in (*filled(64, (3, 2.5)).sides, *filled(80, (4, 3)).sides):
        blocks = torch.tensor([3, 0, 3], dtype=torch.int32)
        assert triton_blocks.supports_blocks(side, torch.float32)
        got = triton_blocks.decode_blocks_triton(side, blocks, torch.float32)
        expected = decode_blocks(side, blocks, torch.float32)
        assert got.is_contiguous() and float((got - expected).norm() / expected.norm()) < 1e-6
    print("decoded")


@pytest.mark.parametrize(
    ("dim", "bits", "capability"),
    [
        (64, (4, 2), 80),
        more(128, (4, 3), 100),
        (96, (4, 2), 90),
        more(80, (2, 3), 100),
        more(256, (3, 4), 90),
    ],
    ids=str,
)
def test_compiles(dim: int, bits: tuple[int, int], capability: int) -> None:
    """Within what a program may have of shared memory on consumer GPUs."""
    pytest.importorskip("triton")
    from quantpress.kernels.blocks.triton_blocks import pack_arguments, pack_warps, put_arguments
    from quantpress.kernels.blocks.triton_kernel import pack_blocks_kernel, put_tokens_kernel

    made, (pages, blocks), x = engine(dim, bits), pages_to_blocks(), sliding(dim, torch.bfloat16)
    arguments = pack_arguments(x, x, pages, blocks, made.sides, device=True)
    compiled = compile_only(pack_blocks_kernel, arguments, capability, pack_warps(arguments))
    assert compiled.asm["cubin"] and "trap;" not in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 99 * 1024
    if dim not in (64, 128, 256):
        assert resources(compiled)["STACK"] <= 800, "more registers are spilled than at 128"
    before = re.split(r"\bbra\b", compiled.asm["ptx"], maxsplit=1)[0]
    assert before.count("ld.global") == 1, "nothing but the blocks is read where none is to be written"
    keys, values, chosen = targets(dim, dim)
    assert compile_only(put_tokens_kernel, put_arguments(keys, values, chosen), capability, 4).asm["cubin"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_on_a_gpu(case: tuple[int, int, int], dtype: torch.dtype) -> None:
    dim, *bits = case
    check_pack(dim, (bits[0], bits[1]), dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
def test_blocks_are_decoded_on_a_gpu(dim: int) -> None:
    blocks = torch.tensor([3, 0, 3], dtype=torch.int32)
    made = filled(dim, (3, 4))
    for side in made.sides:
        moved = BlockSide(
            side.codec,
            side.transform.map(lambda part: part.cuda()),
            {name: plane.cuda() for name, plane in side.planes.items()},
        )
        got = decode_blocks(moved, blocks.cuda(), torch.bfloat16).float().cpu()
        expected = decode_blocks(side, blocks, torch.float32)
        assert got.is_contiguous() and float((got - expected).norm() / expected.norm()) < 3e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [128, 96])
def test_one_graph_writes_what_is_asked_for(dim: int) -> None:
    """Rows and blocks are read from the device, and nothing waits for it."""
    keys, values, chosen = targets(dim, dim, "cuda")
    made, x = engine(dim, (4, 3), "cuda"), sliding(dim, torch.bfloat16).to("cuda")
    pages, blocks = pages_to_blocks("cuda")
    rows = [target.rows.clone() for target in chosen]
    raw = BlockSide(RawPages(dim), ChannelTransform(), {"raw": x.new_zeros(HEADS, BLOCKS, 128, dim)})

    def step() -> None:
        put_tokens(keys, values, chosen)
        pack_blocks(x, x, pages, blocks, made.sides)
        pack_blocks(x, x, pages.clamp(min=0), blocks, (raw, raw))

    for target in chosen:
        target.rows.fill_(-1)
    wanted = blocks.clone()
    blocks.fill_(-1)
    step()
    assert (made.memory == EMPTY).all() and not any(target.keys.any() for target in chosen)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for target, row in zip(chosen, rows, strict=True):
        target.rows.copy_(row)
    blocks.copy_(wanted)
    graph.replay()
    check_put_tokens(keys, values, chosen)
    held = made.memory.clone()
    made.memory[1:].fill_(EMPTY)
    pack_blocks_reference(x, x, pages, blocks, made.sides)  # which writes to block 0 what is skipped
    same = (held[1:] == made.memory[1:]).float().mean()
    assert same > 0.999 and torch.equal(raw.planes["raw"][:, 3], x[172])
    fresh = targets(dim, dim, "cuda")[2]
    put_tokens_reference(keys, values, fresh)
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(chosen, fresh, strict=True))


if __name__ == "__main__":
    interpreted()
