"""How much is measured: `quick` for two CPU cores, `full` for a GPU."""

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
        name: of the suite.
        documents: pieces of the book that are read and scored.
        context: tokens of each that are read under a press.
        continuation: tokens that follow; all but the first are scored.
        queries: of each document, for errors of attention.
        lengths: contexts of the needle grid, in tokens.
        depths: of its needles.
        task_tokens: contexts of the other tasks.
        samples: of each other task.
        task_arms: arms that answer tasks; empty is all of them.
        grid_presses, grid_bits, grid_budgets: of the equal-bytes grid.
        batch: documents read at once on a GPU; on a CPU it is one.
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
    """A suite.

    Raises:
        InvalidInputError: there is none of this name.
    """
    if name not in SUITES:
        raise InvalidInputError(f"there is no suite {name!r}; use one of {', '.join(SUITES)}")
    return SUITES[name]
