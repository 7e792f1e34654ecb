"""Packages with a kernel that attends to codes."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from .calls import Attention

PAGE = 16
"""Tokens of a page: what vLLM takes if it is not told, and these packages by default."""


def pages(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Table [1, P] of pages in a row, and length [1], of one sequence; int32."""
    table = torch.arange(keys.shape[2] // PAGE, dtype=torch.int32, device=keys.device)
    return table[None], torch.full_like(table[:1], keys.shape[2])


def by_token(states: torch.Tensor) -> torch.Tensor:
    """[T, Hkv, D] of [1, Hkv, T, D]."""
    return states[0].transpose(0, 1).contiguous()


def aither(bits: int, keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor) -> Attention:
    """`TQPagedAttention` (Triton; 4 bits alone: at other widths it loops over tokens in Python)."""
    from turboquant.fused_attention import TQPagedAttention
    from turboquant.quantizer import TurboQuant

    quantizer = TurboQuant(head_dim=keys.shape[3], bits=bits, device=str(keys.device))
    table, length = pages(keys)
    sides = [
        part.unflatten(0, (-1, PAGE))
        for states in (keys, values)
        for part in quantizer.encode(by_token(states))
    ]
    attention = TQPagedAttention(quantizer, num_query_heads=query.shape[1])
    call = partial(attention.forward, query[:, :, 0], *sides, table, length, block_size=PAGE)
    return Attention({"": call}, sides)


def turboquant_vllm(bits: int, keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor) -> Attention:
    """`fused_paged_tq4_decode`, the kernel of its vLLM backend, on a cache laid out as there."""
    from turboquant_vllm import TurboQuantMSE
    from turboquant_vllm.triton import fused_paged_tq4_decode, tq4_compress, tq4_decompress

    quantizer = TurboQuantMSE(keys.shape[3], bits)
    rotation, centroids, boundaries = (
        one.to(keys.device)
        for one in (quantizer.rotation, quantizer.codebook.centroids, quantizer.codebook.boundaries)
    )
    halves = [rotation.T[:, start::2].contiguous() for start in (0, 1)]
    sides = [tq4_compress(by_token(states), *halves, boundaries) for states in (keys, values)]
    row = [part.flatten(1).contiguous().view(torch.uint8) for side in sides for part in side]
    cache = torch.cat(row, dim=1).unflatten(0, (-1, PAGE))
    heads, dim = keys.shape[1], keys.shape[3]
    call = partial(
        fused_paged_tq4_decode, query[:, :, 0], cache, *pages(keys), centroids, rotation, heads, dim, PAGE
    )

    def decoded() -> tuple[torch.Tensor, torch.Tensor]:
        whole = [
            (tq4_decompress(*side, centroids, torch.float32) @ rotation).transpose(0, 1)[None]
            for side in sides
        ]
        return whole[0], whole[1]

    return Attention({"": call}, cache, decoded=decoded)


def turbo_attn(bits: int, keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor) -> Attention:
    """`tq_splitk_batch_decode` on tensor cores, uncalibrated: the best of the tiles and splits it tunes over.

    The output stays rotated, as when served: turbo-attn folds that rotation into the output projection.
    """
    os.environ.setdefault("TKV_DECODE_LAUNCHER", "1")  # the same kernels, compiled in seconds
    os.environ.setdefault("TKV_KERNEL_STORE_URL", "off")
    from tkv import TkvCodec
    from tkv.kernels.loaders import TkvDecodeLoader
    from tkv.kernels.turbo_attn_simt import DECODE_HPW_MMA, SHARED_TILE_TOKENS, tq_splitk_batch_decode
    from tkv.runtime.cache_views import compute_cache_views
    from tkv.runtime.layout import page_layout

    kv_heads, head_dim = keys.shape[1], keys.shape[3]
    codec = TkvCodec(head_dim=head_dim, k_bit_width=bits, v_bit_width=bits, device=str(keys.device))
    slot = page_layout(kv_heads, head_dim, [(bits, bits)], PAGE).layers[0]
    table = pages(keys)[0][0]
    cache = torch.zeros(len(table), PAGE, slot.stride, dtype=torch.uint8, device=keys.device)
    offsets = {name: getattr(slot, name) for name in ("k_norm_off", "v_packed_off", "v_norm_off")}
    views = compute_cache_views(cache, num_kv_heads=kv_heads, k_pd=slot.k_pd, v_pd=slot.v_pd, **offsets)
    sides = [codec.compress_k(by_token(keys)), codec.compress_v(by_token(values))]
    targets = ((views.k_packed, views.k_norms_bf16), (views.v_packed, views.v_norms_bf16))
    for target, side in zip(targets, sides, strict=True):
        for into, part in zip(target, side, strict=True):
            into.copy_(part.view(into.shape))
    loader = TkvDecodeLoader.from_compressed(
        kv_cache=cache,
        k_centroids=codec.k_centroids,
        v_centroids=codec.v_centroids,
        paged_kv_indptr=torch.tensor([0, len(table)], dtype=torch.int32, device=keys.device),
        paged_kv_indices=table,
        paged_kv_last_page_len=torch.full_like(table[:1], PAGE),
        page_size=PAGE,
        num_kv_heads=kv_heads,
        k_packed_off=slot.k_packed_off,
        k_packed_dim=slot.k_pd,
        v_packed_dim=slot.v_pd,
        k_bw=bits,
        v_bw=bits,
        **offsets,
    )
    scale = (codec.k_per_channel_scale * head_dim**-0.5).contiguous()
    fixed = {"loader": loader, "fuse_q_rot": True, "q_prescale": scale, "hpw": DECODE_HPW_MMA}
    call = partial(tq_splitk_batch_decode, query[:, :, 0].contiguous(), **fixed)
    tiles = {tile: partial(call, tile_tokens=tile) for tile in SHARED_TILE_TOKENS}
    if keys.is_cuda:
        first, *others = [partial(one, num_splits=32) for one in tiles.values()]
        first()
        with ThreadPoolExecutor() as pool:  # a compiler each
            list(pool.map(lambda one: one(), others))
    calls = {
        f"tile {tile}, {splits} splits": partial(one, num_splits=splits)
        for tile, one in tiles.items()
        for splits in (32, 64, 128, 256)
    }

    def decoded() -> tuple[torch.Tensor, torch.Tensor]:
        whole = codec.decompress_k(*sides[0]), codec.decompress_v(*sides[1])
        return whole[0].transpose(0, 1)[None], whole[1].transpose(0, 1)[None]

    return Attention(calls, cache, finish=codec.unrotate_output, decoded=decoded)
