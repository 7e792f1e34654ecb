"""The pieces in plain PyTorch, as transformers writes them: the truth that the kernels are held to."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ROUNDED_THEN_WEIGHED = 0
"""weight * (x / rms).to(dtype): Llama, Mistral, Qwen2, Qwen3, Phi3."""
ONE_PLUS_WEIGHT = 1
"""((x / rms) * (1 + weight)).to(dtype), the weight in float32: Gemma."""
WEIGHED_THEN_ROUNDED = 2
"""(weight * (x / rms)).to(dtype): gpt-oss, Olmo 2."""

NORM_FORMS = (ROUNDED_THEN_WEIGHED, ONE_PLUS_WEIGHT, WEIGHED_THEN_ROUNDED)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, form: int) -> Tensor:
    """RMSNorm over the last dimension.

    Args:
        x: [..., N].
        weight: [N].
        eps: added to the mean of squares.
        form: one of `NORM_FORMS`: where it rounds.

    Returns:
        [..., N], in the dtype of x; for `ROUNDED_THEN_WEIGHED` in that of the product of x and weight.
    """
    exact = x.to(torch.float32)
    scaled = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    if form == ROUNDED_THEN_WEIGHED:
        return weight * scaled.to(x.dtype)
    factor = 1.0 + weight.float() if form == ONE_PLUS_WEIGHT else weight
    return (factor * scaled).to(x.dtype)


def rotary_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions: x * cos + rotate_half(x) * sin.

    Args:
        q: [B, Hq, T, D].
        k: [B, Hkv, T, D].
        cos: [B or 1, T, D].
        sin: like cos.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _half_turned(q) * sin, k * cos + _half_turned(k) * sin


def _half_turned(x: Tensor) -> Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-second, first), dim=-1)


def silu_product_reference(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both of one shape and dtype."""
    return F.silu(gate) * up


def linear_reference(
    x: Tensor,
    layers: Sequence[tuple[Tensor, Tensor | None]],
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> list[Tensor]:
    """Linear layers with the same input; residual: added to what a single one gives; out: written with it."""
    outputs = [F.linear(x, weight, bias) for weight, bias in layers]
    if residual is not None:
        outputs = [residual + outputs[0]]
    return outputs if out is None else [out.copy_(outputs[0])]


def gated_linear_reference(x: Tensor, layers: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """silu of one linear layer times another one."""
    return silu_product_reference(*linear_reference(x, layers))


def write_token_reference(
    keys: Tensor, values: Tensor, newest: Tensor, new_keys: Tensor, new_values: Tensor
) -> None:
    """As `quantpress.kernels.joined.write_token`."""
    keys.index_copy_(2, newest, new_keys.to(keys.dtype))
    values.index_copy_(2, newest, new_values.to(values.dtype))
