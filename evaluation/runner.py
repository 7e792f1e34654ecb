"""Runs a suite: every arm on every case that has no result yet."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from quantpress.errors import QuantPressError
from quantpress.evaluation.arms import UNCOMPRESSED, Arm, check_names
from quantpress.evaluation.divergence.documents import make_documents
from quantpress.evaluation.divergence.probe import DivergenceProbe
from quantpress.evaluation.equal_bytes import GridArm, MakeEvictor, Shape, grid_arms
from quantpress.evaluation.measuring import machine
from quantpress.evaluation.results.records import REFUSED, Records
from quantpress.evaluation.suites import PARTS, Suite
from quantpress.evaluation.tasks.haystack import book_text
from quantpress.evaluation.tasks.task_runs import ask, make_cases
from quantpress.pipelines.text_generation import TextGenerationPipeline


class Runner:
    """One run of a suite.

    Args:
        pipe: loaded model and tokenizer.
        suite: sizes of the run.
        arms: what is compared, with the uncompressed arm.
        records: results so far, to which new ones are added.
        seed: seed of the tasks' texts and numbers.
        text: text that is read and scored; None for the book that the package holds.
        evictors: presses of one's own that the suite's grid names.

    Raises:
        InvalidInputError: two arms have the same name, or none is the uncompressed one.
    """

    def __init__(
        self,
        pipe: TextGenerationPipeline,
        suite: Suite,
        arms: Sequence[Arm],
        records: Records,
        *,
        seed: int = 0,
        text: str | None = None,
        evictors: Mapping[str, MakeEvictor] | None = None,
    ) -> None:
        check_names(arms)
        self.pipe, self.suite, self.arms, self.records = pipe, suite, list(arms), records
        self.seed, self.text, self.evictors = seed, text, evictors or {}
        self.on_gpu = pipe.device.type == "cuda"

    def run(self, parts: Sequence[str] = PARTS) -> None:
        """Measure what is missing, with a progress bar on stderr.

        Args:
            parts: some of `PARTS`, run in this order.
        """
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            for part in parts:
                bar = progress.add_task(part, total=None)

                def advance(done: int, total: int, bar: Any = bar) -> None:
                    progress.update(bar, completed=done, total=total)

                getattr(self, part)(advance)
                progress.remove_task(bar)

    def fidelity(self, advance: Callable[[int, int], None] | None = None) -> None:
        """Divergence, agreement, likelihood and attention errors of every arm."""
        self._score("fidelity", self.arms, self.suite.queries, advance)

    def grid(self, advance: Callable[[int, int], None] | None = None) -> None:
        """The same without attention, for the arms of equal bytes."""
        suite = self.suite
        shape = Shape.of(self.pipe.model.config, suite.context, self.pipe.model.dtype)
        sizes = (suite.grid_presses, suite.grid_bits, suite.grid_budgets)
        arms = grid_arms(shape, *sizes, own=self.evictors)
        for slow in (False, True):  # whole rows of the others first, should the run be cut short
            self._score("grid", [arm for arm in arms if arm.one_by_one is slow], 0, advance)

    def tasks(self, advance: Callable[[int, int], None] | None = None) -> None:
        """Answers of the arms that the suite names, and of the user's own."""
        suite = self.suite
        cases = make_cases(
            self.pipe.tokenizer,
            lengths=suite.lengths,
            depths=suite.depths,
            tokens=suite.task_tokens,
            samples=suite.samples,
            tasks=suite.tasks,
            seed=self.seed,
        )
        wanted = suite.task_arms
        arms = [arm for arm in self.arms if not wanted or arm.name in wanted or arm.kind == "yours"]
        jobs = [(case, arm) for case in cases for arm in arms]
        for done, (case, arm) in enumerate(jobs):
            if not self._has("tasks", arm, case.name):
                outcome = self._refusable(
                    "tasks", arm, partial(ask, self.pipe, case, arm, suite.question_aware)
                )
                if outcome is not None:
                    self.records.add("tasks", arm.name, case.name, **outcome.as_dict())
            if advance is not None:
                advance(done + 1, len(jobs))

    def _score(
        self, measure: str, arms: Sequence[Arm], queries: int, advance: Callable[[int, int], None] | None
    ) -> None:
        if not arms:
            return
        suite = self.suite
        documents = make_documents(
            self.pipe.tokenizer,
            book_text() if self.text is None else self.text,
            suite.documents,
            suite.context,
            suite.continuation,
        )
        size = suite.batch if self.on_gpu else 1
        batches = [documents[i : i + size] for i in range(0, len(documents), size)]
        done, total = 0, len(arms) * len(documents)
        for batch in batches:
            probe = None
            for arm in arms:
                missing = [one for one in batch if not self._has(measure, arm, one.name)]
                if missing:
                    probe = probe or DivergenceProbe(self.pipe.model, batch, queries=queries)
                    results = self._refusable(
                        measure, arm, partial(probe.over, arm.make(), one_by_one=arm.one_by_one)
                    )
                    for document, result in zip(batch, results or (), strict=False):
                        if document in missing:
                            figures = {**result.as_dict(), **_budget(arm)}
                            self.records.add(measure, arm.name, document.name, **figures)
                done += len(batch)
                if advance is not None:
                    advance(done, total)

    def _has(self, measure: str, arm: Arm, case: str) -> bool:
        return self.records.has(measure, arm.name, case) or self.records.has(REFUSED, arm.name, measure)

    def _refusable(self, measure: str, arm: Arm, work: Callable[[], Any]) -> Any:
        """The result, or None where the press refuses, which is recorded.

        Raises:
            QuantPressError: the uncompressed cache fails, so that there is nothing to compare with.
        """
        try:
            return work()
        except QuantPressError as error:
            if arm.name == UNCOMPRESSED:
                raise
            self.records.add(REFUSED, arm.name, measure, reason=str(error))
            return None


def _budget(arm: Arm) -> dict[str, float]:
    """The budget of an arm of the grid, for its record."""
    return {"budget": arm.budget} if isinstance(arm, GridArm) else {}


def run_settings(pipe: TextGenerationPipeline, model_name: str, suite: Suite, seed: int) -> dict[str, Any]:
    """What results depend on beside the arms; results of other settings go to another folder."""
    found = {name: value for name, value in machine(pipe).items() if name != "threads"}
    sizes = asdict(suite)
    if not suite.question_aware:
        del sizes["question_aware"]  # as in results of before there was a choice
    return {"model": model_name, **found, "seed": seed, "suite": sizes, "kvpress": version("kvpress")}
