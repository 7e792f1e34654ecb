"""The sizes of a run: `quick` for two CPU cores, `full` for a GPU."""

from dataclasses import dataclass

from quantpress.errors import InvalidInputError
from quantpress.evaluation.arms import UNCOMPRESSED
from quantpress.evaluation.equal_bytes import GRID_PRESSES
from quantpress.evaluation.tasks.task_runs import TASKS

PARTS = ("fidelity", "grid", "tasks")


@dataclass(frozen=True)
class Suite:
    """Sizes of a run.

    Args:
        name: name of the suite.
        documents: number of pieces of the book that are read and scored.
        context: tokens of each piece that are read under a press.
        continuation: tokens that follow; all but the first are scored.
        queries: queries of each document that attention is compared with.
        lengths: tokens of the contexts of the needle grid.
        depths: depths of its needles, 0.0 to 1.0.
        task_tokens: tokens of the contexts of the other tasks.
        samples: cases of each other task.
        task_arms: names of the arms that answer tasks; empty for all.
        grid_presses, grid_bits, grid_budgets: arguments of `grid_arms`.
        batch: documents read at once on a GPU; on a CPU it is one.
        tasks: names of the tasks.
        question_aware: whether the presses of the tasks see the question: it is read with the context.
    """

    name: str
    documents: int
    context: int
    continuation: int
    queries: int
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    task_tokens: int
    samples: int
    task_arms: tuple[str, ...]
    grid_presses: tuple[str, ...]
    grid_bits: tuple[int, ...]
    grid_budgets: tuple[float, ...]
    batch: int
    tasks: tuple[str, ...] = tuple(TASKS)
    question_aware: bool = False


QUICK = Suite(
    name="quick",
    documents=6,
    context=1024,
    continuation=129,
    queries=16,
    lengths=(512, 1024),
    depths=(0.1, 0.5, 0.9),
    task_tokens=1024,
    samples=1,
    task_arms=(
        UNCOMPRESSED,
        "int4 per token",
        "Random(0.5)",
        "SnapKV(0.5)",
        "preset balanced",
        "preset small, 2 bits",
    ),
    grid_presses=("StreamingLLM", "SnapKV"),
    grid_bits=(16, 4, 3, 2),
    grid_budgets=(1 / 4, 1 / 8),
    batch=1,
)
FULL = Suite(
    name="full",
    documents=16,
    context=4096,
    continuation=513,
    queries=32,
    lengths=(1024, 2048, 4096, 7168),
    depths=(0.1, 0.3, 0.5, 0.7, 0.9),
    task_tokens=4096,
    samples=10,
    task_arms=(
        UNCOMPRESSED,
        "preset balanced",
        "preset small",
        "preset small, 2 bits",
        "as published 3/3",
        "int4 per token",
        "KIVI 4 bits",
        "KIVI 2 bits",
        "Random(0.5)",
        "SnapKV(0.5)",
        "ExpectedAttention(0.5)",
        "SnapKV(0.5) | preset small",
    ),
    grid_presses=GRID_PRESSES,
    grid_bits=(16, 8, 4, 3, 2),
    grid_budgets=(1 / 4, 1 / 8, 1 / 16),
    batch=8,
)
SUITES = {suite.name: suite for suite in (QUICK, FULL)}


def suite_by_name(name: str) -> Suite:
    """The suite of a name.

    Raises:
        InvalidInputError: there is no suite of this name.
    """
    if name not in SUITES:
        raise InvalidInputError(f"there is no suite {name!r}; use one of {', '.join(SUITES)}")
    return SUITES[name]
