"""`quantpress batch`: the same questions about every document of a folder."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from quantpress.cli.arguments import (
    Device,
    Dtype,
    Model,
    Press,
    QuestionAware,
    Store,
    StoreBytes,
    check_loading,
    check_output_file,
    is_url,
    read_text,
    store_bound,
)
from quantpress.cli.batch.answers_file import AnswersFile
from quantpress.cli.batch.documents import Document, files_of, read_questions
from quantpress.cli.batch.on_ray import import_ray, workers
from quantpress.cli.batch.worker import Job, Result, Worker
from quantpress.cli.output import Outcome, note, progress
from quantpress.errors import InvalidInputError, QuantPressError

MOST_FAILURES = 20
"""Failures that the outcome names; stderr has all of them."""


@dataclass
class Batch(Outcome):
    """What became of the documents.

    Args:
        out: the file with the answers.
        press: the press that they were read under.
        questions: how many questions each was asked.
        answered: how many were answered now.
        from_store: how many of these had their context in the store.
        answered_before: how many had an answer already.
        failed: how many could not be answered.
        failures: name and reason of the first of them.
        workers: how many workers there were; 0 where none was needed.
    """

    out: str
    press: str
    questions: int
    answered: int = 0
    from_store: int = 0
    answered_before: int = 0
    failed: int = 0
    failures: list[dict[str, str]] = field(default_factory=list)
    workers: int = 0

    @property
    def exit_status(self) -> int:
        """1 when a document failed."""
        return 1 if self.failed else 0

    def note_failure(self, document: str, reason: str) -> None:
        """Count a document that failed, and say so on stderr."""
        self.failed += 1
        if self.failed <= MOST_FAILURES:
            self.failures.append({"document": document, "reason": reason})
        note(f"quantpress: {document} failed: {reason}")

    def __rich__(self) -> str:
        parts = [f"{self.answered:,} documents answered"]
        parts += [f"{self.from_store:,} of them from the store"] if self.from_store else []
        parts += [f"{self.answered_before:,} answered before"] if self.answered_before else []
        parts += [f"{self.failed:,} failed"] if self.failed else []
        return f"{self.out}: {', '.join(parts)}; {self.questions} asked of each, under {self.press}."


def batch(
    documents: Annotated[str, typer.Argument(help="Folder of text files; folders in it count, too.")],
    questions: Annotated[
        str, typer.Option(help="File with a question on each line; - for the standard input.")
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="File of answers; what it has already is skipped.")],
    press: Press = "TurboQuant",
    pattern: Annotated[str, typer.Option(help="Which files are read, by name.")] = "*.txt",
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster: auto for the one that runs here, local to start one; left out, one process."
        ),
    ] = None,
    cores: Annotated[
        int | None,
        typer.Option(help="With Ray and no GPU: cores for each model; left out, all of a machine.", min=1),
    ] = None,
    store: Store = None,
    store_bytes: StoreBytes = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 50,
    question_aware: QuestionAware = False,
) -> Batch:
    """Ask the same questions about every document of a folder, on many GPUs with Ray; can be resumed."""
    folder = _checked_folder(documents, out, store)
    asked = read_questions(questions, read_text(questions))
    bound = store_bound(store, store_bytes)
    if store is not None and question_aware:
        raise InvalidInputError(
            "--store keeps contexts that were read without a question, and --question-aware reads both "
            "together: leave one of them out"
        )
    check_loading(model, None if address else device, dtype)
    if address is not None:
        import_ray()
    elif cores is not None:
        raise InvalidInputError(f"--cores {cores} is for a Ray cluster; give its --address, too")
    from quantpress.evaluation.sizing.kept_tokens import described
    from quantpress.pipelines.contexts.cached_context import check_saved
    from quantpress.presses.expression import parse_press

    made = parse_press(press)
    if store is not None:
        check_saved(made)
    job = Job(press, asked, max_new_tokens, model, device, dtype, store, bound, question_aware)
    outcome = Batch(out, described(made), len(asked))
    run = {"press": outcome.press, "max_new_tokens": max_new_tokens, "questions": list(asked)}
    run |= {"question_aware": question_aware}
    with AnswersFile(out, run) as answers:
        if answers.torn:
            note(f"quantpress: {out} ended in half a line, which is taken off")
        _answer(job, _unanswered(folder, pattern, answers, outcome), answers, outcome, address, cores)
    return outcome


def _checked_folder(documents: str, out: str, store: str | None) -> Path:
    folder = Path(documents)
    if not folder.is_dir():
        raise InvalidInputError(f"{documents} is not a folder; give one with text files")
    if is_url(out):
        raise InvalidInputError(f"{out} cannot be appended to; give --out a file of this machine")
    check_output_file(out)
    for name, place in (("--out", out), ("--store", store)):
        inside = place is not None and not is_url(place)
        if inside and Path(str(place)).resolve().is_relative_to(folder.resolve()):
            raise InvalidInputError(f"{place} lies among the documents; give {name} another place")
    return folder


def _unanswered(folder: Path, pattern: str, answers: AnswersFile, outcome: Batch) -> Iterator[Document]:
    """The documents that have no answer, read one by one; what is no text has failed."""
    found = False
    for name, path in files_of(folder, pattern):
        found = True
        if name in answers:
            outcome.answered_before += 1
            continue
        try:
            yield Document(name, read_text(str(path)))
        except QuantPressError as error:
            outcome.note_failure(name, str(error))
    if not found:
        raise InvalidInputError(f"{folder} has no file {pattern!r}; give another folder or --pattern")


def _answer(
    job: Job,
    documents: Iterator[Document],
    answers: AnswersFile,
    outcome: Batch,
    address: str | None,
    cores: int | None,
) -> None:
    first = next(documents, None)
    if first is None:  # no model is needed
        return
    left = chain([first], documents)
    pool: AbstractContextManager[Any] = (
        nullcontext(InProcess(job)) if address is None else workers(job, address, cores)
    )
    with pool as ready:
        outcome.workers = ready.count
        for result in progress(ready.results(left, answers.check_run), "answering", None):
            _note(result, answers, outcome)


def _note(result: Result, answers: AnswersFile, outcome: Batch) -> None:
    if result.answers is None:
        outcome.note_failure(result.document, str(result.error))
        return
    about = {"from_store": result.from_store, "report": result.report}
    answers.add(result.document, result.answers, about)
    outcome.answered += 1
    outcome.from_store += result.from_store


class InProcess:
    """One worker in this process, in place of those on Ray."""

    count = 1

    def __init__(self, job: Job) -> None:
        self._worker = Worker(job)

    def results(
        self, documents: Iterator[Document], check: Callable[[dict[str, Any]], None]
    ) -> Iterator[Result]:
        """Answer documents one after the other; the arguments are those of `Workers.results`."""
        check(self._worker.run())
        for document in documents:
            yield self._worker.answer(document)
