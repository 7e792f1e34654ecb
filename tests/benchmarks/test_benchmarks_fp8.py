"""The FP8 baseline of the attention benchmark: interpreted, compiled without a GPU, and on one."""

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tests.benchmarks.loading import benchmark
from tests.kernels.interpreter import interpret
from tests.kernels.ptx import run_ptx
from tests.kernels.triton_cases import compile_only, more, resources

CASES = [[1, 1, 1, 32, 64], [2, 2, 3, 333, 64], [1, 2, 4, 1000, 128], [1, 1, 20, 100, 64]]
"""Batch, KV heads, query heads of each, tokens, head_dim."""


@pytest.fixture(scope="module")
def fp8() -> Iterator[ModuleType]:
    """benchmarks/fp8_attention.py as a module; the search path is put back."""
    path = list(sys.path)
    yield benchmark("fp8_attention")
    sys.path[:] = path


def error(fp8: Any, batch: int, kv_heads: int, group: int, tokens: int, dim: int, device: str) -> float:
    """The largest relative error of a head, under two settings."""
    query = torch.randn(batch, kv_heads * group, 1, dim, device=device)
    cache = fp8.random_cache(batch, kv_heads, tokens, dim, device)
    worst = 0.0
    for settings in fp8.SETTINGS[:2]:
        got = fp8.attend_fp8(query, cache, settings, plain=device == "cpu").double()
        for head in range(kv_heads):
            expected = fp8.exact(query, cache, head)
            part = got[:, head * group : (head + 1) * group]
            worst = max(worst, float((part - expected).norm() / expected.norm()))
    return worst


def test_interpreter() -> None:
    errors = json.loads(interpret(__file__).splitlines()[-1])
    assert len(errors) == len(CASES) and max(errors) < 1e-5, errors


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, [1, 8, 4, 20000, 256]], ids=str)
def test_error_on_a_gpu(fp8: ModuleType, case: list[int]) -> None:
    assert error(fp8, *case, device="cuda") < 2e-3


def test_every_byte_is_decoded_by_the_assembly(fp8: ModuleType) -> None:
    """Each of the 256 bytes at each of the four places of a register."""
    place = np.arange(256, dtype=np.uint32)
    codes = np.concatenate([(place + turn) % 256 for turn in range(4)]).reshape(4, 256).astype(np.uint8)
    words = np.ascontiguousarray(codes.T).view(np.uint32)[:, 0]
    text = sys.modules["fp8_kernel"].DECODE.value
    even, odd = (half.view(np.float16).reshape(256, 2) for half in run_ptx(text, [words], 2))
    expected = torch.from_numpy(np.ascontiguousarray(codes.T)).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(np.stack([even[:, 0], odd[:, 0], even[:, 1], odd[:, 1]], 1), expected)


@pytest.mark.parametrize("dim", [more(64), 128, more(256)])
def test_compiles_without_a_gpu(fp8: ModuleType, dim: int) -> None:
    kernels = sys.modules["fp8_kernel"]
    states, words, sums = (
        torch.empty(1, dtype=kind) for kind in (torch.bfloat16, torch.int16, torch.float32)
    )
    pointers = {"query_ptr": states, "k_ptr": words, "v_ptr": words, "out_ptr": states}
    pointers |= dict.fromkeys(("o_ptr", "m_ptr", "l_ptr"), sums)
    shared = {"scale": 1.0, "tokens": 4096, "splits": 7, "group": 4, "D": dim, "CHAINED": True, **pointers}
    settings = fp8.SETTINGS[3]
    split = {"ROWS": 16, "TILE": settings.tile, "STAGES": settings.stages, "PLAIN": False}
    compiled = compile_only(kernels.fp8_split_kernel, shared | split, 90, settings.warps)
    taken = resources(compiled)
    assert compiled.metadata.shared <= 227 * 1024 and taken["REG"] <= 168
    assert taken["STACK"] <= 16  # Triton 3.9 needs a few bytes
    for name in ("cp.async", "ldmatrix", "cvt.rn.f16x2.e4m3x2", "mma.sync"):
        assert name in compiled.asm["ptx"], name
    assert "ld.shared.b8" not in compiled.asm["ptx"]  # values reach the tensor cores in words
    merge = {"SPLITS": 32, "CHANNELS": 32}
    assert compile_only(kernels.fp8_merge_kernel, shared | merge, 90, 4).asm["cubin"]


@pytest.mark.parametrize(
    ("heads", "tiles", "programs", "expected"),
    [(8, 1024, 264, 32), (512, 32, 396, 3), (8, 64, 528, 64), (1, 2048, 528, 256), (600, 1, 132, 1)],
)
def test_splits_leave_little_of_the_gpu_idle(
    fp8: ModuleType, heads: int, tiles: int, programs: int, expected: int
) -> None:
    assert sys.modules["fp8_triton"].split_count(heads, tiles, programs) == expected


@pytest.mark.parametrize("missing", ["vllm", "a part of it"])
def test_without_vllm_only_our_kernel_is_tried(
    missing: str, fp8: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def supported(version: int) -> bool:
        raise ImportError("file too short")  # of what it loads only now

    library = None if missing == "vllm" else ModuleType("vllm")
    monkeypatch.setitem(sys.modules, "vllm", library)
    if library is not None:
        library.vllm_flash_attn = ModuleType("vllm.vllm_flash_attn")  # type: ignore[attr-defined]
        library.vllm_flash_attn.is_fa_version_supported = supported
        monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", library.vllm_flash_attn)
    fp8.flash_attention.cache_clear()
    assert {name.split(",")[0] for name, _ in fp8.ways()} == {"Triton"}
    assert "FlashAttention 3 is left out" in capsys.readouterr().err
    fp8.flash_attention.cache_clear()


class Library:
    """What `flash` asks of vLLM's FlashAttention, in float64."""

    def get_scheduler_metadata(self, **asked: Any) -> dict[str, Any]:
        assert asked["num_heads_q"] == 6 and asked["cache_seqlens"].tolist() == [512, 512]
        return asked

    def flash_attn_varlen_func(self, q: Any, k: Any, v: Any, **asked: Any) -> torch.Tensor:
        assert asked["scheduler_metadata"]["page_size"] in (None, k.shape[1]) and asked["fa_version"] == 3
        assert {one.shape for one in (asked[f"{name}_descale"] for name in "qkv")} == {(2, 2)}
        assert k.stride(-1) == v.stride(-1) == 1 and asked["cu_seqlens_q"].tolist() == [0, 1, 2]
        if asked["block_table"] is not None:
            k, v = (one.view(torch.uint8)[asked["block_table"]].flatten(1, 2).view(q.dtype) for one in (k, v))
        q, k, v = (
            states.double() * asked[f"{name}_descale"].flatten()[0]
            for name, states in (("q", q), ("k", k), ("v", v))
        )
        grouped = q.unflatten(1, (2, 3))  # [B, Hkv, G, D]
        weights = torch.softmax(torch.einsum("bhgd,bnhd->bhgn", grouped, k) * q.shape[-1] ** -0.5, -1)
        return torch.einsum("bhgn,bnhd->bhgd", weights, v).flatten(1, 2).bfloat16()


def test_the_fastest_way_that_is_right_is_taken(fp8: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention is called over one buffer and over pages; ways that are wrong or fail are named."""

    def failing(query: torch.Tensor, cache: Any) -> Any:
        raise TypeError("too large")

    def wrong(query: torch.Tensor, cache: Any) -> Any:
        return lambda: torch.zeros_like(query)

    ways = [("failing", failing), ("wrong", wrong)]
    ways += [(str(page), partial(fp8.flash, page, 0)) for page in (None, 16, 256)]
    times = iter([30.0, 20.0, 25.0, 19.5])
    monkeypatch.setattr(fp8, "flash_attention", Library)
    monkeypatch.setattr(fp8, "ways", lambda: ways)
    monkeypatch.setattr(fp8, "caches", lambda size: 2)
    monkeypatch.setattr(fp8, "microseconds", lambda *calls, **options: next(times))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    found, failed = fp8.baselines(2, 2, 3, 512, 64, device="cpu")
    assert [(one.name, one.us) for one in found] == [("16", 19.5), ("256", 25.0), ("None", 30.0)]
    assert all(0.005 < one.error < 0.05 for one in found)  # the query's rounding
    assert failed == ["failing: TypeError too large", "wrong: RuntimeError error 1.0e+00"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert fp8.baselines(2, 2, 3, 512, 64) == ([], [])


@pytest.mark.parametrize("with_fp8", [True, False])
def test_a_written_file_is_read_back(
    fp8: ModuleType, with_fp8: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import attention_rows as rows

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    baseline = rows.Measured("Triton", 70.0, 1e-3) if with_fp8 else None
    shapes = [rows.Shape(1, 8, 4, 8192, 128), rows.Shape(1, 8, 4, 8192, 128, "table")]
    written = [
        rows.Row(shape, bits, 2, 40.0 + bits, 10**6 * bits, 2e-3, 120.0, baseline)
        for shape in shapes
        for bits in (4, 3)
    ]
    path = tmp_path / "rows.json"
    path.write_text(rows.results(written))
    assert rows.read(path) == written and rows.read(None) == []
    assert json.loads(path.read_text())["machine"] == "one H200"


if __name__ == "__main__":
    module = benchmark("fp8_attention")
    print(json.dumps([error(module, *case, device="cpu") for case in CASES]))
