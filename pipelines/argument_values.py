"""What kind of value an argument of the pipeline takes; transformers would fail on others in the middle."""

from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import Cache, GenerationConfig

from quantpress.errors import InvalidInputError

Kind: TypeAlias = tuple[str, Callable[[Any], bool]]
"""What to give, in words, and whether a value is that."""


def _whole(least: int) -> Kind:
    return f"a whole number, {least} or more", lambda value: _is_whole(value) and value >= least


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _are_texts(value: Any) -> bool:
    return all(map(_is_text, value if _is_list(value) else [value]))


def _are_token_ids(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or all(map(_is_whole, value if _is_list(value) else [value]))


def _is_streamer(value: Any) -> bool:
    return all(callable(getattr(value, name, None)) for name in ("put", "end"))


_KINDS: dict[str, Kind] = {
    **dict.fromkeys(
        ("chunk_tokens", "encoder_no_repeat_ngram_size", "min_new_tokens", "no_repeat_ngram_size", "top_k"),
        _whole(0),
    ),
    **dict.fromkeys(
        (
            "max_context_length",
            "max_matching_ngram_size",
            "max_new_tokens",
            "num_assistant_tokens",
            "num_beam_groups",
            "num_beams",
            "prompt_lookup_num_tokens",
        ),
        _whole(1),
    ),
    **dict.fromkeys(
        (
            "assistant_confidence_threshold",
            "diversity_penalty",
            "encoder_repetition_penalty",
            "epsilon_cutoff",
            "eta_cutoff",
            "guidance_scale",
            "length_penalty",
            "max_time",
            "min_p",
            "penalty_alpha",
            "repetition_penalty",
            "temperature",
            "top_h",
            "top_p",
            "typical_p",
        ),
        ("a number", _is_number),
    ),
    **dict.fromkeys(
        (
            "do_sample",
            "enable_thinking",
            "progress",
            "question_aware",
            "remove_invalid_values",
            "renormalize_logits",
            "report",
        ),
        ("True or False", lambda value: isinstance(value, bool)),
    ),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), ("a token id", _are_token_ids)),
    **dict.fromkeys(("logits_processor", "stopping_criteria"), ("a list", _is_list)),
    "answer_prefix": ("a str", _is_text),
    "assistant_model": ("a model that guesses", lambda value: isinstance(value, nn.Module)),
    "cache": ("an empty cache, such as DynamicCache()", lambda value: isinstance(value, Cache)),
    "generation_config": ("a GenerationConfig", lambda value: isinstance(value, GenerationConfig)),
    "stop_strings": ("a str, or a list of them", _are_texts),
    "streamer": ("a streamer, such as TextStreamer(tokenizer)", _is_streamer),
}


def check_values(arguments: Mapping[str, Any]) -> None:
    """Refuse values of another kind than their argument takes. None means an argument's default.

    Raises:
        InvalidInputError: names the argument, the value and what to give.

    Example:
        >>> check_values({"max_new_tokens": "5"})
        Traceback (most recent call last):
        quantpress.errors.InvalidInputError: max_new_tokens is '5'; give a whole number, 1 or more
    """
    for name, value in arguments.items():
        if value is not None and name in _KINDS:
            words, fits = _KINDS[name]
            if not fits(value):
                raise InvalidInputError(f"{name} is {value!r}; give {words}")
