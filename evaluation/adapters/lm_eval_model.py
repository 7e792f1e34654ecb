"""lm-evaluation-harness over a compressed cache.

    import lm_eval
    from quantpress import Compose, SnapKV, TurboQuant
    from quantpress.evaluation.adapters.lm_eval_model import lm_eval_model
    from transformers import pipeline

    pipe = pipeline("kv-press-text-generation", model=...)
    model = lm_eval_model(pipe, Compose([SnapKV, TurboQuant]))
    lm_eval.simple_evaluate(model, tasks=["longbench_hotpotqa"])

The harness's own Hugging Face model scores a text in a single forward, which never reads a packed cache. Here
every prompt but its last token is read under the press, and that token and all that follow go through the
compressed cache. The harness (`pip install lm_eval`) is imported when the model is made.
"""

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any

import torch
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from quantpress.cache import host
from quantpress.errors import InvalidInputError
from quantpress.evaluation.divergence.teacher_forcing import score_continuation
from quantpress.pipelines.arguments import answer_config
from quantpress.pipelines.decoding import generate_ids
from quantpress.pipelines.prompt import check_positions
from quantpress.pipelines.reading.read_context import read_context
from quantpress.pipelines.rollback import model_rollback
from quantpress.pipelines.text_generation import TextGenerationPipeline
from quantpress.presses.base_press import BasePress

NEW_TOKENS = 256  # most tokens of an answer, unless the task says


class PressedModel:
    """Scores and generates token ids over compressed caches, one request at a time.

    Args:
        pipe: loaded model and tokenizer.
        press: what compresses the cache; None keeps all of it.
    """

    def __init__(self, pipe: TextGenerationPipeline, press: BasePress | None) -> None:
        self.model, self.tokenizer, self.press = pipe.model, pipe.tokenizer, press

    @torch.inference_mode()
    def log_likelihood(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log-probability of a continuation, and whether greedy decoding would give it.

        Args:
            context: ids, at least one; all but the last are read under the press.
            continuation: ids, at least one.

        Raises:
            InvalidInputError: `context` or `continuation` is empty, or the press cannot compress this
                context.
            ContextTooLongError: both together have more tokens than the model has positions.
        """
        if not context or not continuation:
            raise InvalidInputError(
                f"a context of {len(context)} and a continuation of {len(continuation)} tokens; "
                "give one or more of each"
            )
        check_positions(self.model.config, len(context) + len(continuation))
        with model_rollback(self.model):
            cache, position = self._read(context[:-1])
            fed = self._ids([context[-1], *continuation])
            total, greedy, done = 0.0, True, 1
            for log_probs in score_continuation(self.model, cache, fed, position):
                wanted = fed[:, done : done + log_probs.shape[1]]
                total += float(log_probs.gather(-1, wanted.unsqueeze(-1)).sum())
                greedy = greedy and bool((log_probs.argmax(-1) == wanted).all())
                done += log_probs.shape[1]
        return total, greedy

    @torch.inference_mode()
    def generate(self, context: list[int], until: Iterable[str] = (), **generation: Any) -> str:
        """Generate an answer and cut it before the first of some strings.

        Args:
            context: ids, at least one; all but the last are read under the press.
            until: strings that end the answer.
            generation: arguments of `model.generate` such as max_new_tokens; greedy unless do_sample is True.

        Raises:
            InvalidInputError: the context is empty, or the press cannot compress it.
            ContextTooLongError: the context has more tokens than the model has positions.
        """
        if not context:
            raise InvalidInputError("a context of 0 tokens; give one or more")
        check_positions(self.model.config, len(context))
        stops = [one for one in until if one]
        arguments = {"max_new_tokens": NEW_TOKENS, **generation}
        arguments["stopping_criteria"] = StoppingCriteriaList([_Said(self._text, stops)])
        config = answer_config(self.model, arguments)
        with model_rollback(self.model):
            cache, position = self._read(context[:-1])
            where = (self.model, cache, self._ids(context[:-1]), self._ids(context[-1:]), position)
            ids = generate_ids(*where, config, arguments)
        text = self._text(ids)
        return text[: min((text.find(one) for one in stops if one in text), default=len(text))]

    def _text(self, ids: torch.Tensor) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _read(self, context: list[int]) -> tuple[DynamicCache, int]:
        cache = host.empty_cache(self.model)
        if not context:
            return cache, 0
        return cache, read_context(self.model, self._ids(context), cache, self.press, progress=False)

    def _ids(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor([ids], dtype=torch.long, device=self.model.device)


class _Said(StoppingCriteria):
    """Ends an answer once it contains one of some strings, wherever tokens begin and end."""

    def __init__(self, decode: Callable[[torch.Tensor], str], stops: Sequence[str]) -> None:
        self.decode, self.stops = decode, stops

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        texts = [self.decode(ids[1:]) for ids in input_ids]  # the first id is the last of the context
        said = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(said, dtype=torch.bool, device=input_ids.device)


def lm_eval_model(pipe: TextGenerationPipeline, press: BasePress | None = None) -> Any:
    """A model that `lm_eval.simple_evaluate(model=...)` takes.

    Args:
        pipe: loaded model and tokenizer.
        press: what compresses the cache; None keeps all of it.

    Returns:
        An `lm_eval.api.model.TemplateLM`. Rolling likelihoods are refused: they have no context to compress.

    Raises:
        InvalidInputError: lm_eval is not installed.
    """
    try:
        template: Any = import_module("lm_eval.api.model").TemplateLM
    except ImportError as error:
        raise InvalidInputError(
            "lm-evaluation-harness is not installed: pip install 'lm_eval>=0.4.9'"
        ) from error
    pressed = PressedModel(pipe, press)

    class PressedLM(template):
        """Log-likelihoods and answers over compressed caches."""

        tokenizer = pipe.tokenizer

        @property
        def eot_token_id(self) -> int:
            return int(pipe.tokenizer.eos_token_id)

        @property
        def max_gen_toks(self) -> int:
            return NEW_TOKENS

        @property
        def tokenizer_name(self) -> str:
            return str(pipe.tokenizer.name_or_path).replace("/", "__")

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            special = bool(add_special_tokens)
            return list(pipe.tokenizer.encode(string, add_special_tokens=special))

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return str(
                pipe.tokenizer.apply_chat_template(
                    chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return [pressed.log_likelihood(context, wanted) for _, context, wanted in requests]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            raise InvalidInputError(
                "rolling likelihoods score a text from its first token on, without a context to compress; "
                "`quantpress eval` measures perplexity behind a compressed context"
            )

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [self._answer(*request.args) for request in requests]

        def _answer(self, context: str, options: dict[str, Any]) -> str:
            rest = dict(options)
            until = rest.pop("until", None) or []
            rest["max_new_tokens"] = rest.pop("max_gen_toks", rest.get("max_new_tokens", NEW_TOKENS))
            if not rest.get("do_sample"):
                rest.pop("temperature", None)  # tasks say 0 for greedy
            ids = self.tok_encode(context)
            return pressed.generate(ids, [until] if isinstance(until, str) else until, **rest)

    return PressedLM()
