"""The Triton kernels for 16-bit tokens alone: in the interpreter, compiled without a GPU, and on one."""

import json
from typing import Any

import pytest
import torch

from quantpress.kernels.attend import DenseSegment, Visibility, attend
from quantpress.kernels.attend.operands import PackedSegment
from quantpress.kernels.attend.triton_dense import attend_dense, dense_splits, supports_dense
from tests.kernels.attend.test_attend import packed
from tests.kernels.interpreter import interpret
from tests.kernels.triton_cases import compile_only, more

CASES = [
    [1, 64, 64, 1, "float32", ""],
    [63, 64, 64, 3, "float32", "sinks"],
    [257, 128, 64, 4, "float16", "softcap"],
    [1000, 32, 32, 8, "bfloat16", "lengths"],
    [1000, 64, 64, 20, "float32", "lengths sinks softcap"],
    [700, 256, 256, 2, "float32", "lengths starts"],
    [700, 64, 64, 5, "bfloat16", "lengths starts sinks"],
    [300, 80, 80, 3, "float32", "lengths starts"],
    [257, 192, 40, 4, "float16", ""],
]


def case(
    tokens: int, dim: int, value_dim: int, group: int, dtype: str, extras: str, device: str = "cpu"
) -> tuple[torch.Tensor, DenseSegment, dict[str, Any]]:
    """A query, tokens and options; what is not in use is NaN."""
    kind, heads = getattr(torch, dtype), (2, 2)
    query = torch.randn(2, 2 * group, 1, dim, device=device).to(kind)
    keys, values = (torch.randn(*heads, tokens, d, device=device).to(kind) for d in (dim, value_dim))
    lengths = starts = None
    if "lengths" in extras:
        lengths = torch.randint(1, tokens + 1, heads, device=device, dtype=torch.int32)
        lengths[0, 1] = 0 if "sinks" in extras else 1
        starts = (
            (torch.rand(heads, device=device) * (tokens + 1 - lengths)).int() if "starts" in extras else None
        )
        place, first = torch.arange(tokens, device=device), 0 if starts is None else starts.unsqueeze(-1)
        unused = ((place < first) | (place >= first + lengths.unsqueeze(-1))).unsqueeze(-1)
        keys, values = keys.masked_fill(unused, float("nan")), values.masked_fill(unused, float("nan"))
    options = {
        "scaling": dim**-0.5 * 3,
        "softcap": 4.0 if "softcap" in extras else None,
        "sinks": torch.randn(2 * group, device=device) if "sinks" in extras else None,
    }
    return query, DenseSegment(keys, values, lengths, starts), options


def exact(query: torch.Tensor, segment: DenseSegment, options: dict[str, Any]) -> torch.Tensor:
    """Softmax written out in float64, head by head, over the tokens in use alone."""
    out = query.new_zeros(*query.shape[:3], segment.values.shape[-1], dtype=torch.float64)
    group = query.shape[1] // segment.kv_heads
    for batch in range(query.shape[0]):
        for head in range(query.shape[1]):
            kv = head // group
            start = 0 if segment.starts is None else int(segment.starts[batch, kv])
            count = segment.tokens if segment.lengths is None else int(segment.lengths[batch, kv])
            part = slice(start, start + count)
            scores = (
                segment.keys[batch, kv, part].double() @ query[batch, head, 0].double() * options["scaling"]
            )
            if options["softcap"] is not None:
                scores = options["softcap"] * torch.tanh(scores / options["softcap"])
            if options["sinks"] is not None:
                scores = torch.cat([scores, options["sinks"][head : head + 1].double()])
            weights = scores.softmax(-1)[:count]
            out[batch, head, 0] = weights @ segment.values[batch, kv, part].double()
    return out


def error(*arguments: Any, **where: Any) -> float:
    query, segment, options = case(*arguments, **where)
    visibility = Visibility(1, segment.tokens)
    assert supports_dense(query, [segment], visibility)
    plain = query.device.type == "cpu"
    if plain:
        got = attend_dense(query.float(), [wide(segment)], visibility, plain=True, **options)
    else:
        got = attend(query, [segment], visibility, **options)
        assert got.dtype == query.dtype
    expected = exact(query, segment, options)
    assert got.shape == expected.shape
    return float((got - expected).norm() / expected.norm())


def wide(segment: DenseSegment) -> DenseSegment:
    """In float32: the interpreter's bfloat16 is wrong."""
    return DenseSegment(segment.keys.float(), segment.values.float(), segment.lengths, segment.starts)


def test_interpreter() -> None:
    errors = json.loads(interpret(__file__).splitlines()[-1])
    assert len(errors) == len(CASES)
    assert max(errors) < 1e-5, dict(zip(map(str, CASES), errors, strict=True))


@pytest.mark.parametrize(
    ("capability", "dim", "dtype"),
    [
        (80, 32, torch.float32),
        (90, 128, torch.bfloat16),
        (100, 256, torch.bfloat16),
        more(90, 256, torch.float32),
        more(90, 96, torch.bfloat16),
    ],
    ids=str,
)
def test_compiles_without_a_gpu(capability: int, dim: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from quantpress.kernels.attend.dense import dense_merge_kernel, dense_split_kernel

    states, sums = torch.empty(1, dtype=dtype), torch.empty(1)
    counts = torch.empty(1, dtype=torch.int32)
    shared = {"DV": dim, "R": 8, "SPLITS": 16, "rows": 4, "blocks": 1}
    split = {"query_ptr": states, "k_ptr": states, "v_ptr": states, "used_ptr": counts, "starts_ptr": counts}
    split |= {"o_ptr": sums, "m_ptr": sums, "l_ptr": sums, "scale": 1.0, "softcap": 0.0, "tokens": 4096}
    split |= {"D": dim, "TILE": 32, "USED": True, "STARTS": True, "PLAIN": False}
    merge = {"o_ptr": sums, "m_ptr": sums, "l_ptr": sums, "sinks_ptr": states, "out_ptr": states}
    merge |= {"group": 4, "kv_heads": 2, "HAS_SINKS": True}
    warps = 8 if dim > 128 else 4
    for kernel, arguments in ((dense_split_kernel, split), (dense_merge_kernel, merge)):
        binary = compile_only(kernel, arguments | shared, capability, warps)
        assert len(binary.asm["cubin"]) > 0
        assert binary.metadata.shared <= (99 if dtype == torch.bfloat16 else 160) * 1024


def test_calls_that_are_covered() -> None:
    query, segment, _ = case(100, 64, 64, 2, "float32", "")

    def covered(q: torch.Tensor = query, one: Any = segment, **rule: Any) -> bool:
        return supports_dense(q, [one], Visibility(q.shape[2], 100, **rule))

    assert covered()
    assert not covered(torch.cat([query, query], 2))
    assert not covered(mask=torch.ones(1, 1, 1, 100, dtype=torch.bool))
    assert not covered(dropped=torch.zeros(2, 2, 100, dtype=torch.bool))
    assert not covered(query.bfloat16())
    assert not covered(one=DenseSegment(segment.keys[..., :40], segment.values))  # not contiguous
    wide = torch.randn(2, 2, 100, 264)
    assert not covered(one=DenseSegment(segment.keys, wide))
    assert covered(one=DenseSegment(segment.keys, wide[..., :80].contiguous()))
    assert not covered(one=PackedSegment(packed(64, 64, 4).keys, packed(64, 64, 4).values))
    assert not supports_dense(query, [segment, segment], Visibility(1, 200))


@pytest.mark.parametrize("tokens", [1, 128, 4096, 131072])
@pytest.mark.parametrize("blocks", [1, 8, 1000])
def test_splits_fill_the_gpu(tokens: int, blocks: int) -> None:
    splits = dense_splits(tokens, blocks, 528)
    assert splits & (splits - 1) == 0 and 1 <= splits <= 64
    assert splits == 1 or (splits * blocks <= 528 and splits * 64 < tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("arguments", CASES, ids=str)
def test_error_on_a_gpu(arguments: list[Any]) -> None:
    limit = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 5e-3}[arguments[4]]
    assert error(*arguments, device="cuda") < limit


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_long_context_on_a_gpu(dim: int) -> None:
    assert error(131072, dim, dim, 4, "bfloat16", "", device="cuda") < 5e-3
    assert error(131072, dim, dim, 4, "bfloat16", "lengths starts", device="cuda") < 5e-3


if __name__ == "__main__":
    print(json.dumps([error(*one) for one in CASES]))
