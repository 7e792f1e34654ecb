"""Measures how a compressed cache changes a continuation: divergence, agreement and likelihood by token."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from quantpress.cache import cache_memory, host
from quantpress.errors import InvalidInputError, NonFiniteError
from quantpress.evaluation.divergence.attention_error import AttentionError, attention_errors
from quantpress.evaluation.divergence.documents import Document
from quantpress.evaluation.divergence.reference import Reference, read_reference
from quantpress.evaluation.divergence.teacher_forcing import CHUNK_TOKENS, kl_divergence, score_continuation
from quantpress.pipelines.reading.read_context import read_context
from quantpress.pipelines.rollback import model_rollback
from quantpress.presses.base_press import BasePress
from quantpress.presses.traits import members, traits_of


@dataclass(frozen=True)
class DocumentDivergence:
    """One document over one cache, token by token.

    Args:
        kl: KL(uncompressed || compressed) in nats.
        agree: whether both find the same token most likely.
        nll: -log p of the next token over the compressed cache, in nats.
        reference_nll: -log p of the next token over the uncompressed cache, in nats.
        resident_bytes: measured bytes of the context's cache, this document's share of its batch.
        uncompressed_bytes: bytes of all tokens of the context in the model's own dtype.
        numbers: how many numbers the keys and values of those tokens have.
        seconds: time for reading, packing and scoring, this document's share of its batch.
        attention: errors of attention per layer and head; None unless asked for.
    """

    kl: list[float]
    agree: list[bool]
    nll: list[float]
    reference_nll: list[float]
    resident_bytes: float
    uncompressed_bytes: float
    numbers: float
    seconds: float
    attention: AttentionError | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, in six digits."""
        tokens = {name: _six_digits(getattr(self, name)) for name in ("kl", "nll", "reference_nll")}
        return {
            **tokens,
            "agree": [int(one) for one in self.agree],
            "resident_bytes": self.resident_bytes,
            "uncompressed_bytes": self.uncompressed_bytes,
            "numbers": self.numbers,
            "seconds": round(self.seconds, 3),
            "attention": None if self.attention is None else self.attention.as_dict(),
        }


class DivergenceProbe:
    """Documents read once by the uncompressed model, with which any number of arms is compared.

    Args:
        model: decoder-only.
        documents: documents of equal length, read as one batch.
        queries: number of queries to compare attention with; 0 leaves attention out.
        chunk_tokens: tokens of the continuation that are fed at once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        documents: Sequence[Document],
        *,
        queries: int = 0,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        self.model, self.context = model, documents[0].context
        self.queries, self.chunk_tokens = queries, chunk_tokens
        self.ids = torch.stack([document.ids for document in documents]).to(model.device)
        with torch.inference_mode():
            self.reference = read_reference(model, self.ids, self.context, queries)

    def over(self, press: BasePress | None, *, one_by_one: bool = False) -> list[DocumentDivergence]:
        """Read the documents under a press and score their continuations over the cache that it leaves.

        Args:
            press: what compresses the cache; None shows what chunks and rounding alone change.
            one_by_one: read one document at a time, for a press that takes no batch.

        Returns:
            One result for each document.

        Raises:
            InvalidInputError: the press cannot compress contexts of this length.
            NonFiniteError: the logits over this cache hold NaN or infinity.
        """
        count = self.ids.shape[0]
        entries = [slice(i, i + 1) for i in range(count)] if one_by_one else [slice(0, count)]
        return [result for some in entries for result in self._over(press, some)]

    @torch.inference_mode()
    def kl_over(self, cache: Cache) -> list[list[float]]:
        """KL of each token of the continuations over a cache that holds all contexts, unevicted.

        Args:
            cache: it grows by the continuations.

        Raises:
            NonFiniteError: the logits over this cache hold NaN or infinity.
        """
        kl: list[list[float]] = self._scored(cache, self.context, self.ids, self.reference)[0]
        return kl

    @torch.inference_mode()
    def _over(self, press: BasePress | None, entries: slice) -> list[DocumentDivergence]:
        ids, context, reference = self.ids[entries], self.context, self.reference.of(entries)
        cache, begin = host.empty_cache(self.model), time.perf_counter()
        with model_rollback(self.model), torch.random.fork_rng([ids.device] if ids.is_cuda else []):
            torch.manual_seed(0)  # some presses draw random projections
            position = read_context(self.model, ids[:, :context], cache, press, progress=False)
            memory = cache_memory(cache)
            with _named_failure(press):
                ordered = not _moves_tokens(press)
                errors = (
                    attention_errors(self.model, reference, cache, memory, ordered) if self.queries else None
                )
                kl, agree, nll, reference_nll = self._scored(cache, position, ids, reference)
        batch, seconds = ids.shape[0], time.perf_counter() - begin
        whole = context * sum(layer.token_bytes for layer in memory.layers)
        return [
            DocumentDivergence(
                kl[i],
                agree[i],
                nll[i],
                reference_nll[i],
                memory.total_bytes / batch,
                whole / batch,
                whole * memory.numbers / memory.uncompressed_bytes / batch,
                seconds / batch,
                errors[i] if errors else None,
            )
            for i in range(batch)
        ]

    def _scored(
        self, cache: Cache, position: int, ids: torch.Tensor, reference: Reference
    ) -> list[list[Any]]:
        """What `_compare` finds over the whole continuation."""
        chunks, done = [], 0
        continuation = ids[:, self.context :]
        for other in score_continuation(self.model, cache, continuation, position, self.chunk_tokens):
            end = done + other.shape[1]
            exact = reference.log_probs[:, done:end]
            chunks.append(_compare(exact, other, continuation[:, done + 1 : end + 1]))
            done = end
        columns = [torch.cat(column, dim=1) for column in zip(*chunks, strict=True)]
        if not all(bool(column.isfinite().all()) for column in columns):
            raise NonFiniteError("the logits over this cache are not finite; try another dtype or press")
        return [column.tolist() for column in columns]


def _moves_tokens(press: BasePress | None) -> bool:
    """Whether the compressed cache holds its tokens in another order than the text."""
    return any(traits_of(one).demotes or getattr(one, "detect_sinks", 0) for one in members(press))


@contextmanager
def _named_failure(press: BasePress | None) -> Iterator[None]:
    """Name the press where kvpress finds no made-up key that hides a token from several queries."""
    try:
        yield
    except ValueError as error:
        if "fake keys" not in str(error):
            raise
        raise InvalidInputError(
            f"kvpress cannot hide the tokens that {press!r} evicts from single heads from several queries at "
            "once; put TurboQuant behind it, which leaves them out"
        ) from error


def _compare(exact: torch.Tensor, other: torch.Tensor, next_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[B, n] each: divergence, agreement, negative log-likelihoods."""
    index = next_ids.unsqueeze(-1)
    return (
        kl_divergence(exact, other),
        exact.argmax(-1) == other.argmax(-1),
        -other.gather(-1, index).squeeze(-1),
        -exact.gather(-1, index).squeeze(-1),
    )


def _six_digits(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
