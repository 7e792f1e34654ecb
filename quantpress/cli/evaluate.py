"""`quantpress eval`: a suite on a model, and its files."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from quantpress.cli.loading import load_pipeline, model_name
from quantpress.cli.output import print_json
from quantpress.errors import InvalidInputError
from quantpress.evaluation.arms import Arm, check_names, every_arm
from quantpress.evaluation.results.figures import check_matplotlib, write_figures
from quantpress.evaluation.results.markdown import report
from quantpress.evaluation.results.records import RESULTS, Records
from quantpress.evaluation.results.summary import Findings
from quantpress.evaluation.runner import REFUSED, Runner, run_settings
from quantpress.evaluation.suites import PARTS, suite_by_name
from quantpress.presses.expression import parse_press

REPORT = "report.md"


def main(
    suite: str = "quick",
    output: Path | None = None,
    *,
    presses: Sequence[str] = (),
    model: str | None = None,
    parts: Sequence[str] = PARTS,
    device: str | None = None,
    dtype: str | None = None,
    sizes: Mapping[str, Any] | None = None,
    seed: int = 0,
    figures: bool = True,
    json: bool = False,
    report_only: bool = False,
) -> None:
    """Run a suite, or what is left of it, and write its tables and pictures.

    Args:
        suite: "quick" or "full".
        output: a folder for results.jsonl, report.md and PNG files; left out, quantpress-eval-<suite>.
        presses: more arms, as `parse_press` takes them.
        model: as for `load_pipeline`.
        parts: some of "fidelity", "grid", "tasks".
        device: as for `load_pipeline`.
        dtype: as for `load_pipeline`.
        sizes: fields of `Suite` that replace the suite's.
        seed: of the tasks' texts and numbers.
        figures: draw pictures, for which matplotlib is needed.
        json: print the figures as one JSON object instead of the tables.
        report_only: measure nothing, load no model: only write what the folder's results show, wherever they
            were measured.

    Raises:
        InvalidInputError: an argument that cannot be used, a folder with results of other settings (or, to
            report on, with none), or figures without matplotlib.
        ModelFilesError: the default model could not be fetched.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise InvalidInputError(f"there is no part {unknown[0]!r}; use some of {', '.join(PARTS)}")
    sized = replace(suite_by_name(suite), **(sizes or {}))
    arms = [*every_arm(), *map(_own_arm, presses)]
    check_names(arms)
    if figures:
        check_matplotlib()
    folder = Path(f"quantpress-eval-{suite}") if output is None else output
    if report_only:
        records = Records.read(folder / RESULTS)
    else:
        pipe = load_pipeline(model, device, dtype)
        records = Records(folder / RESULTS, run_settings(pipe, model_name(pipe), sized, seed))
        Runner(pipe, sized, arms, records, seed=seed).run(parts)
    findings = Findings.of(records)
    text = report(records, findings)
    (folder / REPORT).write_text(text, encoding="utf-8")
    drawn = write_figures(records, findings, folder) if figures else []
    if json:
        refused = list(records.of(REFUSED))
        print_json({"settings": records.settings, **findings.as_dict(), "refused": refused})
        return
    Console(soft_wrap=True).print(text, markup=False, highlight=False)
    files = ", ".join(str(path) for path in (records.path, folder / REPORT, *drawn))
    Console(stderr=True, soft_wrap=True).print(f"written: {files}", highlight=False)


def _own_arm(text: str) -> Arm:
    parse_press(text)  # what is wrong with it is said before anything is measured
    return Arm(text, partial(parse_press, text), "yours")
