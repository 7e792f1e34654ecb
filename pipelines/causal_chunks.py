"""Causal attention of a chunk of queries that stands behind earlier keys, without a mask tensor.

torch's `is_causal` lines queries and keys up at their first tokens, which is wrong for a chunk that is not
the first. Such a chunk attends twice, to the keys before it without a mask and to its own with `is_causal`,
and the two results are weighed by their sums of exponentials:

    softmax over both = s * before + (1 - s) * own,   s = sigmoid(lse_before - lse_own)

so that whichever kernel torch would take for the whole is also the one for the chunks.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

MERGED_TOKENS = 1024  # weighed at a time, in float32

Attended = tuple[torch.Tensor, torch.Tensor]
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool, float | None], Attended]


class NotInChunksError(Exception):
    """This attention cannot be computed over chunks of queries; never reaches the user."""


class CausalChunks(TorchFunctionMode):
    """While inside, queries of causal `scaled_dot_product_attention` are the last of the keys' tokens.

    Enter it for each chunk of one attention module, the first one first. Calls with a mask, and of a single
    query, are left as they are.

    Attributes:
        seen: whether there was any call of `scaled_dot_product_attention`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = False
        self._kernel: Kernel | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.seen = True
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if not is_causal:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, scale=scale, enable_gqa=enable_gqa
            )
        if self._kernel is None:
            self._kernel = None if dropout_p else kernel_of(query, key, value)
        if self._kernel is None:
            raise NotInChunksError
        return attend_behind(self._kernel, query, key, value, scale)


def attend_behind(
    kernel: Kernel, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Causal attention of the last tokens.

    Args:
        kernel: of `kernel_of`.
        query: [B, Hq, t, D], of the last t tokens.
        key: [B, Hkv, T, D], T at least t.
        value: [B, Hkv, T, Dv].
        scale: of the scores; None for 1/sqrt(D).

    Returns:
        [B, Hq, t, Dv] in the dtype of the query.
    """
    start = key.shape[2] - query.shape[2]
    own, own_sum = kernel(query, key[:, :, start:], value[:, :, start:], True, scale)
    if start == 0:
        return own
    before, before_sum = kernel(query, key[:, :, :start], value[:, :, :start], False, scale)
    share = torch.sigmoid(before_sum - own_sum)
    exact = torch.promote_types(own.dtype, torch.float32)
    for at in range(0, own.shape[2], MERGED_TOKENS):
        rows = (slice(None), slice(None), slice(at, at + MERGED_TOKENS))
        own[rows] = torch.lerp(own[rows].to(exact), before[rows].to(exact), share[rows].to(exact))
    return own


def kernel_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Kernel | None:
    """The kernel that torch takes for causal attention of these, if it also gives sums of exponentials.

    Args:
        query: [B, Hq, T, D].
        key: [B, Hkv, T, D].
        value: [B, Hkv, T, Dv].

    Returns:
        A function of query, key, value, whether to be causal, and scale, that returns attention [B, Hq, T,
        Dv] and the logarithm of the sum of exponentials [B, Hq, T, 1] float32. None where there is none.
    """
    heads = query.shape[1] != key.shape[1]
    choice = torch._fused_sdp_choice(query, key, value, None, 0.0, True, enable_gqa=heads)
    if query.device.type == "cpu":
        return _flash_cpu if choice == SDPBackend.FLASH_ATTENTION.value else None
    if query.device.type != "cuda" or query.shape[-1] % 8 or value.shape[-1] % 8:  # torch pads them elsewhere
        return None
    return {SDPBackend.FLASH_ATTENTION.value: _flash, SDPBackend.CUDNN_ATTENTION.value: _cudnn}.get(choice)


def _flash_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float | None
) -> Attended:
    operation = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return _attended(query, operation(query, key, value, 0.0, causal, scale=scale))


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float | None
) -> Attended:
    operation = torch.ops.aten._scaled_dot_product_flash_attention
    return _attended(query, operation(query, key, value, 0.0, causal, scale=scale))


def _cudnn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float | None
) -> Attended:
    operation = torch.ops.aten._scaled_dot_product_cudnn_attention
    return _attended(query, operation(query, key, value, None, True, 0.0, causal, scale=scale))


def _attended(query: torch.Tensor, found: tuple[torch.Tensor, ...]) -> Attended:
    return found[0], found[1].reshape(*query.shape[:3], 1)
