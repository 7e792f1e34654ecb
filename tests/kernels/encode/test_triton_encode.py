"""The Triton encode kernel against float64 and the reference: interpreted, compiled, and on a GPU."""

import sys

import pytest
import torch

from quantpress.deferred import DeferredChecks
from quantpress.errors import InvalidInputError, NonFiniteError
from quantpress.kernels.encode import encode_pages
from quantpress.kernels.encode.assembly import rounding_assembly, squares_assembly
from quantpress.kernels.encode.reference import encode_pages_reference
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform
from tests.kernels.interpreter import interpret
from tests.kernels.triton_cases import HEADS, case_specs, check, compile_only, more, transform_of, vectors

pytest.importorskip("triton")

SHAPES = [(128, bits) for bits in (1, 2, 3, 4, 8, 2.5, 3.5)]
SHAPES += [(dim, bits) for dim in (64, 80, 96, 192, 256) for bits in (2.5, 3, 4)]


def test_interpreted() -> None:
    lines = interpret(__file__, "key", "value").splitlines()
    assert len(lines) == len(case_specs("key")) + len(case_specs("value")) + 2 * 4


def interpreted(role: str) -> None:
    """What `test_interpreted` runs in Triton's interpreter, a line for each check."""
    from quantpress.kernels.encode.triton_encode import encode_pages_triton, launch_encode

    for spec in case_specs(role):
        x, transform = vectors(spec.head_dim, torch.float32), transform_of(spec)
        print(spec, "ties:", check(encode_pages_triton(x, spec, transform), x, spec, transform))
    spec, plain = CodecSpec(64, 3, role), ChannelTransform()
    one, x = transform_of(spec), vectors(64, torch.float32, batch=2)
    print("one transform, ties:", check(encode_pages_triton(x, spec, one), x, spec, one))
    dtype, width, bad = {
        "key": (torch.float16, 3, float("nan")),
        "value": (torch.bfloat16, 4, float("inf")),
    }[role]
    x = vectors(64, dtype)
    print(dtype, "ties:", check(encode_pages_triton(x, spec, plain), x, spec, plain))
    even = torch.randn(1, 2, 128, 80)  # in the quick mode the lengths of `vectors` are out of range
    odd = CodecSpec(80, width, role)
    check(launch_encode(even, odd, plain)[0], even, odd, plain)
    x = vectors(64, torch.float32) * 2.0**-130
    tiny = CodecSpec(64, 3, role, scale_dtype="float32")
    codes = encode_pages_triton(x, tiny, plain)["codes0"]
    same = codes == encode_pages_reference(x, tiny, plain)["codes0"]
    assert same.float().mean() > 0.999
    checks = DeferredChecks()
    with checks.collecting():  # out of range of the first launch, which nobody looks at
        assert torch.equal(encode_pages_triton(x, tiny, plain)["codes0"], codes)
    checks.settle()
    print("subnormal vectors")
    x = vectors(64, torch.float32)
    x[0, 1, 100, 63] = bad
    with pytest.raises(NonFiniteError):
        encode_pages_triton(x, spec, plain)
    with checks.collecting():
        encode_pages_triton(x, spec, plain)
    with pytest.raises(NonFiniteError):
        checks.settle()
    print("refused", bad)


@pytest.mark.parametrize(
    ("spec", "dtype", "moved", "capability"),
    [
        (CodecSpec(128, 4, "key"), torch.bfloat16, True, 80),
        (CodecSpec(128, 3, "value"), torch.bfloat16, False, 100),
        (CodecSpec(64, 2.5, "key"), torch.float16, True, 80),
        more(CodecSpec(80, 1, "value"), torch.float32, True, 100),
        more(CodecSpec(256, 8, "key", codebook="lloyd_max"), torch.float16, False, 90),
        (CodecSpec(128, 8, "key"), torch.bfloat16, True, 90),
        (CodecSpec(96, 2, "value", scale="norm"), torch.bfloat16, False, 80),
        (CodecSpec(256, 4, "key"), torch.bfloat16, True, 90),
        (CodecSpec(192, 3, "value"), torch.float32, True, 80),
    ],
    ids=lambda x: f"{x.head_dim}-{x.bits}-{x.role}" if isinstance(x, CodecSpec) else str(x),
)
def test_compiles(spec: CodecSpec, dtype: torch.dtype, moved: bool, capability: int) -> None:
    """For 8.0 with the settings of its narrow kin, which have 99 KB of shared memory."""
    from quantpress.kernels.encode.triton_encode import (
        ROOMY_BYTES,
        encode_arguments,
        encode_settings,
        launch_encode,
    )
    from quantpress.kernels.encode.triton_kernel import encode_pages_kernel

    x = torch.empty(1, 1, 0, spec.head_dim, dtype=dtype)
    transform = transform_of(spec, heads=1) if moved else ChannelTransform()
    planes, flag = launch_encode(x, spec, transform)
    roomy = capability > 80
    settings = encode_settings(x, spec, roomy=roomy)
    arguments = encode_arguments(x, spec, transform, planes, flag, settings, device=True)
    arguments["AFTER"] = moved
    compiled = compile_only(encode_pages_kernel, arguments, capability, settings.warps)
    if (compiled.metadata.tmem_size or 0) > 512:  # columns; Triton refuses to launch it
        assert spec.head_dim == 80
        pytest.skip("Triton before 3.8 lays out more accumulators than tensor memory holds")
    assert compiled.asm["cubin"] and "trap;" not in compiled.asm["ptx"]
    assert compiled.metadata.shared <= (ROOMY_BYTES if roomy else 99 * 1024)


def test_wide_groups_need_another_memory_than_that_of_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantpress.kernels.encode import triton_encode

    wide, narrow = CodecSpec(192, 4, "key"), CodecSpec(256, 3.5, "key")  # the second in two groups of 128
    x = {spec.head_dim: torch.empty(1, 1, 0, spec.head_dim) for spec in (wide, narrow)}
    assert all(triton_encode.supports_encode(x[spec.head_dim], spec) for spec in (wide, narrow))
    monkeypatch.setattr(triton_encode, "has_tensor_memory", lambda device: True)
    assert not triton_encode.supports_encode(x[192], wide)
    assert triton_encode.supports_encode(x[256], narrow)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_assembly_compares_with_every_threshold(bits: int) -> None:
    book = CodecSpec(128, bits, "value").codebook_of(0)
    assert rounding_assembly(book, "unbiased").count(".sat.") == 2 ** (bits - 1) - 1
    assert rounding_assembly(book, "norm").count(".sat.") == bits - 1 + (bits == 3)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_squared_levels_are_whole_numbers_of_their_unit(bits: int) -> None:
    book = CodecSpec(128, bits, "key").codebook_of(0)
    text, unit = squares_assembly(book)
    whole = torch.tensor(book.levels, dtype=torch.float64) / unit**0.5
    assert "dp4a" in text and torch.allclose(whole, whole.round(), atol=1e-9) and whole.max() < 256
    assert squares_assembly(CodecSpec(128, bits, "key", codebook="lloyd_max").codebook_of(0)) == ("", 0.0)


gpu = pytest.mark.gpu


def on_gpu(x: torch.Tensor, spec: CodecSpec, transform: ChannelTransform) -> dict[str, torch.Tensor]:
    """Encode on the GPU; memory the planes may land in holds rubbish."""
    for plane in encode_pages(x.cuda(), spec, transform.map(lambda t: t.cuda())).values():
        plane.fill_(-1 if plane.is_floating_point() else 0xA5)
    planes = encode_pages(x.cuda(), spec, transform.map(lambda t: t.cuda()))
    return {name: plane.cpu() for name, plane in planes.items()}


@gpu
@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize(("dim", "bits"), SHAPES)
def test_every_width_on_a_gpu(dim: int, bits: float, role: str) -> None:
    from quantpress.kernels.encode.triton_encode import supports_encode

    spec = CodecSpec(dim, bits, role)
    wide = max(group.channels for group in spec.groups) > 128
    left = wide and torch.cuda.get_device_capability()[0] in (10, 11)  # to PyTorch
    assert supports_encode(torch.empty(1, 1, 0, dim, device="cuda"), spec) != left
    for dtype, moved in ((torch.bfloat16, True), (torch.bfloat16, False)):
        x = vectors(dim, dtype, tokens=5 * PAGE_TOKENS, heads=3, batch=2)
        transform = transform_of(spec, heads=3, batch=2) if moved else ChannelTransform()
        print(spec, moved, "ties:", check(on_gpu(x, spec, transform), x, spec, transform))


@gpu
@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", ["norm", "norm_corrected", "unbiased"])
def test_every_rule_and_dtype_on_a_gpu(scale: str, dtype: torch.dtype, role: str) -> None:
    for form in ("int8", "lloyd_max"):
        for bits in (2, 3, 4, 8):
            spec = CodecSpec(128, bits, role, scale=scale, codebook=form, scale_dtype="float32")
            x = vectors(128, dtype)
            for transform in (ChannelTransform(), transform_of(spec)):
                check(on_gpu(x, spec, transform), x, spec, transform)


@gpu
@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ordinary_vectors_need_no_second_launch_on_a_gpu(bits: int, dtype: torch.dtype, role: str) -> None:
    from quantpress.kernels.encode.triton_encode import launch_encode

    spec, x = CodecSpec(128, bits, role), torch.randn(1, HEADS, 9 * PAGE_TOKENS, 128).to(dtype)
    for transform in (ChannelTransform(), transform_of(spec)):
        planes, flag = launch_encode(x.cuda(), spec, transform.map(lambda t: t.cuda()))
        assert int(flag) == 0
        check({name: plane.cpu() for name, plane in planes.items()}, x, spec, transform)


@gpu
@pytest.mark.parametrize("rotation", ["haar", "identity"])
def test_every_rotation_on_a_gpu(rotation: str) -> None:
    spec = CodecSpec(128, 4, "key", rotation=rotation, scale_dtype="bfloat16")
    x = vectors(128, torch.bfloat16)
    check(on_gpu(x, spec, ChannelTransform()), x, spec, ChannelTransform())


@gpu
@pytest.mark.parametrize("size", [1e20, 1e36])
def test_vectors_longer_than_16_bit_products_hold_on_a_gpu(size: float) -> None:
    spec = CodecSpec(128, 4, "value", scale_dtype="float32")
    x = (torch.randn(1, 1, PAGE_TOKENS, 128) * size).to(torch.bfloat16)
    check(on_gpu(x, spec, ChannelTransform()), x, spec, ChannelTransform())


@gpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bits", [3, 2.5])
def test_what_is_not_finite_is_refused_on_a_gpu(bits: float, dtype: torch.dtype, bad: float) -> None:
    spec = CodecSpec(64, bits, "value")
    for channel in (0, 63):
        x = vectors(64, dtype)
        x[0, 1, 100, channel] = bad
        for transform in (ChannelTransform(), transform_of(spec)):
            with pytest.raises(NonFiniteError):
                on_gpu(x, spec, transform)


@gpu
def test_any_strides_on_a_gpu() -> None:
    spec = CodecSpec(128, 3, "key")
    x = torch.randn(2, 3 * PAGE_TOKENS, 4, 128).transpose(1, 2)
    check(on_gpu(x, spec, ChannelTransform()), x, spec, ChannelTransform())
    wide = torch.randn(2, 4, 2 * PAGE_TOKENS, 256)[..., ::2]
    check(on_gpu(wide, spec, ChannelTransform()), wide, spec, ChannelTransform())


@gpu
def test_what_the_kernel_does_not_do_is_still_done_on_a_gpu() -> None:
    x = torch.randn(1, 1, PAGE_TOKENS, 576)
    for spec in (CodecSpec(576, 4, "key"), CodecSpec(576, 3, "key", estimator="prod")):
        assert all(plane.numel() for plane in on_gpu(x, spec, ChannelTransform()).values())
    with pytest.raises(InvalidInputError):
        on_gpu(x[:, :, :100], CodecSpec(576, 4, "key"), ChannelTransform())
    empty = on_gpu(torch.empty(1, 2, 0, 64), CodecSpec(64, 4, "key"), ChannelTransform())
    assert empty["codes0"].shape[:3] == (1, 2, 0)


if __name__ == "__main__":
    for role in sys.argv[1:]:
        interpreted(role)
