"""The Hopper encode kernel: its assembly in numpy, compiled without a GPU, and on a GPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from quantpress.errors import NonFiniteError
from quantpress.kernels.available import HOPPER
from quantpress.kernels.encode import hopper_encode
from quantpress.kernels.encode.octets import (
    FACTOR,
    STEP_BITS,
    centre,
    gather_assembly,
    octet_assembly,
    octet_table,
    steepness,
    zero_fields,
)
from quantpress.kernels.layout import PAGE_TOKENS, page_bytes
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform
from tests.kernels.attend.emulate_gluon import emulate
from tests.kernels.encode.test_triton_encode import on_gpu
from tests.kernels.ptx import Words, run_ptx
from tests.kernels.triton_cases import NEAR_TIE, check, compile_only, resources, transform_of, vectors

pytest.importorskip("triton")

BITS = (2, 3, 4)
ROLES = ("key", "value")
PLAIN = ChannelTransform()
DTYPES = (torch.bfloat16, torch.float16)


def codes_of(unit: torch.Tensor, spec: CodecSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """The code of each coordinate, and whether it is one of two at a tie."""
    thresholds = torch.tensor(spec.codebook_of(0).thresholds, dtype=torch.float64)
    unit = unit.double()
    return torch.searchsorted(thresholds, unit), (unit[..., None] - thresholds).abs().amin(-1) < NEAR_TIE


def octets(spec: CodecSpec, y: torch.Tensor) -> tuple[Words, torch.Tensor, torch.Tensor]:
    """The assembly on y[n, h, i], each row part of a vector of 32 rows as long.

    Returns:
        The words [n], the sums [n, h] in float64 and the unit coordinates y / norm.
    """
    book, values = spec.codebook_of(0), spec.role == "value"
    norm = y.norm(dim=-1, keepdim=True) * 32**0.5
    over = 1 / norm.masked_fill(norm == 0, 1)
    zeros = torch.tensor(zero_fields(spec.groups[0].bits, values))
    zero = (torch.where(norm.squeeze(-1) == 0, zeros, 0)).sum(-1).to(torch.int32)
    steep = over * steepness(book, values)
    inputs = y if book.bits == 2 else y * steep + centre(book, values)
    word, sums = assembled(spec, torch.cat((inputs.flatten(1), steep.squeeze(-1)), 1), zero)
    return word, sums, y * over


def assembled(
    spec: CodecSpec, inputs: torch.Tensor, zero: torch.Tensor | None = None
) -> tuple[Words, torch.Tensor]:
    """The assembly on its first ten inputs [n, 10]: the words [n], the sums [n, h] in float64."""
    book, values = spec.codebook_of(0), spec.role == "value"
    zero = torch.zeros(len(inputs), dtype=torch.int32) if zero is None else zero
    table = torch.tensor(octet_table(book, values), dtype=torch.int32).expand(len(inputs), 5)
    every = torch.cat((inputs.float().view(torch.int32), zero[:, None], table), 1).T.contiguous()
    word, *sums = run_ptx(octet_assembly(book, values), list(every.numpy().view(np.uint32)), 3)
    floats = values and book.bits == 2
    added = np.stack([part.view(np.float32) if floats else part for part in sums], 1).astype(np.float64)
    return word, torch.from_numpy(added)


def codes_in(word: Words, spec: CodecSpec) -> torch.Tensor:
    """[n, h, i] codes in the assembly's words [n]."""
    bits, (row, column) = spec.groups[0].bits, (torch.arange(2)[:, None], torch.arange(4))
    shift = 8 * column + 4 * row if spec.role == "value" else 16 * row + 4 * column
    sign_at = 8 * column + 7 - 4 * row  # where a page has it, of keys too
    return fields(torch.from_numpy(word.astype(np.int64))[:, None, None], shift, sign_at, bits)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", [3, 4])
def test_every_number_of_units_rounds_to_its_level(bits: int, role: str) -> None:
    """All that a unit vector may have, just above each whole number and just below."""
    spec = CodecSpec(128, bits, role)
    book = spec.codebook_of(0)
    most = round(1 / book.unit) + 2
    units = torch.arange(-most, most).double()[:, None] + torch.tensor([1e-3, 0.3, 0.7, 1 - 1e-3])
    units = units.view(-1, 2, 4)
    inputs = units * (book.unit * steepness(book, role == "value")) + centre(book, role == "value")
    word, _ = assembled(spec, torch.cat((inputs.flatten(1), torch.ones(len(units), 2)), 1))
    thresholds = torch.tensor(book.thresholds, dtype=torch.float64)
    assert (codes_in(word, spec) == torch.searchsorted(thresholds, units * book.unit)).all()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", BITS)
def test_eight_coordinates_in_assembly(bits: int, role: str) -> None:
    """Fields and sums are those of the levels, whatever the vector's length."""
    spec = CodecSpec(128, bits, role)
    book, values = spec.codebook_of(0), role == "value"
    length = torch.rand(4096, 2, 1).mul(60).exp2() if values else torch.rand(4096, 2, 1).mul(8).exp2()
    y = torch.randn(4096, 2, 4).mul(length * (2.0**-10 if values and bits == 2 else 1.0)).float()
    y[5, 0], y[6, 1], y[7] = 0, 0, 0
    word, sums, unit = octets(spec, y)
    codes, tie = codes_of(unit, spec)
    got = codes_in(word, spec)
    assert ((got == codes) | tie).all() and tie.float().mean() < 1e-3
    assert all((got[at] == 2 ** (bits - 1) - 1).all() for at in ((5, 0), (6, 1), 7)), "zero vectors"
    levels = torch.tensor(book.scaled, dtype=torch.float64)[got]
    if values and bits > 2:
        steps = unit.double().abs() * (2 ** STEP_BITS[bits] / book.unit)
        levels, half = levels.abs() * steps.sub(0.5).clamp(min=0), levels.abs().sum(-1) / 2
        assert ((sums - levels.sum(-1)).abs() <= 1.01 * half).all()
        return
    levels = levels * y * FACTOR * 2.0**-149 if values else levels.square()
    torch.testing.assert_close(sums, levels.sum(-1), rtol=1e-6, atol=0)


def fields(word: torch.Tensor, shift: torch.Tensor, sign_at: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes out of a nibble at `shift` of a word, the sign of 4 bits at `sign_at`."""
    if bits < 4:
        return word >> shift & (2**bits - 1)
    magnitude = word >> shift & 7
    return torch.where((word >> sign_at & 1) == 1, 7 - magnitude, 8 + magnitude)


@pytest.mark.parametrize("bits", BITS)
def test_lanes_join_the_words_of_values(bits: int) -> None:
    """Four lanes, tokens of two parts, each with four channels: a channel's word is as the layout says."""
    spec = CodecSpec(128, bits, "value")
    y = torch.randn(1000, 4, 2, 4) * 2.0**-20  # [n, lane, part, channel]
    lanes = [octets(spec, y[:, lane])[0] for lane in range(4)]
    unit = torch.stack([octets(spec, y[:, lane])[2] for lane in range(4)], 1)
    words = np.stack(run_ptx(gather_assembly(bits), lanes, 4), -1).astype(np.int64)  # [n, channel]
    codes, tie = codes_of(unit, spec)
    lane, part = torch.arange(4)[:, None, None], torch.arange(2)[:, None]
    word = torch.from_numpy(words)[:, None, None, :]
    got = fields(word, 16 * part + 4 * lane, 8 * lane + 7 - 4 * part, bits)
    assert ((got == codes) | tie).all()


def in_bfloat16(transform: ChannelTransform) -> ChannelTransform:
    """With weights as caches have them."""
    assert transform.weight is not None
    return replace(transform, weight=transform.weight.to(torch.bfloat16).float())


def emulated(
    x: torch.Tensor, spec: CodecSpec, transform: ChannelTransform
) -> tuple[dict[str, torch.Tensor], int]:
    """Planes and flag of the kernel's own source, run by two programs a head: all but registers' layouts."""
    from quantpress.kernels.encode import hopper_kernel

    planes, flag = planes_for(x, spec), torch.zeros(1, dtype=torch.int32)
    arguments = hopper_encode.hopper_arguments(x, spec, transform, planes, flag)
    arguments["turn"] = 0  # odd heads' programs the other way round
    emulate(hopper_kernel, "encode_hopper_kernel", arguments, (2, x.shape[0] * x.shape[1]))
    return planes, int(flag)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("bits", "dtype"), [(4, torch.float16), *((bits, torch.bfloat16) for bits in BITS)], ids=str
)
def test_emulated(bits: int, dtype: torch.dtype, role: str) -> None:
    spec, x = CodecSpec(128, bits, role), torch.randn(1, 2, 3 * PAGE_TOKENS + 1, 128).to(dtype)[:, :, 1:]
    x[0, 1, 7] = 0
    transforms = [transform_of(spec), in_bfloat16(transform_of(spec))] if role == "key" else [PLAIN]
    for transform in transforms:
        planes, flag = emulated(x, spec, transform)
        assert flag == 0
        check(planes, x, spec, transform)


@pytest.mark.parametrize(
    ("role", "bits", "weight", "inside", "outside"),
    [
        ("key", 4, 1.0, (-7, 45), (-9, 55)),
        ("key", 4, 1.0 + 2.0**-12, (-7, 11), (-9, 17)),  # not in bfloat16
        ("value", 2, None, (-51, 21), (-57, 26)),
        ("value", 4, None, (-45, 31), (-49, 35)),
    ],
)
def test_emulated_lengths(
    role: str, bits: int, weight: float | None, inside: tuple[int, ...], outside: tuple[int, ...]
) -> None:
    """Right up to where the flag is raised."""
    spec = CodecSpec(128, bits, role, scale_dtype="float32")
    transform = PLAIN if weight is None else ChannelTransform(weight=torch.full((1, 1, 128), weight))
    for power in (*inside, *outside):
        x = torch.randn(1, 1, PAGE_TOKENS, 128).bfloat16()
        x[0, 0, 77] *= 2.0**power
        planes, flag = emulated(x, spec, transform)
        assert flag == (2 if power in outside else 0), power
        if not flag:
            check(planes, x, spec, transform)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(("ratio", "flagged"), [(1000.0, False), (10000.0, True)])
def test_emulated_means_and_weights(ratio: float, flagged: bool, rounded: bool) -> None:
    """Of a model with large biases of keys; weights that differ too much are left to the other kernel."""
    spec = CodecSpec(128, 4, "key")
    mean, weight = torch.randn(1, 1, 128), torch.rand(1, 1, 128) + 0.5
    mean[0, 0, 5:9], weight[0, 0, 77] = 300, 1.0 / ratio
    transform = ChannelTransform(mean, weight)
    transform = in_bfloat16(transform) if rounded else transform
    x = (torch.randn(1, 1, PAGE_TOKENS, 128) + mean[:, :, None]).bfloat16()
    planes, flag = emulated(x, spec, transform)
    assert flag == (2 if flagged else 0)
    if not flagged:
        check(planes, x, spec, transform)


def planes_for(x: torch.Tensor, spec: CodecSpec) -> dict[str, torch.Tensor]:
    """Planes that hold rubbish."""
    lead = (*x.shape[:2], x.shape[2] // PAGE_TOKENS)
    codes = torch.full((*lead, page_bytes(spec.groups[0].bits, 128)), 0xA5, dtype=torch.uint8)
    return {"codes0": codes, "scale0": torch.full((*lead, PAGE_TOKENS), -1.0, dtype=spec.torch_scale_dtype)}


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_encode, "is_hopper", lambda device: True)


def test_what_it_covers(hopper: None) -> None:
    x = torch.empty(2, 3, 2 * PAGE_TOKENS, 128, dtype=torch.bfloat16)
    key, value = CodecSpec(128, 3, "key"), CodecSpec(128, 3, "value")
    moved = transform_of(key, heads=3, batch=2)
    for bits in BITS:
        assert hopper_encode.covers(x, CodecSpec(128, bits, "key"), moved)
        assert hopper_encode.covers(x.half(), CodecSpec(128, bits, "value", scale_dtype="float32"), PLAIN)
    assert hopper_encode.covers(x.transpose(1, 2).contiguous().transpose(1, 2), key, PLAIN)
    assert hopper_encode.covers(x[:1, :1, :, :], key, PLAIN)
    assert not hopper_encode.covers(x, value, moved)
    ordered = ChannelTransform(order=torch.arange(128).expand(2, 3, 128).to(torch.int16))
    assert not hopper_encode.covers(x, key, ordered)


@pytest.mark.parametrize(
    "spec",
    [
        CodecSpec(128, 1, "key"),
        CodecSpec(128, 8, "key"),
        CodecSpec(128, 3.5, "value"),
        CodecSpec(64, 3, "key"),
        CodecSpec(256, 3, "key"),
        CodecSpec(128, 3, "key", scale="unbiased"),
        CodecSpec(128, 3, "value", scale="norm"),
        CodecSpec(128, 3, "key", codebook="lloyd_max"),
        CodecSpec(128, 3, "key", rotation="haar"),
        CodecSpec(128, 3, "key", estimator="prod"),
    ],
    ids=str,
)
def test_codecs_it_leaves_to_others(spec: CodecSpec, hopper: None) -> None:
    assert not hopper_encode.covers(torch.empty(1, 1, 128, spec.head_dim).bfloat16(), spec, PLAIN)


def test_vectors_it_leaves_to_others(hopper: None) -> None:
    spec, x = CodecSpec(128, 3, "key"), torch.empty(1, 2, 128, 256, dtype=torch.bfloat16)
    assert hopper_encode.covers(x[..., :128], spec, PLAIN) and hopper_encode.covers(
        x[..., 8:136], spec, PLAIN
    )
    for other in (x[..., 4:132], x[..., ::2], x[..., :128].float()):
        assert not hopper_encode.covers(other, spec, PLAIN)
    uneven = torch.empty(1, 2, 128, 136, dtype=torch.bfloat16)[..., :128]
    assert not hopper_encode.covers(uneven, spec, PLAIN)


def test_other_devices_are_left_to_others() -> None:
    assert not hopper_encode.covers(torch.empty(1, 1, 128, 128).bfloat16(), CodecSpec(128, 3, "key"), PLAIN)


@pytest.mark.parametrize(
    ("heads", "programs", "backwards"),
    [(8, 66, [2, 3, 6, 7]), (8, 132, [1, 3, 5, 7]), (8, 200, []), (16, 33, [4, 5, 6, 7, 12, 13, 14, 15])],
)
def test_every_second_wave_takes_pages_backwards(heads: int, programs: int, backwards: list[int]) -> None:
    turn = hopper_encode.turn_of(programs, 132)
    assert [head for head in range(heads) if head >> turn & 1] == backwards


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", BITS)
def test_compiles(bits: int, role: str) -> None:
    from quantpress.kernels.encode.hopper_kernel import encode_hopper_kernel

    spec, x = CodecSpec(128, bits, role), torch.empty(1, 8, 2 * PAGE_TOKENS, 128, dtype=torch.bfloat16)
    planes = planes_for(x, spec)
    transform = transform_of(spec, heads=8) if role == "key" else PLAIN
    flag = torch.zeros(1, dtype=torch.int32)
    arguments = hopper_encode.hopper_arguments(x, spec, transform, planes, flag)
    registers, _ = hopper_encode.launch_settings(spec)
    compiled = compile_only(encode_hopper_kernel, arguments, 90, hopper_encode.WARPS, registers=registers)
    taken = resources(compiled)
    assert taken["REG"] <= registers and taken["STACK"] <= 48
    programs = 65536 // (registers * 32 * hopper_encode.WARPS)
    room = 228 * 1024 // programs - 1024  # the system keeps 1 KB of each program's
    assert compiled.metadata.shared <= room


gpu = pytest.mark.gpu


def launched(x: torch.Tensor, spec: CodecSpec, transform: ChannelTransform) -> int:
    """The flag of the first launch on a GPU, which has to be the Hopper kernel's."""
    from quantpress.kernels.encode.triton_encode import launch_encode

    if torch.cuda.get_device_capability()[0] != HOPPER:
        pytest.skip("needs compute capability 9.x")
    x, transform = x.cuda(), transform.map(lambda part: part.cuda())
    assert hopper_encode.covers(x, spec, transform)
    return int(launch_encode(x, spec, transform)[1])


def ordinary(dtype: torch.dtype, pages: int) -> torch.Tensor:
    """Uneven channels, lengths that the kernel takes; [2, 3, T, 128]."""
    return (torch.randn(2, 3, pages * PAGE_TOKENS, 128) * torch.rand(128).mul(3).exp2()).to(dtype)


@gpu
@pytest.mark.parametrize("programs", [4, 0], ids=["many", "one_a_head"])
@pytest.mark.parametrize("pages", [1, 2, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", BITS)
def test_pages_on_a_gpu(
    bits: int, role: str, dtype: torch.dtype, pages: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not programs:
        monkeypatch.setattr(hopper_encode, "launch_settings", lambda spec: (128, 0))
    spec, x = CodecSpec(128, bits, role), ordinary(dtype, pages)
    x[0, 0, 7] = 0
    moved = transform_of(spec, heads=3, batch=2)
    for transform in (moved, in_bfloat16(moved)) if role == "key" else (PLAIN,):
        assert launched(x, spec, transform) == 0
        check(on_gpu(x, spec, transform), x, spec, transform)


@gpu
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("bits", BITS)
def test_parts_of_a_transform_and_scale_dtypes_on_a_gpu(bits: int, scale_dtype: str) -> None:
    spec = CodecSpec(128, bits, "key", scale_dtype=scale_dtype)
    x = ordinary(torch.bfloat16, 3)
    whole = transform_of(spec, heads=3, batch=2)
    for transform in (PLAIN, ChannelTransform(mean=whole.mean), ChannelTransform(weight=whole.weight)):
        assert launched(x, spec, transform) == 0
        check(on_gpu(x, spec, transform), x, spec, transform)


@gpu
@pytest.mark.parametrize(("role", "power"), [("key", -16), ("key", 50), ("value", -60), ("value", 40)])
@pytest.mark.parametrize("bits", BITS)
def test_lengths_out_of_range_are_encoded_again_on_a_gpu(bits: int, role: str, power: int) -> None:
    spec = CodecSpec(128, bits, role, scale_dtype="float32")
    x = ordinary(torch.bfloat16, 3)
    assert launched(x, spec, PLAIN) == 0
    x[1, 2, 300:] *= 2.0**power
    assert launched(x, spec, PLAIN) == 2
    check(on_gpu(x, spec, PLAIN), x, spec, PLAIN)


@gpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", BITS)
def test_what_is_not_finite_is_refused_on_a_gpu(bits: int, role: str, bad: float) -> None:
    spec = CodecSpec(128, bits, role)
    for page in range(3):
        x = ordinary(torch.float16, 3)
        x[1, 2, page * PAGE_TOKENS + 100, 127] = bad
        assert launched(x, spec, PLAIN) == 2
        with pytest.raises(NonFiniteError):
            on_gpu(x, spec, PLAIN)


@gpu
@pytest.mark.parametrize("role", ROLES)
def test_strides_on_a_gpu(role: str) -> None:
    spec = CodecSpec(128, 3, role)
    by_token = torch.randn(2, 3 * PAGE_TOKENS, 4, 128).bfloat16().cuda().transpose(1, 2)
    wide = torch.randn(2, 4, 3 * PAGE_TOKENS + 1, 384).bfloat16().cuda()
    for x in (by_token, wide[:, :, 1:, 128:256], wide[:1, :1, 1:, 8:136], by_token[:1].expand(2, -1, -1, -1)):
        assert launched(x, spec, PLAIN) == 0
        check(on_gpu(x, spec, PLAIN), x.cpu(), spec, PLAIN)
    odd = wide[:, :, 1:, 4:132]  # in no copy of 16 bytes
    assert not hopper_encode.covers(odd, spec, PLAIN)
    check(on_gpu(odd, spec, PLAIN), odd.cpu(), spec, PLAIN)


@gpu
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", BITS)
def test_the_kernel_of_all_gpus_on_a_gpu(bits: int, role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other GPUs run, and this one where a vector is out of range."""
    monkeypatch.setattr("quantpress.kernels.encode.triton_encode.covers", lambda *_: False)
    spec, x = CodecSpec(128, bits, role), vectors(128, torch.bfloat16)
    for transform in (PLAIN, transform_of(spec)):
        check(on_gpu(x, spec, transform), x, spec, transform)
