"""Launches the Triton kernels for an engine's memory: what they support, and their operands."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantpress.kernels.available import FUSED
from quantpress.kernels.blocks.operands import BlockSide, TokenTarget
from quantpress.kernels.blocks.triton_kernel import MOST, pack_blocks_kernel, put_tokens_kernel
from quantpress.kernels.dequantize.triton_dequantize import decode_table_triton, supports_decode
from quantpress.kernels.encode.reference import mark_sinks, page_keys
from quantpress.kernels.encode.triton_encode import (
    DTYPES,
    encode_arguments,
    encode_settings,
    launch_encode,
    supports_encode,
)
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform

MOST_HEAD_DIM = 256
WIDTHS = (2, 3, 4)
WORD = 4  # bytes
MATRIX_PART = 64
"""Rows of a rotation in two halves that are loaded at a time; a head_dim of 80 or 96 has such a rotation."""
PROGRAMS = 256
"""Programs of `pack_blocks_kernel`, unless one would get more than `MOST` entries: most of a GPU's, at two a
multiprocessor. In decoding nearly all find nothing to do, and more of them would only take turns."""

_SIDE = ("BOOK", "ASM", "SQUARES", "UNIT", "C", "CP", "BK", "BITS", "HALVES")  # of the only channel group


def supports_put(keys: Tensor, values: Tensor, targets: Sequence[TokenTarget]) -> bool:
    """Whether the kernel takes this call: channels contiguous everywhere."""
    pools = [pool for target in targets for pool in (target.keys, target.values)]
    return all(one.stride(-1) == 1 for one in (keys, values, *pools))


def put_tokens_triton(keys: Tensor, values: Tensor, targets: Sequence[TokenTarget]) -> None:
    """Store tokens in pages of pools; see `quantpress.kernels.blocks.put_tokens`."""
    with torch.cuda.device(keys.device) if keys.is_cuda else nullcontext():
        put_tokens_kernel[(keys.shape[0], len(targets))](**put_arguments(keys, values, targets), **FUSED)


def put_arguments(keys: Tensor, values: Tensor, targets: Sequence[TokenTarget]) -> dict[str, Any]:
    """The arguments of `put_tokens_kernel` by name; without a second target the first one's are repeated."""
    arguments: dict[str, Any] = {
        "k_ptr": keys,
        "v_ptr": values,
        "k_token": keys.stride(0),
        "k_head": keys.stride(1),
        "v_token": values.stride(0),
        "v_head": values.stride(1),
        "heads": keys.shape[1],
        "D": keys.shape[2],
        "DV": values.shape[2],
        "HP": _power(keys.shape[1]),
        "DP": _power(keys.shape[2]),
        "DVP": _power(values.shape[2]),
    }
    for i in range(2):
        target = targets[min(i, len(targets) - 1)]
        arguments |= {f"rows{i}_ptr": target.rows.contiguous(), f"size{i}": target.keys.shape[2]}
        for name, pool in (("k", target.keys), ("v", target.values)):
            arguments[f"pool_{name}{i}_ptr"] = pool
            steps = zip(("page", "head", "token"), pool.stride(), strict=False)
            arguments |= {f"{name}{i}_{axis}": step for axis, step in steps}
    return arguments


def supports_pack(keys: Tensor, values: Tensor, sides: tuple[BlockSide, BlockSide]) -> bool:
    """Whether the kernel takes this call; see `quantpress.kernels.blocks.pack_blocks`."""
    return all(_supports(x, side) for x, side in zip((keys, values), sides, strict=True))


def _supports(x: Tensor, side: BlockSide) -> bool:
    spec = side.spec
    if spec is None or spec.estimator != "mse" or len(spec.groups) > 1 or side.transform.order is not None:
        return False
    fits = spec.bits in WIDTHS and spec.head_dim <= MOST_HEAD_DIM
    return fits and x.dtype in DTYPES and x.stride(-1) == 1 and _in_words(side)


def _in_words(side: BlockSide) -> bool:
    """Whether pages lie as whole words, and scales together."""
    codes = [plane for name, plane in side.planes.items() if name.startswith(("codes", "sketch"))]
    steps = [step for plane in codes for step in (*plane.stride()[:2], plane.storage_offset())]
    return all(plane.stride(2) == 1 for plane in side.planes.values()) and not any(s % WORD for s in steps)


def pack_blocks_triton(
    keys: Tensor, values: Tensor, pages: Tensor, blocks: Tensor, sides: tuple[BlockSide, BlockSide]
) -> None:
    """Encode pages into packed blocks; see `quantpress.kernels.blocks.pack_blocks`."""
    arguments = pack_arguments(keys, values, pages, blocks, sides, keys.is_cuda)
    programs, heads = pack_programs(len(blocks), sides[0].heads), sides[0].heads
    with torch.cuda.device(keys.device) if keys.is_cuda else nullcontext():
        pack_blocks_kernel[(programs, heads, 2)](**arguments, num_warps=pack_warps(arguments), **FUSED)


def pack_warps(arguments: dict[str, Any]) -> int:
    """Warps of a program of `pack_blocks_kernel`."""
    return 8 if max(arguments["K_CP"], arguments["V_CP"]) > 128 else 4


def pack_programs(entries: int, heads: int) -> int:
    """Programs of `pack_blocks_kernel` for each head and side."""
    most: int = MOST.value
    return max(1, min(entries, PROGRAMS // (2 * heads)), -(-entries // most))


def pack_arguments(
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    blocks: Tensor,
    sides: tuple[BlockSide, BlockSide],
    device: bool,
) -> dict[str, Any]:
    """The arguments of `pack_blocks_kernel` by name; `device`: for a GPU, not for the interpreter."""
    flag = torch.empty(1, dtype=torch.int32, device=keys.device)
    side = sides[0]
    page_keys, queries = "mean0" in side.planes, side.queries
    means, sinks = (side.planes.get(name, side.planes["scale0"]) for name in ("mean0", "sink0"))
    shape = (pack_programs(len(blocks), side.heads), side.heads, side.codec.head_dim)
    arguments: dict[str, Any] = {
        "pages_ptr": pages.contiguous(),
        "blocks_ptr": blocks.contiguous(),
        "entries": len(blocks),
        "flag_ptr": flag,
        "means_ptr": means,
        "sinks_ptr": sinks,
        "page_keys_head": means.stride(0),
        "page_keys_block": means.stride(1),
        "query_mean_ptr": flag if queries is None else queries.mean.contiguous(),
        "query_variance_ptr": flag if queries is None else queries.variance.contiguous(),
        "group": 0 if queries is None else queries.mean.shape[1],
        "scratch_ptr": torch.empty(shape, dtype=torch.float32, device=keys.device),
        "PAGE_KEYS": page_keys,
        "QUERIES": queries is not None,
    }
    for name, x, side in zip("kv", (keys, values), sides, strict=True):
        arguments |= _side_arguments(name, x, side, flag, device)
    return arguments


def _side_arguments(name: str, x: Tensor, side: BlockSide, flag: Tensor, device: bool) -> dict[str, Any]:
    spec = side.spec
    assert spec is not None  # by `supports_pack`
    spec = _without_keys(spec)
    settings = encode_settings(x, spec, roomy=False)
    given = encode_arguments(
        x[:1], spec, side.transform, side.planes, flag, settings, device, direct=False
    )  # of one entry, so that the transform is not expanded
    words, scale = given["words0_ptr"], given["scale0_ptr"]
    arguments = {
        f"{name}_ptr": x,
        **{f"{name}_{axis}": step for axis, step in zip(("page", "head", "token"), x.stride(), strict=False)},
        **{f"{name}_{part}_ptr": given[f"{part}_ptr"] for part in ("mean", "weight")},
        f"{name}_matrix_ptr": given["matrix0_ptr"],
        f"{name}_words_ptr": words,
        f"{name}_words_head": words.stride(0),
        f"{name}_words_block": words.stride(1),
        f"{name}_scale_ptr": scale,
        f"{name}_scale_head": scale.stride(0),
        f"{name}_scale_block": scale.stride(1),
        f"{name}_largest": given["largest"],
        f"{name}_factor": given["factor0"],
    }
    constants = {part: given[f"{part}0"] for part in _SIDE}
    constants |= {part: given[part] for part in ("RULE", "MEAN", "WEIGHT")}
    if constants["HALVES"] == 2:  # both as a whole take 64 KB of shared memory, and more time
        constants["BK"] = min(constants["BK"], MATRIX_PART)
    return arguments | {f"{name.upper()}_{part}": value for part, value in constants.items()}


def supports_blocks(side: BlockSide, dtype: torch.dtype) -> bool:
    """Whether the kernel decodes these blocks where they lie."""
    return side.spec is not None and supports_decode(_without_keys(side.spec), dtype) and _in_words(side)


def decode_blocks_triton(side: BlockSide, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Decode packed blocks to tokens; see `quantpress.kernels.blocks.decode_blocks`."""
    spec = side.spec
    assert spec is not None  # by `supports_blocks`
    shape = (len(blocks) * PAGE_TOKENS, side.heads, spec.head_dim)
    out = torch.empty(shape, dtype=dtype, device=blocks.device)
    keys = ("mean0", "sink0")
    planes = {name: plane.unsqueeze(0) for name, plane in side.planes.items() if name not in keys}
    written, codes = out.transpose(0, 1).unsqueeze(0), _without_keys(spec)
    decode_table_triton(planes, codes, side.transform, blocks.contiguous(), written)
    if spec.page_keys:
        mean, sink = (side.planes[name][:, blocks].unsqueeze(0) for name in keys)
        mean, sink = replace(side.transform, mean=None).invert(mean), side.transform.invert(sink)
        mean, sink = (one[0].transpose(0, 1).unsqueeze(1) for one in (mean, sink))  # [P, 1, Hkv, D]
        place = (side.planes["scale0"][:, blocks] < 0).permute(1, 2, 0).unsqueeze(-1)  # [P, 128, Hkv, 1]
        by_page = out.unflatten(0, (-1, PAGE_TOKENS))
        torch.where(place, sink.to(dtype), by_page.add_(mean), out=by_page)
    return out


def supports_encode_blocks(x: Tensor, spec: CodecSpec) -> bool:
    """Whether the kernel takes what pages code."""
    return supports_encode(x, _without_keys(spec))


def encode_blocks_triton(x: Tensor, side: BlockSide) -> dict[str, Tensor]:
    """Encode whole pages; see `quantpress.kernels.blocks.encode_blocks`."""
    spec, transform = side.spec, side.transform
    assert spec is not None  # by `supports_encode_blocks`
    if not spec.page_keys:
        return launch_encode(x, spec, transform, direct=False)[0]
    pages = x.unflatten(2, (-1, PAGE_TOKENS))
    keys, sinks, rest = page_keys(pages, transform.apply(pages), spec, transform, side.queries)
    coded = launch_encode(rest.flatten(2, 3), _without_keys(spec), ChannelTransform(), direct=False)[0]
    return keys | coded | {"scale0": mark_sinks(coded["scale0"], sinks)}


def _without_keys(spec: CodecSpec) -> CodecSpec:
    """The codec of the codes alone."""
    return replace(spec, page_keys=False) if spec.page_keys else spec


def _power(count: int) -> int:
    """The least power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()
