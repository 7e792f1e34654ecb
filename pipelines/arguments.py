"""Which arguments the pipeline takes, and how it refuses the others.

Nothing is ignored: an argument that is wrong or would have no effect is an error before the context is read.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from quantpress.errors import InvalidInputError, did_you_mean
from quantpress.pipelines.press_argument import as_press
from quantpress.presses.traits import decode_time_presses, members, short_repr, traits_of

DEFAULT_NEW_TOKENS = 50  # kvpress's
READING = ("answer_prefix", "enable_thinking", "max_context_length")
RUNNING = (
    "cache",
    "chunk_tokens",
    "compile",
    "cuda_graph",
    "join_kernels",
    "press",
    "progress",
    "question_aware",
    "report",
)
ALIASES = {"compress_questions": "question_aware", "query_aware": "question_aware"}
"""The names that kvpress's evaluation gives to arguments, or gave: its pipeline has no such argument."""
LOADING = ("local_files_only",)  # transformers.pipeline leaves it among a pipeline's own arguments

# What model.generate takes besides the fields of GenerationConfig, and the pipeline passes on.
GENERATE = (
    "assistant_model",
    "assistant_tokenizer",
    "generation_config",
    "logits_processor",
    "prefix_allowed_tokens_fn",
    "stopping_criteria",
    "streamer",
    "synced_gpus",
)
FIELDS = frozenset(name for name in vars(GenerationConfig()) if not name.startswith("_"))
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

_CACHE_REMEDY = "the context is read into a DynamicCache; give another one as cache="
_TEXT_REMEDY = "the pipeline returns text; call model.generate with quantpress.continue_inputs for more"
REFUSED = {
    "cache_config": _CACHE_REMEDY,
    "cache_implementation": _CACHE_REMEDY,
    "is_assistant": "it is transformers' own mark",
    "max_length": "give max_new_tokens",
    "min_length": "give min_new_tokens",
    "num_return_sequences": "repeat the question in questions=",
    "output_attentions": _TEXT_REMEDY,
    "output_hidden_states": _TEXT_REMEDY,
    "output_logits": _TEXT_REMEDY,
    "output_scores": _TEXT_REMEDY,
    "past_key_values": _CACHE_REMEDY,
    "prefill_chunk_size": "give chunk_tokens, which stays exact with every press",
    "return_dict_in_generate": _TEXT_REMEDY,
    "seed": "call transformers.set_seed before",
    "token_healing": "it would change the end of the question",
    "use_cache": _CACHE_REMEDY,
}
NO_EFFECT = {"num_return_sequences": (None, 1), "use_cache": (None, True)}


def asked(question: str | None, questions: Sequence[str] | None) -> list[str]:
    """The questions as a list. No question is one empty question, as in kvpress.

    Raises:
        InvalidInputError: both are given, `question` is a list, `questions` is no list or empty, or a
            question is not a str.
    """
    if question is not None and questions is not None:
        raise InvalidInputError("both question and questions are given; give one of them")
    if isinstance(question, (list, tuple)):
        raise InvalidInputError(f"question is {question!r}; give one str, or the list as questions=")
    several = isinstance(questions, Iterable) and not isinstance(questions, (str, Mapping))
    if questions is not None and not (several and questions):
        raise InvalidInputError(f"questions is {questions!r}; give a list of at least one str, or question=")
    wanted = ["" if question is None else question] if questions is None else list(questions)
    for one in wanted:
        if not isinstance(one, str):
            raise InvalidInputError(f"a question is of type {type(one).__name__}; give a str")
    return wanted


def with_own_names(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments under our names (`ALIASES`).

    Raises:
        InvalidInputError: an argument is given under both its names.
    """
    named = dict(arguments)
    for name, own in ALIASES.items():
        if name in named and own in named:
            raise InvalidInputError(f"{name} is {own} under another name, and both are given; give one")
        if name in named:
            named[own] = named.pop(name)
    return named


def check_generation_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that neither the pipeline nor `model.generate` knows, or that have no effect here.

    Raises:
        InvalidInputError: an argument is refused; the message names it, and the remedy or the closest name.
    """
    for name, value in arguments.items():
        if name in REFUSED:
            _refuse(name, value)
        elif name not in FIELDS and name not in GENERATE:
            known = sorted({*FIELDS, *GENERATE, *READING, *RUNNING, "question", "questions"} - set(REFUSED))
            hint = did_you_mean(name, known) or "see TextGenerationPipeline for those it takes"
            raise InvalidInputError(f"unknown argument {name!r}; {hint}")


def check_asking(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that only affect reading, for a context that was read before.

    Raises:
        InvalidInputError: an argument is refused; the message names it.
    """
    reading = {*READING, "cache", "chunk_tokens", "progress"} - {"answer_prefix"}
    for name in sorted(reading & set(arguments)):
        raise InvalidInputError(f"{name} has no effect on a context that was read before; give it to read()")
    press = as_press(arguments.get("press"))
    if press is not None and not decode_time_presses(press):
        raise InvalidInputError(
            f"{short_repr(press)} acts while a context is read, and this one was read before; give it to "
            "read(), or leave it out"
        )
    if any(traits_of(member).keeps_scores for member in members(press)):
        raise InvalidInputError(
            "DMSPress goes by scores of the prefill; give it with the text of the context"
        )


def check_reading(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that do not affect reading.

    Raises:
        InvalidInputError: an argument is refused; the message names it, and those that `read` takes.
    """
    known = ("press", "chunk_tokens", "progress", "max_context_length", "enable_thinking")
    for name in sorted(set(arguments) - set(known)):
        if ALIASES.get(name, name) == "question_aware":
            raise InvalidInputError(
                f"{name}: read() reads a context without a question; call the pipeline with the text itself, "
                "question= and question_aware=True"
            )
        raise InvalidInputError(f"{name} has no effect on reading; read takes {', '.join(known)}")


class AnswerConfig(GenerationConfig):
    """A configuration that `model.generate` uses as it is, without defaults from the model's own."""

    @classmethod
    def of(cls, given: GenerationConfig | None) -> "AnswerConfig":
        """A copy of a configuration; None gives an empty one."""
        config = cls()
        for name, value in vars(given).items() if given is not None else ():
            setattr(config, name, copy.deepcopy(value))
        return config

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **entries: Any) -> Any:
        if defaults_only and allow_custom_entries:  # only `generate` does so, with the model's own entries
            return entries
        return super().update(defaults_only, allow_custom_entries, **entries)


def answer_config(model: PreTrainedModel, arguments: Mapping[str, Any]) -> AnswerConfig:
    """The complete generation configuration of an answer.

    Without sampling it takes only the special tokens from the model's own configuration, so that a repetition
    penalty there does not change greedy answers (kvpress's are a plain argmax). With `do_sample=True` the
    model's own configuration fills in what is not given, as in `model.generate`.

    Args:
        model: its generation_config is read, not changed.
        arguments: the generation arguments of the call. They override a `generation_config` among them.

    Raises:
        InvalidInputError: a field of the given generation_config cannot be used here.
    """
    config = AnswerConfig.of(arguments.get("generation_config"))
    config.update(**{name: value for name, value in arguments.items() if name in FIELDS})
    for name in REFUSED:
        _refuse(name, getattr(config, name, None))
    own = model.generation_config
    if config.max_new_tokens is None:
        config.max_new_tokens = DEFAULT_NEW_TOKENS
    if config.do_sample:
        config.update(**own.to_dict(), defaults_only=True)
        config.max_length = config.min_length = None
    for name in SPECIAL_TOKENS:
        if getattr(config, name) is None:
            setattr(config, name, getattr(own, name))
    if config.pad_token_id is None:  # generate would say so at every call
        end = config.eos_token_id
        config.pad_token_id = end[0] if isinstance(end, list) else end
    return config


def _refuse(name: str, value: Any) -> None:
    if value not in NO_EFFECT.get(name, (None, False)):
        raise InvalidInputError(f"{name}={value!r} cannot be used in this pipeline; {REFUSED[name]}")
