"""One answer: `model.generate` over a context that was read, and perhaps evicted and packed, before."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer

from quantpress.cache import PackedLayer, host
from quantpress.cache.continuation import inputs_after
from quantpress.errors import InvalidInputError
from quantpress.pipelines.arguments import GENERATE
from quantpress.pipelines.attention_masks import fitted_masks, repeat_hidden_slots
from quantpress.pipelines.capture.captured import capturing
from quantpress.pipelines.capture.eligibility import TOKEN_BY_TOKEN, JoinKernels
from quantpress.pipelines.method_replacement import MethodReplacement
from quantpress.pipelines.report import Stopwatch
from quantpress.pipelines.rollback import context_rollback
from quantpress.presses.base_press import BasePress
from quantpress.presses.guard import guarded
from quantpress.presses.traits import decode_time_presses

EXTRAS = ({*GENERATE} - {"generation_config"}) | {"tokenizer"}


def generate_ids(
    model: PreTrainedModel,
    cache: Cache,
    context_ids: torch.Tensor,
    question_ids: torch.Tensor,
    tokens_seen: int,
    config: GenerationConfig,
    arguments: Mapping[str, Any],
) -> torch.Tensor:
    """Answer one question. The cache grows, and beams repeat it: the caller rolls it back afterwards.

    Args:
        model: has read the context into `cache`.
        cache: K tokens kept of the context.
        context_ids: [1, N] ids of the context; only assisted decoding reads them.
        question_ids: [1, Q] ids of the question.
        tokens_seen: the position at which the question starts.
        config: from `answer_config`.
        arguments: what `model.generate` takes besides a configuration. Other entries are ignored.

    Returns:
        [A] ids of the answer.

    Raises:
        InvalidInputError: assisted decoding over layers that keep different numbers of tokens.
    """
    extras = {name: arguments[name] for name in EXTRAS if name in arguments}
    history = None
    if generation_mode(config, arguments) == GenerationMode.ASSISTED_GENERATION:
        history = _last_ids(context_ids, uniform_length(cache))
        if (streamer := extras.get("streamer")) is not None:
            extras["streamer"] = _WithoutHistory(streamer, history.shape[1])
    inputs = inputs_after(cache, question_ids, tokens_seen=tokens_seen, history=history)
    if (config.num_beams or 1) > 1:
        host.repeat_batch(cache, config.num_beams)
        repeat_hidden_slots(model, config.num_beams)
    generate: Any = model.generate
    fed = (
        None
        if history is None
        else MethodReplacement(model, "prepare_inputs_for_generation", host.feed_new_tokens)
    )
    try:
        ids: torch.Tensor = generate(
            **inputs, **{host.generate_cache(): cache}, generation_config=config, **extras
        )
    finally:
        if fed is not None:
            fed.undo()
    return ids[0, inputs["input_ids"].shape[1] :]


@contextmanager
def asking(
    model: PreTrainedModel, cache: Cache, press: BasePress | None, watch: Stopwatch | None = None
) -> Iterator[None]:
    """While inside, one question is answered; at the end the context is rolled back.

    Args:
        model: has read the context.
        cache: holds the context.
        press: its members that act during decoding do so inside.
        watch: adds up "decode".
    """
    with ExitStack() as stack:
        stack.enter_context(context_rollback(cache, model, press))
        stack.enter_context(fitted_masks(model, cache))
        for member in decode_time_presses(press):
            stack.enter_context(guarded(member, model))
        if watch is not None:
            stack.enter_context(watch.measure("decode"))
        yield


@contextmanager
def capturing_answers(
    model: PreTrainedModel,
    cache: Cache,
    new_tokens: int,
    cuda_graph: bool | None,
    compile: bool,
    join_kernels: JoinKernels,
) -> Iterator[None]:
    """While inside, answers are decoded by graphs, with capacity for one question and its answer."""
    for layer in cache.layers:
        if isinstance(layer, PackedLayer):
            layer.reserve(new_tokens)
    with capturing(model, new_tokens, cuda_graph, compile, join_kernels, shared=False):
        yield


def generation_mode(config: GenerationConfig, arguments: Mapping[str, Any]) -> GenerationMode:
    """How `model.generate` decodes with this configuration and these arguments."""
    return config.get_generation_mode(arguments.get("assistant_model"))


def check_decoding(mode: GenerationMode, arguments: Mapping[str, Any], press: BasePress | None) -> None:
    """Refuse, before anything is read, what cannot work together.

    Raises:
        InvalidInputError: a streamer is given for beams, or as for `check_decode_time_press`.
    """
    if "beam" in mode.value and arguments.get("streamer") is not None:
        raise InvalidInputError("a streamer cannot follow beam search; leave out streamer or num_beams")
    check_decode_time_press(mode, press)


def check_decode_time_press(mode: GenerationMode, press: BasePress | None) -> None:
    """Refuse ways of decoding that a press cannot follow: it keeps notes of one sequence, token by token.

    Raises:
        InvalidInputError: the press acts during decoding, and a step decodes several sequences or tokens.
    """
    acting = decode_time_presses(press)
    if acting and mode not in TOKEN_BY_TOKEN:
        raise InvalidInputError(
            f"{type(acting[0]).__name__} acts during decoding, on one sequence, one token at a time; "
            "leave out num_beams and assisted decoding"
        )


def uniform_length(cache: Cache) -> int:
    """The number of tokens that every layer keeps.

    Raises:
        InvalidInputError: layers keep different numbers of tokens, so no single length can be cropped to.
    """
    lengths: set[int] = {layer.get_seq_length() for layer in host.token_layers(cache)}
    if len(lengths) != 1:
        raise InvalidInputError(
            f"layers keep {min(lengths)} to {max(lengths)} tokens; assisted and prompt-lookup decoding crop "
            "them all to one length, so use a press that keeps the same number in every layer"
        )
    return lengths.pop()


def _last_ids(context_ids: torch.Tensor, kept: int) -> torch.Tensor:
    """[1, K] ids that stand for the kept tokens: guesses are copied from them, so real text works best."""
    missing = kept - context_ids.shape[1]
    if missing > 0:  # presses that add tokens of their own
        context_ids = torch.cat([context_ids[:, :1].expand(-1, missing), context_ids], dim=1)
    return context_ids[:, context_ids.shape[1] - kept :]


class _WithoutHistory(BaseStreamer):
    """Passes on everything but the ids of the context, which arrive together with the question."""

    def __init__(self, streamer: BaseStreamer, history: int) -> None:
        self.streamer, self.history = streamer, history

    def put(self, value: torch.Tensor) -> None:
        self.streamer.put(value[..., self.history :])
        self.history = 0

    def end(self) -> None:
        self.streamer.end()
