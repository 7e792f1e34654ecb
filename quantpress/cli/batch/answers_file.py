"""The answers of a batch: a file with one line of JSON for each document, written once.

A line is on the disk (`fsync`) before the next one is begun. So a kill can only tear the last line, which is
taken off when the file is opened again. Which documents have a line is kept in a temporary database on disk.
"""

import hashlib
import json
import os
import sqlite3
from collections.abc import Mapping
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from quantpress.errors import InvalidInputError

RUN = ("questions", "press", "max_new_tokens", "question_aware", "weights", "dtype")
"""What the lines of a file agree in. Older files have no question_aware, which is False."""
_NAMES = {
    "weights": "the model's weights",
    "max_new_tokens": "--max-new-tokens",
    "question_aware": "--question-aware",
}


class AnswersFile:
    """An open file of answers, locked against a second run.

    Args:
        path: of the file; it is made if it is not there.
        about: what every line must say of its run: "press", "max_new_tokens", "questions",
            "question_aware".

    Attributes:
        torn: whether the last line was torn and taken off.

    Raises:
        InvalidInputError: the file cannot be written, belongs to another run, is used by another process, or
            is no file of answers.
    """

    def __init__(self, path: str, about: Mapping[str, Any]) -> None:
        self.path = path
        self.torn = False
        self._about = dict(about)
        self._names = sqlite3.connect("", isolation_level=None)  # a temporary file, gone when it is closed
        self._names.execute("PRAGMA journal_mode = OFF")
        self._names.execute("CREATE TABLE names (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        with ExitStack() as stack:
            stack.callback(self._names.close)
            try:
                self._file = stack.enter_context(open(path, "ab", buffering=0))
            except OSError as error:
                raise InvalidInputError(f"{path} cannot be written: {error}") from error
            _lock(self._file, path)
            self._read()
            self._to_disk(Path(path).absolute().parent)
            self._close = stack.pop_all()

    def __enter__(self) -> "AnswersFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close.close()

    def __contains__(self, name: str) -> bool:
        found = self._names.execute("SELECT 1 FROM names WHERE digest = ?", (_digest(name),))
        return found.fetchone() is not None

    def check_run(self, about: Mapping[str, Any]) -> None:
        """Add to what every line must say of its run, such as the model that answers now.

        Raises:
            InvalidInputError: the lines of the file say something else.
        """
        for name, value in about.items():
            if self._about.setdefault(name, value) != value:
                raise InvalidInputError(self._other_run(name, self._about[name], value))

    def add(self, document: str, answers: list[str], result: Mapping[str, Any]) -> None:
        """Write the line of a document; once this returns, it is on the disk.

        Args:
            document: name of the document, which has no line yet.
            answers: one for each question.
            result: what else the line says, beside the run.

        Raises:
            InvalidInputError: the line cannot be written.
        """
        pairs = zip(self._about["questions"], answers, strict=True)
        line = {
            "document": document,
            "answers": [{"question": question, "answer": answer} for question, answer in pairs],
            **{name: value for name, value in self._about.items() if name != "questions"},
            **result,
        }
        try:
            rest = memoryview(json.dumps(line).encode() + b"\n")
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InvalidInputError(
                f"{self.path} cannot be written: {error}; make room, and give the same command again"
            ) from error
        self._names.execute("INSERT INTO names VALUES (?)", (_digest(document),))

    def _read(self) -> None:
        """Check every line and note its document; take off a torn last one."""
        end = 0
        with open(self.path, "rb") as source:
            for number, line in enumerate(source, 1):
                if line.endswith(b"\n"):
                    self._note(number, line)
                    end += len(line)
                else:
                    self.torn = True
        if self.torn:
            self._file.truncate(end)
            os.fsync(self._file.fileno())

    def _note(self, number: int, line: bytes) -> None:
        try:
            found = dict(json.loads(line))
            document, pairs = str(found["document"]), found["answers"]
            known = {"question_aware": False, **found, "questions": [pair["question"] for pair in pairs]}
            run = {name: known[name] for name in RUN}
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInputError(
                f"line {number} of {self.path} is none that `quantpress batch` wrote ({error!r}); "
                "give another --out"
            ) from error
        for name, value in run.items():
            if self._about.setdefault(name, value) != value:
                raise InvalidInputError(self._other_run(name, value, self._about[name]))
        try:
            self._names.execute("INSERT INTO names VALUES (?)", (_digest(document),))
        except sqlite3.IntegrityError as error:
            raise InvalidInputError(
                f"line {number} of {self.path} answers {document} a second time; delete one of the two lines"
            ) from error

    def _other_run(self, name: str, before: Any, now: Any) -> str:
        return (
            f"{self.path} holds answers of another run: {_NAMES.get(name, name)} was {before!r}, is {now!r}; "
            "give another --out, or the options of that run"
        )

    def _to_disk(self, folder: Path) -> None:
        """The name of a new file."""
        if os.name == "posix":
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _digest(name: str) -> bytes:
    return hashlib.sha256(os.fsencode(name)).digest()[:16]


def _lock(file: FileIO, path: str) -> None:
    """Refuse a file that another run writes to; the lock ends with the process."""
    if os.name != "posix":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise InvalidInputError(
            f"another process writes to {path} ({error}); wait for it, or give another --out"
        ) from error
