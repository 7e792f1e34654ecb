"""Inner products of queries with packed vectors from their codes, without decoding a vector.

reference.py        plain PyTorch, a chunk of pages at a time
page_scores.py      the kernel that scores the keys that pages store beside their codes, for `kernels.attend`
"""

import torch
from torch import Tensor

from quantpress.errors import InvalidInputError
from quantpress.kernels.dequantize.reference import check_planes
from quantpress.kernels.score.reference import inner_products_reference
from quantpress.quantization.numerics import in_named_dtypes
from quantpress.quantization.spec import CodecSpec

__all__ = ["inner_products"]


@in_named_dtypes
def inner_products(query: Tensor, planes: dict[str, Tensor], spec: CodecSpec) -> Tensor:
    """Estimate q.x for every query and packed vector.

    For each channel group the query is multiplied by the levels of the codes, and the sum by the scale of the
    vector. The "prod" estimator adds sqrt(pi/2) / D * residual norm * (S q).signs, for which the query is
    multiplied by S once. The workspace is that of a chunk of pages, whatever their number.

    Args:
        query: [B, Hkv, Q, D] float32 in code space, see `quantpress.kernels.dequantize.to_code_space`.
        planes: what `encode_pages` returned, B x Hkv x P pages.
        spec: the codec that made them.

    Returns:
        [B, Hkv, Q, 128 * P] float32.

    Raises:
        InvalidInputError: the planes or the query do not fit the codec, or not each other; or pages store
            keys beside their codes.

    Source: TurboQuant, arXiv 2504.19874, Algorithms 1 and 2; QJL, arXiv 2406.03482.
    """
    batch, heads, _ = check_planes(planes, spec)
    if spec.page_keys:
        raise InvalidInputError(
            f"{spec} has keys beside its codes, which are not scored here; decode the pages"
        )
    fits = query.dim() == 4 and query.shape[:2] == (batch, heads) and query.shape[-1] == spec.head_dim
    if not fits or query.dtype != torch.float32:
        raise InvalidInputError(
            f"queries must be float32 [{batch}, {heads}, Q, {spec.head_dim}], got {query.dtype} "
            f"{tuple(query.shape)}"
        )
    return inner_products_reference(query, planes, spec)
