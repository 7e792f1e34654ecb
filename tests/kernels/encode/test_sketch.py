"""The Triton kernel that encodes with a sketch: against float64 and the reference, compiled, and on a GPU."""

import sys

import pytest
import torch

from quantpress.deferred import DeferredChecks
from quantpress.errors import NonFiniteError
from quantpress.kernels.encode import sketch_encode
from quantpress.kernels.encode.reference import encode_pages_reference
from quantpress.kernels.encode.sketch_encode import supports_sketch
from quantpress.kernels.layout import PAGE_TOKENS, unpack_pages
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform
from tests.kernels.encode.test_triton_encode import on_gpu
from tests.kernels.interpreter import interpret
from tests.kernels.triton_cases import (
    NEAR_TIE,
    SCALE_ROUNDING,
    check,
    compile_only,
    resources,
    transform_of,
    transformed,
    vectors,
)

pytest.importorskip("triton")

IDENTITY = ChannelTransform()


def sketched(dim: int, bits: int, role: str = "key", **others: str) -> CodecSpec:
    return CodecSpec(dim, bits, role, estimator="prod", **others)  # type: ignore[arg-type]


def check_sketch(
    planes: dict[str, torch.Tensor], x: torch.Tensor, spec: CodecSpec, transform: ChannelTransform
) -> None:
    """Codes and scales as `check` has them; the sketch is that of what they leave over, but at ties."""
    check(planes, x, spec, transform)
    y = transformed(x, transform) @ spec.rotation_of(0).matrix().T
    codes = unpack_pages(planes["codes0"], spec.groups[0].bits, spec.head_dim, spec.role).flatten(2, 3)
    levels = torch.tensor(spec.codebook_of(0).levels, dtype=torch.float64)[codes.long()]
    norm = y.norm(dim=-1, keepdim=True)
    rest = (y - planes["scale0"].double().flatten(2, 3).unsqueeze(-1) * levels) / norm.where(norm > 0, 1)
    signs = unpack_pages(planes["sketch"], 1, spec.head_dim, spec.role).flatten(2, 3).bool()
    matrix = spec.sketch_matrix()
    projected = rest @ matrix.T
    apart = signs != (projected >= 0)
    assert (projected.abs() < NEAR_TIE * matrix.norm(dim=-1))[apart].all(), (spec, "a sign is wrong")
    assert apart.sum() <= 1e-4 * x.numel() + 2
    assert signs[norm.squeeze(-1) == 0].all()
    right = (norm * rest.norm(dim=-1, keepdim=True)).squeeze(-1)
    stored = planes["residual"].double().flatten(2, 3)
    right = right.clamp(max=torch.finfo(planes["residual"].dtype).max)
    assert ((stored - right).abs() <= (SCALE_ROUNDING[spec.scale_dtype] + 2e-5) * right + 2**-25).all(), spec


def test_tensor_memory_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 10.0 on two matrices of 128 columns for the rotation do not fit beside the sums."""
    covered = [sketched(64, 3), sketched(128, 4), sketched(80, 3, rotation="identity")]
    crowded = [sketched(96, 3), sketched(128, 4, rotation="haar")]
    x = {dim: torch.empty(1, 1, PAGE_TOKENS, dim) for dim in (64, 80, 96, 128)}
    assert all(supports_sketch(x[spec.head_dim], spec) for spec in (*covered, *crowded))
    monkeypatch.setattr(sketch_encode, "has_tensor_memory", lambda device: True)
    assert all(supports_sketch(x[spec.head_dim], spec) for spec in covered)
    assert not any(supports_sketch(x[spec.head_dim], spec) for spec in crowded)


def case_specs(role: str) -> list[CodecSpec]:
    if role == "value":
        return [sketched(64, 4, role), sketched(36, 2, role, scale="unbiased", codebook="lloyd_max")]
    specs = [sketched(128, 4), sketched(64, 3, scale="unbiased"), sketched(64, 2, scale="norm_corrected")]
    return [*specs, sketched(80, 4, rotation="haar", scale_dtype="float32")]


def test_interpreted() -> None:
    lines = interpret(__file__, "key", "value").splitlines()
    assert len(lines) == len(case_specs("key")) + len(case_specs("value")) + 2


def interpreted(role: str) -> None:
    """What `test_interpreted` runs in Triton's interpreter, a line for each check."""
    from quantpress.kernels.encode import sketch_encode

    encode_sketch_triton = sketch_encode.encode_sketch_triton
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sketch_encode, "is_roomy", lambda device: role == "key")  # keeps the sketch's matrix
        for spec in case_specs(role):
            x, transform = vectors(spec.head_dim, torch.float32, tokens=PAGE_TOKENS), transform_of(spec)
            check_sketch(encode_sketch_triton(x, spec, transform), x, spec, transform)
            print(spec)
    spec, dtype, bad = {
        "key": (sketched(64, 3), torch.float16, float("nan")),
        "value": (sketched(64, 3, "value", scale_dtype="float32"), torch.float32, float("inf")),
    }[role]
    x = vectors(64, dtype)
    if role == "value":
        x = x * 2.0**-130
        planes, right = encode_sketch_triton(x, spec, IDENTITY), encode_pages_reference(x, spec, IDENTITY)
        for name in ("codes0", "sketch"):
            assert (planes[name] == right[name]).float().mean() > 0.999, "subnormal vectors"
    checks = DeferredChecks()
    with checks.collecting():
        found = encode_sketch_triton(x, spec, IDENTITY)
    checks.settle()
    x[0, 1, 100, 63] = bad
    with pytest.raises(NonFiniteError):
        encode_sketch_triton(x, spec, IDENTITY)
    with checks.collecting():
        broken = encode_sketch_triton(x, spec, IDENTITY)
    with pytest.raises(NonFiniteError):
        checks.settle()
    for name in ("scale0", "residual"):  # 0 there, so that no other check speaks first
        found[name][0, 1, 0, 100] = 0
        assert torch.equal(broken[name], found[name])
    print("refused", bad)


@pytest.mark.parametrize(
    ("spec", "dtype", "capability"),
    [
        (sketched(128, 4), torch.bfloat16, 90),
        (sketched(128, 3), torch.float16, 100),
        (sketched(80, 4), torch.float32, 80),
    ],
    ids=lambda x: f"{x.head_dim}-{x.bits}" if isinstance(x, CodecSpec) else str(x),
)
def test_compiles(spec: CodecSpec, dtype: torch.dtype, capability: int) -> None:
    """For 8.0 with the settings of its narrow kin, which have 99 KB of shared memory."""
    from quantpress.kernels.encode.sketch_encode import launch_sketch, sketch_arguments, sketch_settings
    from quantpress.kernels.encode.sketch_kernel import encode_sketch_kernel
    from quantpress.kernels.encode.triton_encode import ROOMY_BYTES

    x, transform = torch.empty(1, 1, 0, spec.head_dim, dtype=dtype), transform_of(spec, heads=1)
    planes, flag = launch_sketch(x, spec, transform)
    roomy = capability > 80
    settings = sketch_settings(spec, roomy, hopper=capability == 90)
    arguments = sketch_arguments(x, spec, transform, planes, flag, settings, roomy)
    compiled = compile_only(encode_sketch_kernel, arguments, capability, settings.warps)
    assert compiled.asm["cubin"] and (compiled.metadata.tmem_size or 0) <= 512
    assert compiled.metadata.shared <= (ROOMY_BYTES if roomy else 99 * 1024)
    assert resources(compiled)["STACK"] <= (128 if roomy else 512)  # bytes of spilled registers


gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize(("dim", "bits"), [(128, 2), (128, 3), (128, 4), (64, 4), (80, 3), (36, 4)])
def test_every_width_on_a_gpu(dim: int, bits: int, role: str) -> None:
    spec = sketched(dim, bits, role)
    for dtype, moved in ((torch.bfloat16, True), (torch.float16, False), (torch.float32, True)):
        x = vectors(dim, dtype, tokens=9 * PAGE_TOKENS, heads=3, batch=2)
        transform = transform_of(spec, heads=3, batch=2) if moved else IDENTITY
        check_sketch(on_gpu(x, spec, transform), x, spec, transform)


@gpu
@pytest.mark.parametrize("scale", ["norm", "norm_corrected", "unbiased"])
@pytest.mark.parametrize("rotation", ["hadamard", "haar", "identity"])
def test_every_rule_and_rotation_on_a_gpu(rotation: str, scale: str) -> None:
    for form, scale_dtype in (("int8", "float32"), ("lloyd_max", "bfloat16")):
        spec = sketched(128, 4, rotation=rotation, scale=scale, codebook=form, scale_dtype=scale_dtype)
        x = vectors(128, torch.bfloat16)
        check_sketch(on_gpu(x, spec, IDENTITY), x, spec, IDENTITY)


@gpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_what_is_not_finite_is_refused_on_a_gpu(dtype: torch.dtype, bad: float) -> None:
    spec, x = sketched(64, 3), vectors(64, dtype)
    x[0, 1, 100, 63] = bad
    checks = DeferredChecks()
    for transform in (IDENTITY, transform_of(spec)):
        with pytest.raises(NonFiniteError):
            on_gpu(x, spec, transform)
        with checks.collecting():
            on_gpu(x, spec, transform)
        with pytest.raises(NonFiniteError):
            checks.settle()


@gpu
@pytest.mark.parametrize("size", [1e-30, 1e20, 1e36])
def test_vectors_of_any_length_on_a_gpu(size: float) -> None:
    spec = sketched(128, 4, scale_dtype="float32")
    x = (torch.randn(1, 1, PAGE_TOKENS, 128) * size).to(torch.bfloat16)
    check_sketch(on_gpu(x, spec, IDENTITY), x, spec, IDENTITY)
    wide = torch.randn(2, 2 * PAGE_TOKENS, 4, 256).transpose(1, 2)[..., ::2]
    check_sketch(on_gpu(wide, spec, IDENTITY), wide, spec, IDENTITY)


if __name__ == "__main__":
    for role in sys.argv[1:]:
        interpreted(role)
