"""The Triton decode kernels against the reference: interpreted, compiled, and on a GPU."""

import sys

import pytest
import torch

from quantpress.errors import InvalidInputError
from quantpress.kernels.dequantize import decode_code_space, decode_pages
from quantpress.kernels.dequantize.reference import decode_code_space_reference, decode_pages_reference
from quantpress.kernels.encode.reference import encode_pages_reference
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform
from tests.kernels.interpreter import interpret
from tests.kernels.triton_cases import case_specs, compile_only, more, transform_of, vectors

pytest.importorskip("triton")

TOLERANCE = {torch.float32: 6e-7, torch.float16: 4e-4, torch.bfloat16: 3e-3}
SKETCHED = 4e-7  # in code space
IDENTITY = ChannelTransform()
SHAPES = [(128, bits) for bits in (1, 2, 3, 4, 8, 2.5, 3.5)]
SHAPES += [(dim, bits) for dim in (64, 80, 96, 256) for bits in (2.5, 3)]


def sketched(dim: int, bits: int, role: str, **others: str) -> CodecSpec:
    return CodecSpec(dim, bits, role, estimator="prod", **others)  # type: ignore[arg-type]


def sketch_specs(role: str) -> list[CodecSpec]:
    if role == "value":
        return [sketched(64, 4, role)]
    return [sketched(128, 3, role), sketched(36, 2, role, rotation="haar", codebook="lloyd_max")]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def test_interpreted() -> None:
    lines = interpret(__file__, "key", "value").splitlines()
    assert len(lines) == sum(len(case_specs(role) + sketch_specs(role)) for role in ("key", "value"))


def interpreted(role: str) -> None:
    """What `test_interpreted` runs in Triton's interpreter, a line for each codec."""
    from quantpress.kernels.dequantize.triton_dequantize import decode_code_space_triton, decode_pages_triton

    for spec in case_specs(role) + sketch_specs(role):
        planes = encode_pages_reference(
            vectors(spec.head_dim, torch.float32).clamp(-1e4, 1e4), spec, IDENTITY
        )
        expected, got = decode_code_space_reference(planes, spec), decode_code_space_triton(planes, spec)
        exact = spec.estimator == "mse"
        assert torch.equal(got, expected) if exact else relative_error(got, expected) < SKETCHED, spec
        assert got.stride() == expected.stride(), spec
        for transform in [transform_of(spec), *([IDENTITY] if spec.bits in (2.5, 4) else [])]:
            right = decode_pages_reference(planes, spec, transform, torch.float64)
            back = decode_pages_triton(planes, spec, transform, torch.float32)
            assert relative_error(back, right) < TOLERANCE[torch.float32], spec
        print(spec)
    spec, one = CodecSpec(64, 3, role), transform_of(CodecSpec(64, 3, role))
    planes = encode_pages_reference(vectors(64, torch.float32, batch=2).clamp(-1e4, 1e4), spec, one)
    back, right = (f(planes, spec, one, torch.float32) for f in (decode_pages_triton, decode_pages_reference))
    assert relative_error(back, right) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("spec", "capability"),
    [
        (CodecSpec(128, 4, "key"), 100),
        more(CodecSpec(128, 3, "value"), 90),
        (CodecSpec(80, 1, "value"), 80),
        more(CodecSpec(256, 8, "value"), 80),
        (sketched(128, 4, "key"), 90),
        more(sketched(128, 3, "key"), 100),
    ],
    ids=lambda x: f"{x.head_dim}-{x.bits}-{x.role}-{x.estimator}" if isinstance(x, CodecSpec) else str(x),
)
def test_compiles(spec: CodecSpec, capability: int) -> None:
    from quantpress.kernels.dequantize import triton_dequantize as host
    from quantpress.kernels.dequantize.triton_kernel import decode_code_space_kernel, decode_pages_kernel

    planes = encode_pages_reference(torch.empty(1, 1, 0, spec.head_dim), spec, IDENTITY)
    out, table = torch.empty(1, 1, 0, spec.head_dim, dtype=torch.bfloat16), torch.empty(0, dtype=torch.int32)
    chosen = table if capability == 80 else None
    for arguments in host.decode_arguments(planes, spec, transform_of(spec, heads=1), out, chosen):
        compiled = compile_only(decode_pages_kernel, arguments, capability, 8)
        assert compiled.metadata.shared <= 99 * 1024
    for arguments in host.code_space_arguments(planes, spec, out.float()):
        assert compile_only(decode_code_space_kernel, arguments, capability, 4).asm["cubin"]


gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize(("dim", "bits"), SHAPES)
def test_every_width_on_a_gpu(dim: int, bits: float, role: str) -> None:
    spec = CodecSpec(dim, bits, role)
    x = vectors(dim, torch.float32, tokens=5 * PAGE_TOKENS, heads=3, batch=2)
    for transform in (IDENTITY, transform_of(spec, heads=3, batch=2)):
        planes = encode_pages_reference(x, spec, transform)
        there = {name: plane.cuda() for name, plane in planes.items()}
        moved = transform.map(lambda t: t.cuda())
        for dtype, tolerance in (
            TOLERANCE.items() if bits == 3 else [(torch.float32, TOLERANCE[torch.float32])]
        ):
            poison = decode_pages(there, spec, moved, dtype).fill_(float("nan"))
            del poison
            got = decode_pages(there, spec, moved, dtype).cpu()
            expected = decode_pages_reference(planes, spec, transform, torch.float64)
            assert got.dtype == dtype and relative_error(got, expected) < tolerance
        decode_code_space(there, spec).fill_(float("nan"))
        space, right = decode_code_space(there, spec), decode_code_space_reference(planes, spec)
        assert torch.equal(space.cpu(), right) and space.stride() == right.stride()


@gpu
@pytest.mark.parametrize("rotation", ["haar", "identity"])
@pytest.mark.parametrize("form", ["int8", "lloyd_max"])
def test_every_rotation_and_codebook_on_a_gpu(form: str, rotation: str) -> None:
    spec = CodecSpec(128, 4, "key", rotation=rotation, codebook=form, scale_dtype="bfloat16")
    planes = encode_pages_reference(vectors(128, torch.float32), spec, IDENTITY)
    there = {name: plane.cuda() for name, plane in planes.items()}
    got = decode_pages(there, spec, IDENTITY, torch.float32).cpu()
    expected = decode_pages_reference(planes, spec, IDENTITY, torch.float64)
    assert relative_error(got, expected) < TOLERANCE[torch.float32]


@gpu
def test_slices_of_pages_and_what_the_kernel_does_not_do_on_a_gpu() -> None:
    spec = CodecSpec(64, 3, "value")
    planes = encode_pages_reference(torch.randn(2, 2, 4 * PAGE_TOKENS, 64), spec, IDENTITY)
    there = {name: plane.cuda()[:, :, 1:3] for name, plane in planes.items()}
    whole = decode_code_space_reference(planes, spec)
    assert torch.equal(decode_code_space(there, spec).cpu(), whole[:, :, PAGE_TOKENS : 3 * PAGE_TOKENS])
    with pytest.raises(InvalidInputError):
        decode_pages(there, CodecSpec(64, 4, "value"), IDENTITY, torch.float32)
    planes = encode_pages_reference(torch.randn(1, 1, PAGE_TOKENS, 64), spec, IDENTITY)
    got = decode_pages({name: plane.cuda() for name, plane in planes.items()}, spec, IDENTITY, torch.float64)
    assert relative_error(got.cpu(), decode_pages_reference(planes, spec, IDENTITY, torch.float64)) < 1e-5


@gpu
@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize(("dim", "bits"), [(128, 2), (128, 3), (128, 4), (64, 3), (80, 4), (256, 4)])
def test_the_sketch_on_a_gpu(dim: int, bits: int, role: str) -> None:
    spec = sketched(dim, bits, role)
    x = vectors(dim, torch.float32, tokens=5 * PAGE_TOKENS, heads=3, batch=2).clamp(-1e4, 1e4)
    for transform in (IDENTITY, transform_of(spec, heads=3, batch=2)):
        planes = encode_pages_reference(x, spec, transform)
        there = {name: plane.cuda()[:, :, 1:4] for name, plane in planes.items()}
        some = {name: plane[:, :, 1:4] for name, plane in planes.items()}
        moved = transform.map(lambda t: t.cuda())
        for dtype, tolerance in TOLERANCE.items():
            decode_pages(there, spec, moved, dtype).fill_(float("nan"))
            got = decode_pages(there, spec, moved, dtype).cpu()
            expected = decode_pages_reference(some, spec, transform, torch.float64)
            assert got.dtype == dtype and relative_error(got, expected) < tolerance
        decode_code_space(there, spec).fill_(float("nan"))
        space, right = decode_code_space(there, spec), decode_code_space_reference(some, spec)
        assert relative_error(space.cpu(), right) < SKETCHED and space.stride() == right.stride()


if __name__ == "__main__":
    for role in sys.argv[1:]:
        interpreted(role)
