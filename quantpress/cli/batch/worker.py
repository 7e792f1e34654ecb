"""A worker: a model that answers one document after the other, in this process or in a Ray actor."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantpress.cli.batch.documents import Document
from quantpress.errors import CacheFileError, CompositionError, MissingPackageError, UnsupportedModelError

if TYPE_CHECKING:
    from quantpress.pipelines.contexts.store import ContextStore
    from quantpress.pipelines.text_generation import TextGenerationPipeline
    from quantpress.presses.base_press import BasePress

FATAL = (CacheFileError, CompositionError, MissingPackageError, UnsupportedModelError)
"""Errors that every document would have."""


@dataclass(frozen=True)
class Job:
    """What is asked of every document, in plain values that another process can be sent.

    Args:
        press: as it is written on the command line.
        questions: one or more.
        max_new_tokens: most tokens of an answer.
        model: as for `load_pipeline`.
        device: as for `load_pipeline`.
        dtype: as for `load_pipeline`.
        store: folder or URL of a context store; None: every document is read.
        store_bytes: its bound; None: it has none.
        question_aware: whether the press sees each question.
    """

    press: str
    questions: tuple[str, ...]
    max_new_tokens: int
    model: str | None = None
    device: str | None = None
    dtype: str | None = None
    store: str | None = None
    store_bytes: int | None = None
    question_aware: bool = False


@dataclass(frozen=True)
class Result:
    """What became of a document.

    Args:
        document: its name.
        answers: one for each question; None where it failed.
        error: why it failed; None where it did not.
        from_store: whether its context was in the store.
        report: what it cost, as plain values; None where it failed.
    """

    document: str
    answers: list[str] | None = None
    error: str | None = None
    from_store: bool = False
    report: dict[str, Any] | None = None


class Worker:
    """Loads the model of a job when it is first needed, and answers documents."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._pipe: TextGenerationPipeline | None = None
        self._press: BasePress | None = None
        self._store: ContextStore | None = None

    def run(self) -> dict[str, Any]:
        """What the answers depend on, beside the job: the model's name, a digest of it, and its dtype."""
        from quantpress.cache.saved.fingerprint import model_fingerprint
        from quantpress.cli.loading import model_name
        from quantpress.pipelines.contexts.context_key import model_digest

        pipe = self._loaded()
        known = {**model_fingerprint(pipe.model), "rotary": None}  # machines may round frequencies
        return {"weights": model_digest(known)[:16], "dtype": known["dtype"], "model": model_name(pipe)}

    def answer(self, document: Document) -> Result:
        """Answer the questions about one document.

        Returns:
            Its answers, or why it failed.

        Raises:
            QuantPressError: one of `FATAL`, or the model cannot be loaded.
        """
        self._loaded()
        try:
            return self._answered(document)
        except FATAL:
            raise
        except Exception as error:  # one document must not end the others
            return Result(document.name, error=f"{type(error).__name__}: {error}")

    def _answered(self, document: Document) -> Result:
        pipe, context, known = self._loaded(), document.text, None
        asked: dict[str, Any] = {"questions": list(self.job.questions), "report": True}
        asked["max_new_tokens"] = self.job.max_new_tokens
        reading: dict[str, Any] = {"press": self._press, "progress": False}
        if self._store is None:
            found = pipe(context, question_aware=self.job.question_aware, **asked, **reading)
        else:
            known = self._store.get(pipe, context, **reading)
            found = pipe(known or self._store.get_or_read(pipe, context, **reading), **asked)
        report = found["report"].as_dict()
        return Result(document.name, found["answers"], None, known is not None, report)

    def _loaded(self) -> "TextGenerationPipeline":
        if self._pipe is None:
            from quantpress.cli.loading import load_pipeline
            from quantpress.pipelines.contexts.store import ContextStore
            from quantpress.presses.expression import parse_press

            job = self.job
            self._press = parse_press(job.press)
            self._store = None if job.store is None else ContextStore(job.store, job.store_bytes)
            self._pipe = load_pipeline(job.model, job.device, job.dtype)
        return self._pipe
