"""The joined kernels against the modules of transformers, and against PyTorch's order of adding."""

from typing import Any

import numpy as np
import pytest
import torch

from quantpress.kernels.available import ROUNDED
from quantpress.kernels.joined import write_token
from quantpress.kernels.joined.launches import launch_write, rms_norm, rotary, silu_product
from quantpress.kernels.joined.order import AddingOrder, adding_orders
from quantpress.kernels.joined.reference import (
    NORM_FORMS,
    rms_norm_reference,
    rotary_reference,
    silu_product_reference,
)
from quantpress.pipelines.joined.piece import MANY_ROWS
from tests.kernels.interpreter import interpret
from tests.kernels.triton_cases import compile_only

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIXTEEN = DTYPES[1:]
ROWS_AND_SIZES = [(1, 4096), (3, 128), (1, 896), (2, 8192), (3, 64)]
EPS = 1e-5


def norm_of(form: int, size: int, dtype: torch.dtype, device: str) -> Any:
    """A norm of transformers that rounds in this form."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    kinds: list[Any] = [LlamaRMSNorm, GemmaRMSNorm, GptOssRMSNorm]
    norm = kinds[form](size, eps=EPS).to(device, dtype)
    torch.nn.init.normal_(norm.weight, 1.0)
    return norm.requires_grad_(False)


def added(x: torch.Tensor, order: AddingOrder) -> torch.Tensor:
    """The sum of a row [N] as the threads of PyTorch's reduction make it."""
    threads = order.width * order.height
    four = torch.zeros(threads, 4)
    for part in torch.nn.functional.pad(x, (0, -len(x) % (4 * threads))).split(4 * threads):
        four += part.view(threads, 4) if order.vectorized else part.view(4, threads).T
    lines = (((four[:, 0] + four[:, 1]) + four[:, 2]) + four[:, 3]).view(order.height, order.width)
    while lines.shape[1] > 1:
        if order.neighbours_first and lines.shape[1] <= 32:
            lines = lines[:, ::2] + lines[:, 1::2]
        else:
            lines = lines[:, : lines.shape[1] // 2] + lines[:, lines.shape[1] // 2 :]
    total = lines[:, 0]
    while len(total) > 1:
        total = total[: len(total) // 2] + total[len(total) // 2 :]
    return total[0]


def by_order(x: torch.Tensor, weight: torch.Tensor, order: AddingOrder) -> torch.Tensor:
    """Gemma's form of the norm in float32, with the sums of `added` and the interpreter's rsqrt."""
    mean = torch.stack([added(row, order) for row in x * x]) * (1 / x.shape[1]) + EPS
    scale = torch.from_numpy(1 / np.sqrt(mean.numpy()))
    return (1 + weight) * (x * scale.unsqueeze(1))


def check_norms() -> None:
    for rows, size in ROWS_AND_SIZES:
        x, weight = torch.randn(rows, size) * 3, torch.randn(size)
        for order in adding_orders(rows, size):
            assert torch.equal(rms_norm(x, weight, EPS, 1, order), by_order(x, weight, order))
    for form in NORM_FORMS:
        for dtype in DTYPES:
            x, weight = torch.randn(1, 80, dtype=dtype), torch.randn(80, dtype=dtype)
            got, expected = (
                rms_norm(x, weight, EPS, form, adding_orders(1, 80)[0]),
                rms_norm_reference(x, weight, EPS, form),
            )
            torch.testing.assert_close(got, expected)


def check_rotary(device: str, dtype: torch.dtype, head_dim: int, batch: int, tokens: int = 1) -> None:
    """Queries and keys as attention has them, views of a projection; results lie in memory as PyTorch's."""
    q, k = (
        torch.randn(batch, tokens, heads, head_dim, device=device, dtype=dtype).transpose(1, 2)
        for heads in (4, 2)
    )
    cos, sin = torch.randn(2, batch if tokens > 1 else 1, tokens, head_dim, device=device).to(dtype)
    for one, other in zip(rotary(q, k, cos, sin), rotary_reference(q, k, cos, sin), strict=True):
        assert one.stride() == other.stride()
        if device == "cpu" and dtype == torch.bfloat16:  # which Triton's interpreter cuts off
            torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)
        else:
            assert torch.equal(one, other)


def check_write(device: str, dtype: torch.dtype, wide: torch.dtype) -> None:
    memory, expected = ([torch.zeros(2, 3, 9, d, device=device, dtype=dtype) for d in (40, 24)] for _ in "12")
    new = [torch.randn(2, 1, 3, d, device=device, dtype=wide).transpose(1, 2) for d in (40, 24)]
    newest = torch.tensor([5], device=device)
    launch_write(*memory, newest, *new)
    for states, one in zip(expected, new, strict=True):
        states.index_copy_(2, newest, one.to(dtype))
    assert all(map(torch.equal, memory, expected))


def test_references_are_what_models_compute() -> None:
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP, apply_rotary_pos_emb

    x, gate = torch.randn(2, 3, 64), torch.randn(2, 64)
    for form in NORM_FORMS:
        norm = norm_of(form, 64, torch.bfloat16, "cpu")
        got = rms_norm_reference(x.bfloat16(), norm.weight, EPS, form)
        assert torch.equal(got, norm(x.bfloat16()))
    arguments = torch.randn(2, 4, 1, 32), torch.randn(2, 2, 1, 32), *torch.randn(2, 1, 1, 32)
    for one, other in zip(rotary_reference(*arguments), apply_rotary_pos_emb(*arguments), strict=True):
        assert torch.equal(one, other)
    mlp = LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=96))
    product = silu_product_reference(mlp.gate_proj(gate), mlp.up_proj(gate))
    assert torch.equal(mlp.down_proj(product), mlp(gate))


@pytest.mark.parametrize("size", [4, 64, 128, 896, 4096, 16384])
def test_many_rows_have_one_order(size: int) -> None:
    found = {adding_orders(rows, size) for rows in (MANY_ROWS, MANY_ROWS + 1, 3 * MANY_ROWS - 1, 1 << 20)}
    assert len(found) == 1


def test_orders_of_pytorch() -> None:
    """A row of a model's width: 512 threads; 32 heads of 128: 32 threads a row; eight rows share 512."""
    assert adding_orders(1, 4096)[0] == AddingOrder(512, 1, True, False)
    assert adding_orders(32, 128)[0] == AddingOrder(32, 1, True, False)
    assert adding_orders(8, 4096)[0] == AddingOrder(64, 1, True, False)
    assert adding_orders(2, 8192)[0] == AddingOrder(256, 2, True, False)
    assert adding_orders(4, 64)[0] == AddingOrder(64, 1, False, False)
    assert len(adding_orders(1, 4096)) == 2 and len(adding_orders(8, 4096)) == 4
    x = torch.randn(40, 4096).square()
    sums = [torch.stack([added(row, order) for row in x]) for order in adding_orders(1, 4096)]
    assert bool((sums[0] != sums[1]).any())  # in a third of the rows


def test_interpreted() -> None:
    pytest.importorskip("triton")
    assert interpret(__file__).splitlines()[-1] == "equal"


def compiled(kernel: Any, values: dict[str, Any], dtype: torch.dtype, capability: int) -> Any:
    arguments: dict[str, Any] = {}
    for name in kernel.arg_names:
        arguments[name] = torch.empty(1, dtype=dtype) if name.endswith("_ptr") else 7
    arguments["CHAINED"] = capability >= 90
    return compile_only(kernel, arguments | values, capability, 4, rounding=ROUNDED).asm


@pytest.mark.parametrize(
    ("dtype", "capability"), [(torch.bfloat16, 80), (torch.float16, 90), (torch.bfloat16, 100)], ids=str
)
def test_compiles_without_a_gpu(dtype: torch.dtype, capability: int) -> None:
    pytest.importorskip("triton")
    from quantpress.kernels.joined.norm_kernel import rms_norm_kernel
    from quantpress.kernels.joined.product_kernel import silu_product_kernel
    from quantpress.kernels.joined.rotary_kernel import rotary_kernel
    from quantpress.kernels.joined.write_kernel import write_token_kernel

    order = {
        "SIZE": 4096,
        "TURNS": 2,
        "WIDTH": 512,
        "HEIGHT": 1,
        "VECTORIZED": True,
        "NEIGHBOURS_FIRST": False,
    }
    norm = compiled(rms_norm_kernel, {**order, "FORM": 0, "inverse": 0.5, "eps": 0.5}, dtype, capability)
    turns = {"HALF": 64, "CHANNELS": 64}
    rotation = compiled(rotary_kernel, {**turns, "TOKENS": 1}, dtype, capability)
    many = compiled(rotary_kernel, {**turns, "TOKENS": 16}, dtype, capability)
    product = compiled(silu_product_kernel, {"BLOCK": 512, "LIBRARY": True}, dtype, capability)
    newest = {"newest_ptr": torch.empty(1, dtype=torch.int64), "D": 128, "DV": 128, "CHANNELS": 128}
    write = compiled(write_token_kernel, newest, dtype, capability)
    waits = ["griddepcontrol.wait" in one["ptx"] for one in (norm, rotation, many, write)]
    assert waits == [capability >= 90] * 4
    assert "fma.rn.f32" not in norm["ptx"] + rotation["ptx"] + many["ptx"]  # each product is rounded
    assert "div.rn.f32" in product["ptx"] and "rsqrt.approx" in norm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        *ROWS_AND_SIZES,
        *((1, 14336), (32, 128), (40, 3584), (16, 5120), (8, 4096)),
        *((512, 4096), (2048, 4096), (8191, 896), (3000, 128), (700, 64)),
    ],
    ids=str,
)
def test_norms_on_a_gpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """In one of the orders equal to the last bit, whatever version of PyTorch this is."""
    for form in NORM_FORMS:
        norm = norm_of(form, shape[1], dtype, "cuda")
        x = [torch.randn(shape, device="cuda").mul(3).to(dtype) for _ in range(10 if shape[0] < 100 else 2)]
        expected, weight = [norm(one) for one in x], norm.weight
        assert any(
            all(
                torch.equal(rms_norm(one, weight, EPS, form, order), exact)
                for one, exact in zip(x, expected, strict=True)
            )
            for order in adding_orders(*shape)
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_others_on_a_gpu(dtype: torch.dtype) -> None:
    for head_dim in (64, 80, 128, 256):
        check_rotary("cuda", dtype, head_dim, 3)
        check_rotary("cuda", dtype, head_dim, 2, 1000)
    gate, up = torch.randn(3, 1, 2 * 14336, device="cuda").mul(4).to(dtype).chunk(2, dim=-1)
    assert torch.equal(silu_product(gate, up), silu_product_reference(gate, up))
    check_write("cuda", dtype, torch.float32)
    memory = torch.full((2, 3, 9, 40), torch.nan, device="cuda", dtype=dtype)
    new, newest = torch.randn(2, 3, 1, 40, device="cuda", dtype=dtype), torch.tensor([8], device="cuda")
    write_token(memory, memory.clone(), newest, new, new)
    assert torch.equal(memory[:, :, 8:], new) and memory[:, :, :8].isnan().all()


if __name__ == "__main__":
    check_norms()
    for dtype, head_dim, batch in ((torch.float32, 32, 2), (torch.bfloat16, 80, 1), (torch.float16, 256, 3)):
        check_rotary("cpu", dtype, head_dim, batch)
        check_rotary("cpu", dtype, head_dim, batch, 17)
        check_write("cpu", dtype, dtype if dtype == torch.bfloat16 else torch.float32)
    gate, up = torch.randn(2, 1, 2 * 700).chunk(2, dim=-1)  # halves of one projection
    torch.testing.assert_close(silu_product(gate, up), silu_product_reference(gate, up))
    print("equal")
