"""One call on a model, and every later `generate` uses a compressed cache."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from quantpress.errors import InvalidInputError, UnsupportedModelError
from quantpress.pipelines.capture.eligibility import JoinKernels, check_choice, refuse, why_not
from quantpress.pipelines.enabling.enabled import Enabled
from quantpress.pipelines.press_argument import ENABLED, PressOrBits, chosen_press
from quantpress.presses.models.lock import model_lock
from quantpress.presses.traits import traits_of


def enable(
    model: PreTrainedModel,
    press: PressOrBits = None,
    *,
    cuda_graph: bool | None = None,
    join_kernels: JoinKernels = True,
    question_aware: bool = True,
    **options: Any,
) -> Enabled:
    """Compress the cache of every later `model.generate`, and change nothing else.

    Everything that calls `generate` benefits: transformers' pipelines, `transformers serve`, code of others.
    The prompt is read under the press. The press's context ends before the first new token, or, for presses
    that act during decoding, with the call. A cache that `generate` has made may be given back to it with the
    whole conversation, as transformers' users do, and is continued. Caches of the caller's own, calls with
    use_cache=False and forwards outside `generate` are left alone; use_cache=False in the model's own
    configuration is overridden. `TextGenerationPipeline` takes the press of an enabled model if it is given
    none.

    On CUDA the decode steps of greedy and sampled calls replay graphs, as in `captured_decoding`. Each call
    makes its own graphs and frees them at its end. `captured_decoding(model)` around the calls replaces them.

    Greedy, sampled, beam, assisted and prompt-lookup decoding work. Rejected guesses are dropped from the
    cache; with codes they may move the moment at which a page is packed, so assisted decoding gives the same
    tokens as greedy decoding only with a lossless codec.

    Threads may call `generate` at the same time: they take turns, forward by forward.

    Args:
        model: decoder-only, with `generate`.
        press: a press, a press class, a list of them (`Compose`), text (`parse_press`), code bits, or the
            name of a preset, of `TurboQuant` or `Compose`; None for `TurboQuant()`.
        cuda_graph: None decodes by replaying graphs on CUDA where possible. What a call or a press rules out
            by its nature (beams, guesses, presses that act during decoding) decodes without a graph and
            without a warning, anything else after one warning. True turns both into errors. False never makes
            a graph.
        join_kernels: which kernels of ours the graphs, and the forward over the prompt, have in place of
            PyTorch's, as for `captured_decoding`.
            "exact" leaves logits equal to the last bit, False leaves the model's own kernels.
        question_aware: True, which cannot be changed: `generate` is given a whole prompt, and the press sees
            all of it, with the question at its end. kvpress's evaluation calls this query_aware. To read a
            context before its question is known, use `TextGenerationPipeline.read`.
        **options: fields of `TurboQuant`, if press is a number of bits, a preset or None; with a preset of
            `Compose` also compression_ratio.

    Returns:
        The `Enabled` that is now on the model. `disable(model)` removes it, and so does leaving it as a
        context.

    Raises:
        InvalidInputError: the model is enabled already, the arguments cannot be used, question_aware is
            False, or the model or the press rules out cuda_graph=True. Later calls of `generate` raise it for
            a static or quantized cache, prefill_chunk_size or continuous batching; for assisted decoding from
            a prompt that an evictor thins out; and for anything that rules out cuda_graph=True.
        CompositionError: the presses do not go together.
        UnsupportedModelError: the model's cache cannot be packed, or `generate` does not make it.

    Example:
        >>> # enable(model, 4)
        >>> # model.generate(**inputs, max_new_tokens=100)
        >>> # disable(model)
        >>> # with enable(model, Compose([SnapKV, TurboQuant(bits=3)])):
        >>> #     model.generate(**inputs, max_new_tokens=100)
    """
    check_model(model)
    check_choice(cuda_graph, join_kernels=join_kernels)
    if question_aware is not True:
        raise InvalidInputError(
            f"question_aware={question_aware!r}: generate reads whole prompts, and the press sees all of "
            "each; to read a context before its question, use TextGenerationPipeline"
        )
    chosen = chosen_press(press, options)
    refuse(why_not(device=model.device, press=chosen), cuda_graph)
    with model_lock(model):
        if ENABLED in vars(model):
            raise InvalidInputError(
                f"{type(model).__name__} is enabled already, with {vars(model)[ENABLED].press!r}; "
                "call disable(model) first"
            )
        if not any(traits_of(member).at_exit for member in chosen):
            with chosen(model):  # what cannot work with this model says so now
                pass
        return Enabled(model, chosen, cuda_graph, join_kernels)


def disable(model: PreTrainedModel) -> None:
    """Undo `enable`: the model is as it was. Does nothing if the model is not enabled.

    Waits for calls of `generate` that run in other threads.

    Raises:
        InvalidInputError: something else has replaced a method of the model since.
        UnsupportedModelError: `model` is not a model.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"a {type(model).__name__} is no model; give the one that was enabled")
    state = vars(model).get(ENABLED)
    if state is not None:
        state.disable()


def check_model(model: Any) -> None:
    """Refuse a model that does not generate, or whose cache `generate` does not make.

    Raises:
        UnsupportedModelError: the message says which of the two.
    """
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers model that generates; give a ...ForCausalLM, or "
            "the model inside an adapter (`get_base_model()`)"
        )
    dynamic: Any = model._supports_default_dynamic_cache
    if not dynamic():
        raise UnsupportedModelError(
            f"{type(model).__name__} makes a cache of its own kind, which cannot be compressed"
        )
