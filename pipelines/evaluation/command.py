"""What `quantpress eval` does: a suite on a model, and its files."""

import json as json_module
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console

from quantpress.errors import InvalidInputError
from quantpress.pipelines import TASK, register
from quantpress.pipelines.default_model import DEFAULT_MODEL_NAME, ensure_default_model
from quantpress.pipelines.demo import quick_dtype
from quantpress.pipelines.evaluation.arms import Arm, MakePress, every_arm
from quantpress.pipelines.evaluation.figures import check_matplotlib, write_figures
from quantpress.pipelines.evaluation.markdown import report
from quantpress.pipelines.evaluation.records import RESULTS, Records
from quantpress.pipelines.evaluation.runner import REFUSED, Runner, run_settings
from quantpress.pipelines.evaluation.suites import PARTS, suite_by_name
from quantpress.pipelines.evaluation.summary import Findings
from quantpress.pipelines.text_generation import TextGenerationPipeline

REPORT = "report.md"


def evaluate(
    suite: str = "quick",
    output: Path | None = None,
    *,
    model: str | None = None,
    presses: Mapping[str, MakePress] | None = None,
    parts: Sequence[str] = PARTS,
    device: str | None = None,
    dtype: str | None = None,
    sizes: Mapping[str, Any] | None = None,
    seed: int = 0,
    figures: bool = True,
    json: bool = False,
) -> None:
    """Run a suite, or what is left of it, and write its tables and pictures.

    Args:
        suite: "quick" or "full".
        output: a folder for results.jsonl, report.md and PNG files; left out, quantpress-eval-<suite>.
        model: an id or a folder; left out, the default model.
        presses: arms of your own, by the names that tables give them.
        parts: some of "fidelity", "grid", "tasks".
        device: such as "cuda" or "cpu"; left out, a GPU where there is one.
        dtype: such as "bfloat16"; left out, bfloat16 on a GPU, what is quicker on a CPU.
        sizes: fields of `Suite` that replace the suite's.
        seed: of the tasks' texts and numbers.
        figures: draw pictures, for which matplotlib is needed.
        json: print the figures as one JSON object instead of the tables.

    Raises:
        InvalidInputError: an argument that cannot be used, a folder with results of other settings, or
            figures without matplotlib.
        ModelFilesError: the default model could not be fetched.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise InvalidInputError(f"there is no part {unknown[0]!r}; use some of {', '.join(PARTS)}")
    if figures:
        check_matplotlib()
    sized = replace(suite_by_name(suite), **(sizes or {}))
    pipe = _pipeline(model, device, dtype)
    settings = run_settings(pipe, model or DEFAULT_MODEL_NAME, sized, seed)
    folder = Path(f"quantpress-eval-{suite}") if output is None else output
    records = Records(folder / RESULTS, settings)
    own = [Arm(name, make, "yours") for name, make in (presses or {}).items()]
    Runner(pipe, sized, [*every_arm(), *own], records, seed=seed).run(parts)
    findings = Findings.of(records)
    text = report(records, findings)
    (folder / REPORT).write_text(text, encoding="utf-8")
    drawn = write_figures(records, findings, folder) if figures else []
    if json:
        refused = list(records.of(REFUSED))
        everything = {"settings": records.settings, **findings.as_dict(), "refused": refused}
        Console(soft_wrap=True).print_json(json_module.dumps(everything))
        return
    Console(soft_wrap=True).print(text, markup=False, highlight=False)
    files = ", ".join(str(path) for path in (records.path, folder / REPORT, *drawn))
    Console(stderr=True, soft_wrap=True).print(f"written: {files}", highlight=False)


def _pipeline(model: str | None, device: str | None, dtype: str | None) -> TextGenerationPipeline:
    register()
    make: Any = transformers.pipeline
    chosen = {} if device is None else {"device": device}
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        pipe: TextGenerationPipeline = make(
            TASK, model=model or str(ensure_default_model()), dtype=dtype or quick_dtype(), **chosen
        )
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    return pipe
