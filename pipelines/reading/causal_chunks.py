"""Causal attention of a chunk of queries that follows earlier keys, without a mask tensor.

torch's `is_causal` aligns queries and keys at their first tokens, which is wrong for any chunk but the first.
Such a chunk attends twice: to the keys before it without a mask, and to its own with `is_causal`. The two
results are weighted by their sums of exponentials:

    softmax over both = s * before + (1 - s) * own,   s = sigmoid(lse_before - lse_own)

So the kernel that torch would choose for the whole is also the one for the chunks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

from quantpress.kernels.combine import combine_attention

Attended = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Kernel:
    """A kernel of torch that returns sums of exponentials besides attention.

    Args:
        attend: takes query, key, value, whether to be causal, and scale. Returns attention [B, Hq, T, Dv] and
            the logarithm of the sum of exponentials [B, Hq, T, 1] float32.
        prepares: whether each new number of keys needs a preparation (cuDNN: 0.07 s on an H100's host).
    """

    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool, float | None], Attended]
    prepares: bool = False


class NotInChunksError(Exception):
    """This attention cannot be computed over chunks of queries. Callers catch it."""


class CausalChunks(TorchFunctionMode):
    """While inside, causal `scaled_dot_product_attention` aligns queries with the last keys.

    Enter it for each chunk of one attention module, in order. Other calls (with a mask, or of a
    single query) are left as they are.

    Attributes:
        seen: whether `scaled_dot_product_attention` was called.
        behind: the chunk is not the first; calls without a mask are causal if those of the first chunk were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = self.behind = False
        self._kernel: Kernel | None = None
        self._chunk = 0

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
        is_causal = is_causal or (self.behind and attn_mask is None and self._kernel is not None)
        if not is_causal:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, scale=scale, enable_gqa=enable_gqa
            )
        if self._kernel is None:
            self._kernel = None if dropout_p else kernel_of(query, key, value)
            self._chunk = query.shape[2]
        if self._kernel is None:
            raise NotInChunksError
        return attend_last_tokens(self._kernel, query, key, value, scale, self._chunk)


def attend_last_tokens(
    kernel: Kernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
    chunk: int,
) -> torch.Tensor:
    """Causal attention of the last tokens.

    Args:
        kernel: from `kernel_of`.
        query: [B, Hq, t, D], the last t tokens.
        key: [B, Hkv, T, D], T at least t.
        value: [B, Hkv, T, Dv].
        scale: the factor of the scores; None for 1/sqrt(D).
        chunk: the number of queries in every chunk but the last.

    Returns:
        [B, Hq, t, Dv] in the dtype of the query.
    """
    start = key.shape[2] - query.shape[2]
    output, log_sum = kernel.attend(query, key[:, :, start:], value[:, :, start:], True, scale)
    few = kernel.prepares and query.shape[2] == chunk  # the last chunk is a new length anyway
    for first, last in earlier_keys(start, chunk if few else max(start, 1)):
        earlier = kernel.attend(query, key[:, :, first:last], value[:, :, first:last], False, scale)
        combine_attention(output, log_sum, *earlier)
    return output


def earlier_keys(start: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Cut the keys before a chunk of queries into ranges of few different lengths, the last range first.

    Lengths are `chunk` times powers of two, so a text of T tokens has log2(T / chunk) of them. The longest
    range comes last, so most of the output is rounded once.

    Args:
        start: the number of these keys, a multiple of `chunk`.
        chunk: the number of queries in a chunk.

    Yields:
        The first key of a range, and the one after its last.
    """
    chunks = start // chunk
    while chunks:
        rest = chunks & (chunks - 1)  # clears the lowest bit
        yield rest * chunk, chunks * chunk
        chunks = rest


def kernel_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Kernel | None:
    """The kernel that torch chooses for causal attention of these, if it also returns sums of exponentials.

    Args:
        query: [B, Hq, T, D].
        key: [B, Hkv, T, D].
        value: [B, Hkv, T, Dv].

    Returns:
        The kernel, or None if it does not.
    """
    heads = query.shape[1] != key.shape[1]
    choice = torch._fused_sdp_choice(query, key, value, None, 0.0, True, enable_gqa=heads)
    if query.device.type == "cpu":
        return Kernel(_flash_cpu) if choice == SDPBackend.FLASH_ATTENTION.value else None
    if query.device.type != "cuda" or query.shape[-1] % 8 or value.shape[-1] % 8:  # torch pads them elsewhere
        return None
    kernels = {
        SDPBackend.FLASH_ATTENTION.value: Kernel(_flash),
        SDPBackend.CUDNN_ATTENTION.value: Kernel(_cudnn, prepares=True),
    }
    return kernels.get(choice)


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
