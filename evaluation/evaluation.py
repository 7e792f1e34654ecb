"""`evaluate`: a suite over one's own presses and the controls. The command `eval` calls it too."""

import hashlib
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import transformers
from torch import nn

from quantpress.errors import InvalidInputError
from quantpress.evaluation.arms import UNCOMPRESSED, Arm, check_names, every_arm
from quantpress.evaluation.equal_bytes import GRID_PRESSES, MakeEvictor, evictor
from quantpress.evaluation.measuring import model_name
from quantpress.evaluation.results.figures import write_figures
from quantpress.evaluation.results.markdown import report
from quantpress.evaluation.results.records import REFUSED, RESULTS, Records
from quantpress.evaluation.results.summary import Findings
from quantpress.evaluation.runner import Runner, run_settings
from quantpress.evaluation.sizing.kept_tokens import described
from quantpress.evaluation.sizing.kept_tokens import parts as members_of
from quantpress.evaluation.suites import PARTS, Suite, suite_by_name
from quantpress.pipelines import TASK, register
from quantpress.pipelines.press_argument import as_press
from quantpress.pipelines.text_generation import TextGenerationPipeline
from quantpress.presses.base_press import BasePress
from quantpress.presses.traits import name_of

REPORT = "report.md"

Press: TypeAlias = BasePress | type[BasePress] | str | Sequence[Any]
Model: TypeAlias = TextGenerationPipeline | str | Callable[[], TextGenerationPipeline] | None


@dataclass(frozen=True)
class Evaluation:
    """What a run has found. `print` shows its tables, and so does a notebook.

    Args:
        records: every result, one for each arm and case.
        findings: rows with intervals, one for each arm: `findings.fidelity`, `.grid`, `.tasks`.
    """

    records: Records
    findings: Findings

    @classmethod
    def of(cls, records: Records) -> "Evaluation":
        """Summarize the results of a run."""
        return cls(records, Findings.of(records))

    def as_dict(self) -> dict[str, Any]:
        """Plain values: `settings`, rows under the name of each part, `pairs`, and what `refused` and why."""
        refused = list(self.records.of(REFUSED))
        return {"settings": self.records.settings, **self.findings.as_dict(), "refused": refused}

    def write(self, folder: Path | str, *, figures: bool = False) -> list[Path]:
        """Write the tables as `report.md`, and the pictures.

        Args:
            folder: where the files go; it is made if need be.
            figures: draw the pictures too.

        Returns:
            The paths of the files.

        Raises:
            InvalidInputError: pictures are asked for, and matplotlib is not installed.
        """
        path = Path(folder) / REPORT
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(self), encoding="utf-8")
        return [path, *(write_figures(self.records, self.findings, path.parent) if figures else ())]

    def __str__(self) -> str:
        return report(self.records, self.findings)

    def _repr_markdown_(self) -> str:
        return str(self)


def evaluate(
    presses: Sequence[Press | Arm] = (),
    model: Model = None,
    *,
    suite: str | Suite = "quick",
    parts: Sequence[str] = PARTS,
    against: Sequence[str] | None = None,
    output: Path | str | None = None,
    seed: int = 0,
    text: str | None = None,
    **sizes: Any,
) -> Evaluation:
    """Measure what presses cost in quality and save in memory, beside the controls.

    Args:
        presses: those to compare: a press, its class, text (`parse_press`), a list of presses, which are
            composed, or an `Arm`, which has a name. A press is copied for every text that is read. A class
            means its defaults, with which kvpress's own presses evict nothing.
        model: a pipeline of ours, or the id or folder of a model; None for the default model. A function that
            returns a pipeline is called once everything else has been checked.
        suite: "quick", "full", or sizes of one's own.
        parts: some of `PARTS`.
        against: names of the arms of `every_arm` to compare with; None for all of them. The uncompressed
            cache is always there.
        output: a folder for the results, in which a run that stopped goes on: what has a result under the
            name of its press is not measured again. None keeps no files.
        seed: seed of the tasks' texts and numbers.
        text: text that is read and scored; None for the book that the package holds.
        **sizes: fields of `Suite` that differ from the suite's, such as `documents=2, context=512`.
            `grid_presses` also takes presses of one's own, as `presses` does; the grid sets their ratio.

    Returns:
        The results of this run, and those that the folder held before.

    Raises:
        InvalidInputError: there is no such suite, part, arm or size, two arms have one name, something is no
            press, or the folder has results of other settings.
        CompositionError: presses do not go together.

    Example:
        `evaluate(["SnapKV(0.5) | TurboQuant(bits=3)"], pipe, parts=["fidelity"], documents=2)`
    """
    arms = [*_controls(against), *map(_arm, presses)]
    check_names(arms)
    _check_known("part", parts, PARTS)
    sized, evictors = _sized(suite_by_name(suite) if isinstance(suite, str) else suite, sizes)
    pipe = _pipeline(model)
    settings = run_settings(pipe, model_name(pipe), sized, seed)
    if text is not None:
        settings["text"] = hashlib.sha256(text.encode()).hexdigest()
    with TemporaryDirectory() as nowhere:
        records = Records(Path(nowhere if output is None else output) / RESULTS, settings)
        Runner(pipe, sized, arms, records, seed=seed, text=text, evictors=evictors).run(parts)
        return Evaluation.of(records)


def _pipeline(model: Model) -> TextGenerationPipeline:
    if isinstance(model, TextGenerationPipeline):
        return model
    if isinstance(model, nn.Module):
        raise InvalidInputError(
            f"a {type(model).__name__} alone has no tokenizer; give "
            f"pipeline({TASK!r}, model=model, tokenizer=tokenizer)"
        )
    if callable(model):
        return model()
    register()
    make: Any = transformers.pipeline
    pipe: TextGenerationPipeline = make(TASK, model=model)
    return pipe


def _check_known(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InvalidInputError(f"there is no {what} {unknown[0]!r}; use some of {', '.join(known)}")


def _controls(names: Sequence[str] | None) -> list[Arm]:
    """The arms of a run beside the user's own."""
    every = every_arm()
    if names is None:
        return every
    _check_known("arm", names, [arm.name for arm in every])
    return [arm for arm in every if arm.name == UNCOMPRESSED or arm.name in names]


def _arm(given: Press | Arm) -> Arm:
    """The arm of a user's press. A text makes a new press each time; an object is copied."""
    if isinstance(given, Arm):
        return given
    press = as_press(given)  # what is wrong with it is said before anything is measured
    if isinstance(given, str):
        return Arm(given, partial(as_press, given), "yours")
    return Arm(described(press), partial(deepcopy, press), "yours")


def _sized(suite: Suite, sizes: dict[str, Any]) -> tuple[Suite, dict[str, MakeEvictor]]:
    """The suite with other sizes, which are plain values, and the user's own presses of its grid by name."""
    _check_known("size", list(sizes), [field.name for field in fields(Suite)])
    values: dict[str, Any] = {
        name: tuple(one) if isinstance(one, list) else one for name, one in sizes.items()
    }
    evictors: dict[str, MakeEvictor] = {}
    names = []
    for given in values.get("grid_presses", ()):
        if given in GRID_PRESSES:
            names.append(given)
            continue
        press = as_press(given)
        if press is None:
            raise InvalidInputError("the grid has the row 'every token' by itself; name presses that evict")
        names.append(given if isinstance(given, str) else " | ".join(map(name_of, members_of(press))))
        evictors[names[-1]] = evictor(press)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidInputError(f"two presses of the grid are called {twice!r}; evaluate one at a time")
    if names:
        values["grid_presses"] = tuple(names)
    return replace(suite, **values), evictors
