"""One answer: `model.generate` on top of a context that was read, and maybe evicted and packed, before."""

from collections.abc import Mapping
from typing import Any

import torch
from kvpress import BasePress
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from quantpress.cache import continue_inputs
from quantpress.cache.tokens.evicted_slots import MASKS, named_to_hide
from quantpress.errors import InvalidInputError
from quantpress.pipelines.arguments import GENERATE
from quantpress.pipelines.capture.captured import check_choice
from quantpress.presses.models.support import attention_modules
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
    """Answer one question. The cache grows (or, with beams, is repeated): put it back afterwards.

    Args:
        model: has read the context into `cache`.
        cache: K tokens kept of it.
        context_ids: [1, N] ids of the context; only assisted decoding looks at them.
        question_ids: [1, Q].
        tokens_seen: the position that the question starts at.
        config: from `answer_config`.
        arguments: what `model.generate` takes beside a configuration; other entries are left alone.

    Returns:
        [A] ids of the answer.

    Raises:
        InvalidInputError: a decoding method that cannot work on this cache.
    """
    extras = {name: arguments[name] for name in EXTRAS if name in arguments}
    history = None
    if is_assisted(config, arguments):
        history = _last_ids(context_ids, uniform_length(cache))
        if (streamer := extras.get("streamer")) is not None:
            extras["streamer"] = _WithoutHistory(streamer, history.shape[1])
    inputs = continue_inputs(cache, question_ids, tokens_seen=tokens_seen, history=history)
    if (config.num_beams or 1) > 1:
        _repeat(model, cache, config.num_beams)
    generate: Any = model.generate
    ids: torch.Tensor = generate(**inputs, past_key_values=cache, generation_config=config, **extras)
    return ids[0, inputs["input_ids"].shape[1] :]


def check_decoding(config: GenerationConfig, arguments: Mapping[str, Any], press: BasePress | None) -> None:
    """Refuse, before anything is read, what cannot work together.

    Raises:
        InvalidInputError: several sequences or guesses at once under a press that acts during decoding (it
            keeps notes of one sequence, token by token), or a streamer for beams.
    """
    beams = (config.num_beams or 1) > 1
    if beams and arguments.get("streamer") is not None:
        raise InvalidInputError("a streamer cannot follow beam search; leave out streamer or num_beams")
    acting = decode_time_presses(press)
    if acting and (beams or is_assisted(config, arguments)):
        raise InvalidInputError(
            f"{type(acting[0]).__name__} acts during decoding, on one sequence, one token at a time; "
            "leave out num_beams and assisted decoding"
        )


def decides_capture(
    model: PreTrainedModel,
    config: GenerationConfig,
    arguments: Mapping[str, Any],
    press: BasePress | None,
    cuda_graph: bool | None,
    compile: bool = False,
) -> bool:
    """Whether answers may be decoded under `captured_decoding`.

    Args:
        model: of the call.
        config: from `answer_config`.
        arguments: the generation arguments.
        press: of the call.
        cuda_graph: the pipeline's.
        compile: the pipeline's.

    Raises:
        InvalidInputError: one of them is True and something rules it out, or is no bool.
    """
    check_choice(cuda_graph)
    if not isinstance(compile, bool):
        raise InvalidInputError(f"compile is {compile!r}; give True or False")
    if cuda_graph is False and compile:
        raise InvalidInputError("compile=True, but cuda_graph=False; leave one of them out")
    if cuda_graph is False:
        return False
    reason = _rules_out_capture(model, config, arguments, press)
    refuse_capture(reason, cuda_graph, compile)
    return reason is None


def refuse_capture(reason: str | None, cuda_graph: bool | None, compile: bool = False) -> None:
    """Refuse an argument that asks for what `reason` rules out.

    Raises:
        InvalidInputError: there is a reason, and cuda_graph or compile is True.
    """
    if reason is not None and (cuda_graph or compile):
        asked = "cuda_graph" if cuda_graph else "compile"
        raise InvalidInputError(f"{asked}=True, but {reason}; leave {asked} out")


def _rules_out_capture(
    model: PreTrainedModel,
    config: GenerationConfig,
    arguments: Mapping[str, Any],
    press: BasePress | None,
) -> str | None:
    reason = rules_out_press(model, press)
    if reason is not None:
        return reason
    if (config.num_beams or 1) > 1:
        return "beams reorder the cache between tokens"
    if is_assisted(config, arguments):
        return "assisted decoding checks several tokens at once"
    return None


def rules_out_press(model: PreTrainedModel, press: BasePress | None) -> str | None:
    """Why no answer of this model under this press can be decoded by graphs; None when it can."""
    if model.device.type != "cuda":
        return f"the model is on {model.device}"
    acting = decode_time_presses(press)
    return f"{type(acting[0]).__name__} acts during decoding" if acting else None


def is_assisted(config: GenerationConfig, arguments: Mapping[str, Any]) -> bool:
    """Whether several tokens are guessed and checked at once."""
    guesses = (arguments.get("assistant_model"), config.prompt_lookup_num_tokens, config.assistant_early_exit)
    return any(guess is not None for guess in guesses)


def uniform_length(cache: Cache) -> int:
    """Tokens kept in every layer.

    Raises:
        InvalidInputError: layers keep different numbers of tokens, so no single length can be cropped to.
    """
    lengths = {layer.get_seq_length() for layer in cache.layers}
    if len(lengths) != 1:
        raise InvalidInputError(
            f"layers keep {min(lengths)} to {max(lengths)} tokens; assisted and prompt-lookup decoding crop "
            "them all to one length, so use a press that keeps the same number in every layer"
        )
    return lengths.pop()


def _last_ids(context_ids: torch.Tensor, kept: int) -> torch.Tensor:
    """[1, K] ids that stand for the kept tokens: guesses are copied from them, so real text serves best."""
    missing = kept - context_ids.shape[1]
    if missing > 0:  # presses that add tokens of their own
        context_ids = torch.cat([context_ids[:, :1].expand(-1, missing), context_ids], dim=1)
    return context_ids[:, context_ids.shape[1] - kept :]


def _repeat(model: PreTrainedModel, cache: Cache, beams: int) -> None:
    """The context once for each beam: its tokens, and what head-wise presses masked."""
    cache.batch_repeat_interleave(beams)
    for module in attention_modules(model):
        masks: Any = named_to_hide(module)
        if masks is not None:
            batch, *rest = masks
            beam = torch.arange(beams, device=batch.device)
            repeated = [index.repeat_interleave(beams) for index in rest]
            setattr(module, MASKS, [(batch[:, None] * beams + beam).flatten(), *repeated])


class _WithoutHistory(BaseStreamer):
    """Hands on everything but the ids of the context, which come first with the question."""

    def __init__(self, streamer: BaseStreamer, history: int) -> None:
        self.streamer, self.history = streamer, history

    def put(self, value: torch.Tensor) -> None:
        self.streamer.put(value[..., self.history :])
        self.history = 0

    def end(self) -> None:
        self.streamer.end()
