"""Contexts of a server's conversations, read once and kept in a store.

The messages in front of the last one of the user are the context, and that last one is the question. A chat
sends its whole conversation again each time, so the context of an earlier turn is also used for a later one:
it grows by what was said since, until that is longer than the context itself.
"""

import logging
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch

from quantpress.cache.text_cache import TextCache
from quantpress.errors import CacheFileError, InvalidInputError, QuantPressError
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.pipelines.contexts.cached_context import CachedContext
from quantpress.pipelines.contexts.store import ContextStore
from quantpress.pipelines.enabling.user_turns import turn_opening, turn_starts
from quantpress.pipelines.reading.planned import Reading
from quantpress.presses.base_press import BasePress
from quantpress.presses.traits import members
from quantpress.presses.turboquant import TurboQuant

if TYPE_CHECKING:
    from quantpress.pipelines.text_generation import TextGenerationPipeline

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class KnownContext:
    """The beginning of a prompt, for `generate` of an enabled model to go on from.

    Args:
        cache: its keys and values, which belong to one request.
        stored_tokens: how many tokens of it came from the store; 0 if it was read now.
    """

    cache: TextCache
    stored_tokens: int


class ServedContexts:
    """Finds the contexts of prompts in a store, and reads and stores those that are not there.

    A context with fewer tokens than fill a page beside those kept in 16 bits is left to its request. So is
    one that the press cannot work on by itself. If the store fails, requests are answered without it, and
    the reason is logged.

    Args:
        pipe: reads contexts; it has the model that is served.
        store: where they are kept.
        press: what the model is enabled with.

    Raises:
        InvalidInputError: the press acts during decoding, a setting of it has no lasting name, or the chat
            template does not tell turns of the user from other text.
        CacheFileError: the store cannot be used.
    """

    def __init__(self, pipe: "TextGenerationPipeline", store: ContextStore, press: BasePress) -> None:
        self.pipe, self.store, self.press = pipe, store, press
        self._least = least_tokens(press)
        self._opening = turn_opening(pipe.tokenizer)
        self._lock = Lock()  # so that two requests at once for one context read it once
        self.store.get_planned(pipe, self._plan(torch.zeros(1, 1, dtype=torch.int64, device="cpu")))

    def of(self, ids: torch.Tensor) -> KnownContext | None:
        """The context of a prompt; None if the prompt is to be read whole.

        Args:
            ids: [1, T] int64, the prompt.
        """
        starts = [place for place in turn_starts(ids, self._opening) if place >= self._least]
        plans = [self._plan(ids[:, :place].cpu()) for place in reversed(starts) if 2 * place >= starts[-1]]
        if not plans:
            return None
        with self._lock:
            context = self._stored(plans)
            if context is not None:
                return KnownContext(_text_cache(context), context.token_ids.shape[1])
            context = self._read(plans[0])
            return None if context is None else KnownContext(_text_cache(context), 0)

    def _plan(self, ids: torch.Tensor) -> Reading:
        return Reading(ids, "", self.press, progress=False)

    def _stored(self, plans: list[Reading]) -> CachedContext | None:
        try:
            return self.store.get_planned(self.pipe, *plans)
        except CacheFileError as error:
            logger.error("%s; the context is read again", error)
            return None

    def _read(self, plan: Reading) -> CachedContext | None:
        try:
            context = self.pipe.read_planned(plan)
        except InvalidInputError as error:  # such as an evictor that needs more tokens
            logger.warning("the context is read together with its question: %s", error)
            return None
        try:
            self.store.put(plan, context)
        except QuantPressError as error:
            logger.error("the context is not stored: %s", error)
        return context


def least_tokens(press: BasePress) -> int:
    """The number of tokens from which on a context fills a page.

    Example:
        >>> least_tokens(TurboQuant(sink_tokens=4, recent_tokens=16))
        148
    """
    quantizers = [one for one in members(press) if isinstance(one, TurboQuant)]
    return PAGE_TOKENS + sum(one.sink_tokens + one.recent_tokens for one in quantizers)


def _text_cache(context: CachedContext) -> TextCache:
    """The context's cache, as `generate` of an enabled model would have left it."""
    held: Any = context.cache
    cache, tokens = TextCache.of(held), context.token_ids.shape[1]
    cache.has_read(tokens)
    cache.position_shift = tokens - context.tokens_seen
    cache.masked = dict(context.masks)
    return cache
