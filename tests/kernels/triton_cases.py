"""What the tests of the Triton encode and decode kernels share: codecs, vectors, compiling without a GPU."""

import re
import subprocess
import tempfile
from typing import Any

import pytest
import torch

from quantpress.kernels.available import FUSED
from quantpress.kernels.encode.reference import encode_pages_reference
from quantpress.kernels.layout import unpack_pages
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform
from tests.limits import HANG

BATCH, HEADS, TOKENS = 1, 2, 256
NEAR_TIE = 2e-6  # float32 rotation of a unit vector moves a coordinate by less
SCALE_ROUNDING = {"auto": 2**-11, "float16": 2**-11, "bfloat16": 2**-8, "float32": 4e-6}
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int64: "*i64",
}


def more(*values: Any) -> Any:
    """A combination that `make test` leaves to `make test-combinations`; others show each thing in it."""
    return pytest.param(*values, marks=pytest.mark.combination)


def transform_of(spec: CodecSpec, heads: int = HEADS, batch: int = BATCH) -> ChannelTransform:
    """A transform with all its parts, the order among them for split codecs only."""
    lead = (batch, heads, spec.head_dim)
    order = torch.rand(lead).argsort(-1).to(torch.int16) if len(spec.groups) > 1 else None
    return ChannelTransform(torch.randn(lead), torch.rand(lead).add(0.5), order)


def vectors(
    dim: int, dtype: torch.dtype, tokens: int = TOKENS, heads: int = HEADS, batch: int = BATCH
) -> torch.Tensor:
    """Uneven channels, lengths over ten binades, a zero vector; [B, Hkv, T, D], part of a larger tensor."""
    shape = (batch, heads, tokens + 3, dim)
    length = torch.rand(*shape[:3], 1).mul(10).sub(5).exp2()
    x = torch.randn(shape) * torch.rand(dim).mul(3).exp2() * length
    x[0, 0, 7] = 0
    return x.to(dtype)[:, :, 3:]


def case_specs(role: str) -> list[CodecSpec]:
    """Every width in both roles, every rotation and scale rule in one, on small heads."""
    specs = [CodecSpec(64, bits, role) for bits in (1, 2, 3, 4, 8, 2.5)]
    specs += [CodecSpec(80, 3.5, role), CodecSpec(64, 8, role, codebook="lloyd_max")]
    if role == "key":  # of two blocks of channels, too
        specs += [CodecSpec(128, bits, role) for bits in (1, 3, 8)]
        specs += [
            CodecSpec(64, 4, role, rotation=kind, codebook="lloyd_max") for kind in ("haar", "identity")
        ]
        return [*specs, CodecSpec(36, 3, role, scale_dtype="float32")]
    specs += [CodecSpec(64, 4, role, scale=scale) for scale in ("norm", "norm_corrected", "unbiased")]
    return [*specs, CodecSpec(160, 2, role)]


def check(
    planes: dict[str, torch.Tensor],
    x: torch.Tensor,
    spec: CodecSpec,
    transform: ChannelTransform,
) -> int:
    """Codes are the reference's but at ties, scales right for the codes; returns how many ties differ."""
    in_steps = spec.role == "value" and spec.head_dim == 128 and spec.bits in (3, 4)
    slack = 2**-14 if in_steps else 4e-6  # relative, beside the dtype's; the first because of `octets`
    expected = encode_pages_reference(x, spec, transform)
    assert planes.keys() == expected.keys()
    y = transformed(x, transform)
    start = ties = 0
    for i, group in enumerate(spec.groups):
        part = y[..., start : start + group.channels] @ spec.rotation_of(i).matrix().T
        start += group.channels
        norm = part.norm(dim=-1)
        unit = part / norm.masked_fill(norm == 0, 1).unsqueeze(-1)
        book, name = spec.codebook_of(i), f"codes{i}"
        assert planes[name].shape == expected[name].shape and planes[name].dtype == torch.uint8
        codes, right = (
            unpack_pages(p[name], group.bits, group.channels, spec.role).flatten(2, 3)
            for p in (planes, expected)
        )
        apart = codes != right
        nearest = (unit.unsqueeze(-1) - torch.tensor(book.thresholds, dtype=torch.float64)).abs().amin(-1)
        assert (nearest[apart] < NEAR_TIE).all(), (spec, "a code is wrong and not at a tie")
        ties += int(apart.sum())
        levels = torch.tensor(book.levels, dtype=torch.float64)[codes.long()]
        if spec.scale_rule == "norm":
            ideal = norm
        elif spec.scale_rule == "norm_corrected":
            ideal = norm / levels.norm(dim=-1)
        else:
            along = (unit * levels).sum(-1)
            ideal = norm / along.masked_fill(along == 0, 1)
        scale = planes[f"scale{i}"]
        assert scale.dtype == spec.torch_scale_dtype and scale.shape == expected[f"scale{i}"].shape
        stored = scale.double().flatten(2, 3)
        ideal = ideal.clamp(max=torch.finfo(scale.dtype).max)
        assert (
            (stored - ideal).abs() <= (SCALE_ROUNDING[spec.scale_dtype] + slack) * ideal + 2**-25
        ).all(), spec
    assert ties <= 1e-4 * x.numel() + 2
    return ties


def transformed(x: torch.Tensor, transform: ChannelTransform) -> torch.Tensor:
    """The transform in float64."""
    y = x.double()
    if transform.mean is not None:
        y = y - transform.mean.double()[:, :, None]
    if transform.weight is not None:
        y = y * transform.weight.double()[:, :, None]
    if transform.order is not None:
        y = y.gather(-1, transform.order.long()[:, :, None].expand_as(y))
    return y


def compile_only(
    kernel: Any,
    arguments: dict[str, Any],
    capability: int,
    warps: int,
    registers: int | None = None,
    rounding: dict[str, bool] = FUSED,
) -> Any:
    """Compile a kernel for an NVIDIA GPU that need not be here, as these arguments would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source_type: Any = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon import _runtime

        source_type = _runtime.GluonASTSource
    constants = {param.name for param in kernel.params if param.is_constexpr}
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if name in constants or value is None:
            signature[name] = "constexpr"
            values[(i,)] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = source_type(kernel, signature, values, attributes)
    options = {"num_warps": warps, "maxnreg": registers} | rounding
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled: Any) -> dict[str, int]:
    """What the machine code of a compiled kernel takes, by the names of `cuobjdump`: REG, STACK, ..."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=HANG).stdout
    return {name: int(count) for name, count in re.findall(r"\b([A-Z]+):(\d+)", printed)}
