"""One model behind transformers' own server, which speaks OpenAI's API over HTTP.

`transformers.cli.serve.Serve` calls `model.generate` for each request, so an enabled model packs the cache of
every request. What is used of `Serve` is the same in transformers 5.2 to 5.24: two of its arguments,
`start_server`, `server`, and an object with `load_model_and_processor` and `force_model`. That object is the
`Serve` itself up to 5.4 and its `_model_manager` later.
"""

import json
import logging
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel, TextIteratorStreamer

from quantpress.cache import host
from quantpress.cache.memory import CacheMemory, cache_memory
from quantpress.errors import ContextTooLongError, InvalidInputError, QuantPressError
from quantpress.pipelines.enabling.generate_call import token_count
from quantpress.pipelines.enabling.served_contexts import ServedContexts
from quantpress.pipelines.method_replacement import MethodReplacement
from quantpress.pipelines.reading.chunked_prefill import chunked_prefill
from quantpress.presses.models.positions import position_count

logger = logging.getLogger(__name__)

NEW_TOKENS = 1024
"""Most new tokens of an answer if neither the request nor the model says more, as in transformers' server."""

_OF_THE_CALLER = (ValueError, TypeError, LookupError, QuantPressError)
_FAILURES: ContextVar[list[Exception]] = ContextVar("failures of a request")
_STREAMED = 'data: {"error": "', '"}'


@dataclass(frozen=True)
class Answer:
    """One request that was answered.

    Args:
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens of the answer.
        memory: bytes of the cache at the end, which is freed then.
        stored_tokens: tokens of the prompt that came from a store of contexts and were not read.
    """

    prompt_tokens: int
    new_tokens: int
    memory: CacheMemory
    stored_tokens: int = 0


class ModelServer:
    """transformers' server over a model that is loaded already, and over no other.

    Every request reads its whole conversation, unless its beginning is in a store of contexts; no other cache
    is kept from one request to the next. Prompts are read in chunks (`chunked_prefill`). An error is answered
    with status 400, or with 500 if the request is not to blame; within a stream, where the status is sent
    already, it is the last event.

    Args:
        model: decoder-only, as `enable` leaves it. It gets at least `NEW_TOKENS` for its answers.
        tokenizer: its tokenizer, with a chat template.
        name: what clients call the model.
        note: called after each answer, in the thread that made it.
        contexts: keeps the contexts of conversations; None reads every prompt whole.

    Attributes:
        server: a `uvicorn.Server` that has not started. `server.run(sockets=[...])` serves until Ctrl-C or
            until `server.should_exit` is set. Requests that are being answered then fail at their next token.

    Raises:
        InvalidInputError: the server of the installed transformers is built differently.
        ImportError: fastapi, uvicorn or openai is not installed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        name: str,
        note: Callable[[Answer], None],
        contexts: ServedContexts | None = None,
    ) -> None:
        self.model, self.tokenizer, self.note, self.contexts = model, tokenizer, note, contexts
        made: Any = _unstarted()
        loader = getattr(made, "_model_manager", made)
        if not (hasattr(loader, "load_model_and_processor") and hasattr(loader, "force_model")):
            raise _built_differently()
        loader.force_model = name
        loader.load_model_and_processor = lambda *_, **__: (model, tokenizer)
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": "local"}]
        loader.get_gen_models = loader.list_models = lambda *_: listed
        self.server = made.server
        self.server.config.app.middleware("http")(self._answer_errors)
        model.config.architectures = model.config.architectures or [type(model).__name__]
        settings: Any = model.generation_config
        settings.max_new_tokens = max(settings.max_new_tokens or 0, NEW_TOKENS)
        self._replaced = [
            MethodReplacement(model, "forward", self._forward),
            MethodReplacement(model, "generate", self._generate),
        ]

    def close(self) -> None:
        """Give the model its own methods back."""
        for replaced in self._replaced:
            replaced.undo()

    def _forward(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        if token_count(args, kwargs) == 1:
            return forward(*args, **kwargs)
        with chunked_prefill(self.model):
            return forward(*args, **kwargs)

    def _generate(self, generate: Any, *args: Any, **kwargs: Any) -> Any:
        """`model.generate`, whose cache is measured and not handed on."""
        streamer, config = kwargs.get("streamer"), kwargs["generation_config"]
        whole = kwargs.pop("return_dict_in_generate", False)
        config.return_dict_in_generate = True  # the server makes a configuration for each request
        kwargs.setdefault("tokenizer", self.tokenizer)  # which strings that end an answer need
        positions = position_count(self.model.config)
        try:
            prompt = next(kwargs[name] for name in ("input_ids", "inputs") if name in kwargs)
            tokens = int(prompt.shape[1])
            if positions is not None and tokens > positions:
                raise ContextTooLongError(
                    f"the prompt has {tokens} tokens, the model has {positions} positions; shorten it"
                )
            known = None if self.contexts is None else self.contexts.of(prompt)
            if known is not None:
                kwargs[host.generate_cache()] = known.cache
            output = generate(*args, **kwargs, stopping_criteria=[self._go_on])
        except Exception as error:
            logger.error("%s: %s", type(error).__name__, error)
            if not isinstance(streamer, TextIteratorStreamer):
                raise
            streamer.text_queue.put(_Failure(error))  # the request waits for text, in another thread
            return SimpleNamespace(past_key_values=None)  # all that this one looks at
        memory = cache_memory(output.past_key_values)
        stored = 0 if known is None else known.stored_tokens
        self.note(Answer(tokens, output.sequences.shape[1] - tokens, memory, stored))
        output.past_key_values = None  # transformers up to 5.4 would keep it
        return output if whole else output.sequences

    def _go_on(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """A stopping criterion that stops nothing unless the server ends."""
        if self.server.should_exit:
            raise RuntimeError("the server is shutting down")
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    async def _answer_errors(self, request: Any, call_next: Any) -> Any:
        from fastapi.responses import JSONResponse

        failures: list[Exception] = []
        _FAILURES.set(failures)
        try:
            return await call_next(request)
        except Exception as error:
            cause = failures[0] if failures else error
            status = 400 if isinstance(cause, _OF_THE_CALLER) else 500
            if status == 500:
                logger.error("a request failed", exc_info=cause)
            return JSONResponse(_error(f"{type(cause).__name__}: {cause}"), status)


class _Failure:
    """Stands in the queue of a streamer and raises an error in the request that waits for text."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __eq__(self, other: object) -> bool:  # TextIteratorStreamer compares what it takes out
        _FAILURES.get([]).append(self.error)
        raise self.error


def _unstarted() -> Any:
    """transformers' server, which does not listen yet and has no model."""
    try:
        from transformers.cli.serve import Serve
    except ModuleNotFoundError as error:
        raise _built_differently() from error

    class Unstarted(Serve):  # type: ignore[misc, unused-ignore]
        def start_server(self) -> None: ...

        def is_continuation(self, req: Any) -> bool:
            """Up to 5.4: whether to go on from the last cache, which may be that of another request."""
            return False

        @staticmethod
        def chunk_to_sse_element(chunk: Any) -> str:
            """Up to 5.4: an event of a stream; of an error it has the text, and fails."""
            if not isinstance(chunk, str):
                return Serve.chunk_to_sse_element(chunk)  # type: ignore[attr-defined, no-any-return, unused-ignore]
            message = chunk.removeprefix(_STREAMED[0]).removesuffix(_STREAMED[1])
            return f"data: {json.dumps(_error(message))}\n\n"

    try:
        made = Unstarted(non_blocking=True, log_level="warning")
    except TypeError as error:
        raise _built_differently() from error
    if not hasattr(made, "server"):
        raise _built_differently()
    return made


def _error(message: str) -> Mapping[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": "error", "param": None, "code": None}}


def _built_differently() -> InvalidInputError:
    import transformers

    return InvalidInputError(
        f"the server of transformers {transformers.__version__} is built differently from that of 5.2 to "
        "5.24, which quantpress knows; install one of those"
    )
