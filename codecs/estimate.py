"""Inner products with packed vectors of any shape, by `quantpress.kernels.score`."""

from math import prod

import torch
from torch import Tensor

from quantpress.errors import InvalidInputError
from quantpress.kernels.dequantize import to_code_space
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.kernels.score import inner_products
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform


def estimate(
    q: Tensor, planes: dict[str, Tensor], spec: CodecSpec, transform: ChannelTransform, shape: torch.Size
) -> Tensor:
    """Estimate q @ x.T for packed vectors x; see `TurboQuantCodec.inner_product`.

    Args:
        q: [..., Q, D] floating.
        planes: [B, Hkv, P, ...].
        spec: the codec that packed the vectors.
        transform: the channel transform that they were packed with.
        shape: shape of the vectors, [..., N, D] or [D]; the leading dimensions are divided over [B, Hkv] of
            the planes.

    Returns:
        [..., Q, N] float32.

    Raises:
        InvalidInputError: q does not fit the vectors.
    """
    if q.dim() < 2 or q.shape[-1] != spec.head_dim:
        raise InvalidInputError(f"queries must be [..., Q, {spec.head_dim}], got {tuple(q.shape)}")
    lead, vectors = tuple(shape[:-2]), 1 if len(shape) == 1 else shape[-2]
    try:
        outer = torch.broadcast_shapes(q.shape[:-2], lead)
    except RuntimeError as error:
        raise InvalidInputError(
            f"queries {tuple(q.shape)} do not broadcast with vectors {tuple(shape)}"
        ) from error
    query, bias = _prepared(q, spec, transform)
    # Dimensions that only the queries have make more queries of the same vectors.
    own = (1,) * (len(outer) - len(lead)) + lead
    extra = [i for i, size in enumerate(own) if size == 1]
    order = [i for i, size in enumerate(own) if size != 1] + extra + [len(outer), len(outer) + 1]
    spread = query.expand(*outer, *query.shape[-2:]).permute(order)
    grouped = spread.reshape(prod(lead), -1, spec.head_dim)
    scores = _by_entry(grouped, planes, spec, vectors)  # [entries, more queries, N]
    scores = scores.view(*spread.shape[:-1], vectors)
    back = sorted(range(len(order)), key=order.__getitem__)
    return scores.permute(back) + bias.unsqueeze(-1)


def _prepared(q: Tensor, spec: CodecSpec, transform: ChannelTransform) -> tuple[Tensor, Tensor]:
    """Queries in code space, and their inner products with the mean key [..., Q]."""
    parts = list(transform.tensors().values())
    if parts and parts[0].shape[:2] == (1, 1):  # shared by all vectors
        flat = q.reshape(1, 1, -1, q.shape[-1])
        query = to_code_space(transform.query(flat), spec)
        return query.view(q.shape), transform.bias(flat).view(q.shape[:-1])
    return to_code_space(transform.query(q), spec), transform.bias(q)


def _by_entry(query: Tensor, planes: dict[str, Tensor], spec: CodecSpec, vectors: int) -> Tensor:
    """Scores of each entry of [entries, Q, D] with its own vectors of the pages: [entries, Q, vectors]."""
    entries, queries, dim = query.shape
    batch, heads, pages = planes["codes0"].shape[:3]
    rows = batch * heads
    if entries == rows:
        scores = inner_products(query.view(batch, heads, queries, dim), planes, spec)
        return scores.view(rows, queries, pages * PAGE_TOKENS)[..., :vectors]
    out = query.new_zeros(entries, queries, vectors)
    each = max(1, entries // max(1, rows))  # entries that follow each other in the pages of a row
    for entry in range(entries if vectors else 0):
        row, start = entry // each, entry % each * vectors
        first, last = start // PAGE_TOKENS, (start + vectors - 1) // PAGE_TOKENS + 1
        b, h = divmod(row, heads)
        touched = {name: plane[b : b + 1, h : h + 1, first:last] for name, plane in planes.items()}
        scores = inner_products(query[entry][None, None], touched, spec)[0, 0]
        offset = start - first * PAGE_TOKENS
        out[entry] = scores[:, offset : offset + vectors]
    return out
