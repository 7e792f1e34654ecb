"""The documents of a folder, one after the other; no list of them is ever in memory."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from quantpress.errors import InvalidInputError


@dataclass(frozen=True)
class Document:
    """A text and its name, which is its path in the folder with forward slashes."""

    name: str
    text: str


def files_of(folder: Path, pattern: str) -> Iterator[tuple[str, Path]]:
    """Name and path of every file in a folder and the folders in it, in the order of the file system.

    Args:
        folder: the folder. Links to folders are not followed.
        pattern: of the names of files, such as "*.txt". Hidden files and folders are left out.

    Raises:
        InvalidInputError: the folder, or one in it, cannot be read.
    """
    yield from _files(folder, pattern, "")


def _files(folder: Path, pattern: str, above: str) -> Iterator[tuple[str, Path]]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    yield from _files(Path(entry.path), pattern, f"{above}{entry.name}/")
                elif fnmatch(entry.name, pattern) and entry.is_file():
                    yield f"{above}{entry.name}", Path(entry.path)
    except OSError as error:
        raise InvalidInputError(f"{folder} cannot be read as a folder: {error}") from error


def read_questions(file: str, text: str) -> tuple[str, ...]:
    """The questions of a file, one a line; empty lines do not count.

    Raises:
        InvalidInputError: there is none.
    """
    questions = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not questions:
        raise InvalidInputError(f"{file} has no question; write one on each line")
    return questions
