"""What the user sets around a call changes nothing that is stored, and nothing that is read from it."""

import ast
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

import quantpress
from quantpress.codecs.scalar import ScalarPages
from quantpress.codecs.turboquant import TurboQuantCodec
from quantpress.kernels import layout
from quantpress.kernels.attend import DenseSegment, PackedSegment, PackedSide, Visibility, attend
from quantpress.kernels.dequantize import reference as decode_reference
from quantpress.kernels.encode.nearest import nearest_level
from quantpress.quantization import qjl, rotation
from quantpress.quantization.rotation import Rotation
from quantpress.quantization.running_moments import RunningMoments
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import key_statistics

CACHED = (
    rotation._exact_matrix,
    rotation._cast_matrix,
    qjl._cast_matrix,
    nearest_level,
    layout._quad_codes,
    decode_reference.level_table,
    decode_reference.sign_table,
)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "meta by default": lambda: default_device("meta"),
    "inference mode": torch.inference_mode,
    "deterministic": deterministic,
}


def results(x: torch.Tensor, query: torch.Tensor) -> dict[str, torch.Tensor]:
    """Everything that our arithmetic makes of x [1, 2, T, D], with nothing remembered from before."""
    for function in CACHED:
        function.cache_clear()
    found: dict[str, torch.Tensor] = {}
    for bits, options in ((8, {}), (2.5, {}), (3, {"estimator": "prod", "rotation": "haar"})):
        codec = TurboQuantCodec(x.shape[-1], bits, **options)
        packed = codec.encode(x)
        found |= {f"{bits} {name}": plane for name, plane in packed.planes.items()}
        found[f"{bits} decoded"] = codec.decode(packed)
        found[f"{bits} scores"] = codec.inner_product(query, packed)
    transform = key_statistics(x, x.square().mean(2), (), balance=True)
    found |= transform.tensors()
    sides = []
    for role in ("key", "value"):
        pages = ScalarPages(CodecSpec(x.shape[-1], 4, role))
        sides.append(PackedSide(pages, pages.encode(x, transform), transform))
    tail = DenseSegment(x[:, :, :5], x[:, :, 5:10])
    segments = [PackedSegment(*sides), tail]
    found["attention"] = attend(query, segments, Visibility(3, x.shape[2] + 5), scaling=0.1)
    moments = RunningMoments(x.shape[-1])
    moments.update(x)
    found["energy"] = moments.energy
    return found


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_surroundings_change_nothing(name: str) -> None:
    x, query = torch.randn(1, 2, 256, 64), torch.randn(1, 2, 3, 64)
    expected = results(x, query)
    with SURROUNDINGS[name]():
        found = results(x, query)
    assert found.keys() == expected.keys()
    for part, tensor in found.items():
        assert tensor.dtype == expected[part].dtype and tensor.device == expected[part].device, part
        assert torch.equal(tensor, expected[part]), part


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["autocast", "default device", "matmul precision"])
def test_surroundings_change_nothing_on_a_gpu(name: str) -> None:
    """A width of keys that the Triton kernels do not encode takes the reference, on the GPU."""
    contexts: dict[str, Callable[[], object]] = {
        "autocast": lambda: torch.autocast("cuda", torch.bfloat16),
        "default device": lambda: default_device("cuda"),
        "matmul precision": lambda: matmul_precision("high"),
    }
    x, query = torch.randn(1, 2, 256, 64, device="cuda"), torch.randn(1, 2, 3, 64, device="cuda")
    expected = results(x, query)
    with ExitStack() as stack:
        stack.enter_context(contexts[name]())  # type: ignore[arg-type]
        found = results(x, query)
    for part, tensor in found.items():
        if name != "matmul precision":
            assert torch.equal(tensor, expected[part]), part
    turn = Rotation(64, "haar")
    exact = x.double() @ turn.matrix("cuda").T
    with stack:
        stack.enter_context(contexts[name]())  # type: ignore[arg-type]
        assert (turn.forward(x) - exact).abs().max() < 1e-5  # TF32 is off by 1e-2


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_rotations_are_exact_where_torch_may_multiply_in_less(precision: str) -> None:
    """In float64 and rounded once: on a CPU or GPU without TF32 and bfloat16 products as on one with them."""
    x, turn = torch.randn(300, 128), Rotation(128, "haar")
    exact = (x.double() @ turn.matrix().T.float().double()).float()
    with matmul_precision(precision):
        assert torch.equal(turn.forward(x), exact)


def test_autocast_is_on_again_after_an_error() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(quantpress.InvalidInputError):
            TurboQuantCodec(64).decode(TurboQuantCodec(64, 3).encode(torch.randn(5, 64)))
        assert torch.is_autocast_enabled("cpu")
        assert (torch.randn(2, 2) @ torch.randn(2, 2)).dtype == torch.bfloat16


FACTORIES = {"empty", "eye", "full", "linspace", "ones", "rand", "randn", "scalar_tensor", "tensor", "zeros"}
INDICES = {"arange", "randint", "randperm"}  # whole numbers: their dtype does not follow the default


def test_every_factory_names_its_dtype_and_device() -> None:
    missing = []
    root = Path(quantpress.__file__).parent
    for folder in ("quantization", "kernels", "codecs", "cache", "presses", "pipelines", "evaluation", "cli"):
        for path in (root / folder).rglob("*.py"):
            for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                wanted = _wanted(call)
                given = {keyword.arg for keyword in call.keywords} if isinstance(call, ast.Call) else set()
                if not wanted <= given:
                    missing.append(f"{path.relative_to(root)}:{call.lineno}")  # type: ignore[attr-defined]
    assert missing == []


def _wanted(call: ast.AST) -> set[str]:
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
        owner = call.func.value
        if isinstance(owner, ast.Name) and owner.id == "torch":
            if call.func.attr in INDICES:
                return {"device"}
            if call.func.attr in FACTORIES:
                return {"device", "dtype"}
    return set()
