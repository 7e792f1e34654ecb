"""Scoring a given continuation after a context, over whatever cache the press has left.

The context is read once, under the press. The continuation is then fed through the *compressed* cache, a
chunk at a time, and the model's distribution of each next token is compared. A single forward of the whole
text would never touch a packed cache. The first token after the context is not scored: its distribution
comes from the prefill, which reads no compressed token.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional
from transformers import Cache, PreTrainedModel

from quantpress.cache import host
from quantpress.errors import InvalidInputError
from quantpress.pipelines.attention_masks import fitted_masks
from quantpress.presses.models.lock import model_lock
from quantpress.quantization.numerics import in_named_dtypes

CHUNK_TOKENS = 64


def score_continuation(
    model: PreTrainedModel,
    cache: Cache,
    continuation_ids: torch.Tensor,
    position: int,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Iterator[torch.Tensor]:
    """Log-probabilities of the next token after each token of a continuation but its last.

    Args:
        model: decoder-only; it has read the context into `cache`.
        cache: the compressed context, which grows by the continuation.
        continuation_ids: [B, N] int64, N >= 2.
        position: position of its first token.
        chunk_tokens: tokens fed at once; each attends to the compressed context and to what came before it.

    Yields:
        [B, n, V] float32, n <= chunk_tokens, N - 1 in all; entry i predicts token i + 1.

    Raises:
        InvalidInputError: the continuation has fewer than two tokens, or `chunk_tokens` is below 1.
    """
    if continuation_ids.dim() != 2 or continuation_ids.shape[1] < 2 or chunk_tokens < 1:
        raise InvalidInputError(
            f"a continuation of shape {tuple(continuation_ids.shape)} in chunks of {chunk_tokens}; "
            "give [batch, tokens] with two tokens or more, and one or more a chunk"
        )
    fed = continuation_ids[:, :-1]
    with fitted_masks(model, cache), float32_logits(model):
        for start in range(0, fed.shape[1], chunk_tokens):
            ids = fed[:, start : start + chunk_tokens]
            positions = torch.arange(position + start, position + start + ids.shape[1], device=ids.device)
            named = {host.cache_name(model): cache}
            output = model(input_ids=ids, position_ids=positions.expand(ids.shape), **named)
            yield output.logits.float().log_softmax(-1)


@contextmanager
def float32_logits(model: PreTrainedModel) -> Iterator[None]:
    """Make the language-modelling head multiply in float32 while inside; other threads wait.

    Logits in bf16 are rounded to steps of up to 0.125, which adds about 1e-3 nats to every divergence.
    """
    with model_lock(model):
        yield from _float32_logits(model)


def _float32_logits(model: PreTrainedModel) -> Iterator[None]:
    head = model.get_output_embeddings()
    if head is None or not isinstance(getattr(head, "weight", None), torch.Tensor):
        yield
        return
    weight = head.weight.float()
    bias = head.bias.float() if isinstance(getattr(head, "bias", None), torch.Tensor) else None
    own = vars(head).get("forward")

    @in_named_dtypes
    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return functional.linear(hidden.float(), weight, bias)

    head.forward = forward
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own


def kl_divergence(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(reference || other) in nats, of log-probabilities [..., V] -> [...] float32, clamped at 0."""
    return (reference.exp() * (reference - other)).sum(-1).clamp(min=0)
