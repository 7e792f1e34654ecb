"""Asks cases over caches that are kept in different ways, with the same prompts for every arm."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from quantpress.evaluation.arms import Arm
from quantpress.evaluation.tasks import needle_tasks, word_tasks
from quantpress.evaluation.tasks.cases import Case, score
from quantpress.evaluation.tasks.haystack import Tokenizer
from quantpress.pipelines.text_generation import TextGenerationPipeline

MakeCase = Callable[[Tokenizer, int, int], Case]

TASKS: dict[str, MakeCase] = {
    "multi_key": needle_tasks.multi_key,
    "multi_value": needle_tasks.multi_value,
    "multi_query": needle_tasks.multi_query,
    "variable_tracking": needle_tasks.variable_tracking,
    "common_words": word_tasks.common_words,
    "frequent_words": word_tasks.frequent_words,
    "quote": needle_tasks.quote,
}
"""The tasks other than the needle grid."""


@dataclass(frozen=True)
class TaskResult:
    """One case over one cache.

    Args:
        task, tokens, depth: as in the case.
        score: score of the answer, 0.0 to 1.0.
        answer: text of the answer.
        resident_bytes: measured bytes of the context's cache.
        uncompressed_bytes: bytes of all tokens of the context in the model's own dtype.
        seconds: time for reading and answering.
    """

    task: str
    tokens: int
    depth: float | None
    score: float
    answer: str
    resident_bytes: int
    uncompressed_bytes: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def make_cases(
    tokenizer: Tokenizer,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    tokens: int,
    samples: int,
    tasks: Sequence[str] = tuple(TASKS),
    seed: int = 0,
) -> list[Case]:
    """The needle grid, then samples of all other tasks, so that a run cut short has some of each.

    Args:
        tokenizer: counts tokens.
        lengths: tokens of the contexts of the needle grid.
        depths: depths of its needles, 0.0 to 1.0.
        tokens: tokens of the contexts of the other tasks.
        samples: cases of each other task.
        tasks: names from `TASKS`.
        seed: the same seed gives the same cases on every machine.
    """
    grid = [needle_tasks.needle(tokenizer, length, seed, depth) for length in lengths for depth in depths]
    others = [TASKS[name](tokenizer, tokens, seed + i) for i in range(samples) for name in tasks]
    return [*grid, *others]


def ask(pipe: TextGenerationPipeline, case: Case, arm: Arm, question_aware: bool = False) -> TaskResult:
    """Ask one case over one arm, greedily.

    Args:
        pipe: has the model.
        case: what is read and asked.
        arm: makes the press.
        question_aware: whether the press sees the question, which then counts among the bytes.

    Raises:
        InvalidInputError: the press cannot compress this context.
        ContextTooLongError: the context has more tokens than the model has positions.
    """
    with torch.random.fork_rng([pipe.device] if pipe.device.type == "cuda" else []):
        torch.manual_seed(0)  # some presses draw random projections
        result = pipe(
            case.context,
            question=case.question,
            answer_prefix=case.answer_prefix,
            press=arm.make(),
            max_new_tokens=case.answer_tokens,
            report=True,
            progress=False,
            question_aware=question_aware,
            cuda_graph=False,  # capturing takes longer than a short answer
        )
    report = result["report"]
    return TaskResult(
        case.task,
        case.tokens,
        case.depth,
        score(result["answer"], case.references, case.scoring),
        result["answer"],
        report.resident_bytes,
        report.uncompressed_bytes,
        round(report.prefill_s + report.compress_s + report.decode_s, 3),
    )
