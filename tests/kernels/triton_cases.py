"""What the tests of the Triton encode and decode kernels share: codecs, vectors, compiling without a GPU."""

import re
import subprocess
import tempfile
from typing import Any

import torch

from quantpress.kernels.available import FUSED
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform
from tests.limits import HANG

BATCH, HEADS, TOKENS = 1, 2, 256
NEAR_TIE = 2e-6  # float32 rotation of a unit vector moves a coordinate by less
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int64: "*i64",
}


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
