"""Where files lie: a path of this machine, or a URL that fsspec knows, such as s3://bucket/name.

Whatever the place, a file is written completely or not at all, and it is read as a file of this machine,
which can be mapped into memory. A remote file passes through the folder for temporary files (`TMPDIR`) in
pieces, so that it is never in memory beside its tensors.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from fsspec.core import split_protocol, url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import available_protocols

from quantpress.errors import CacheFileError, InvalidInputError, MissingPackageError, did_you_mean

LOCAL = ("file", "local")
PIECE = 16 * 2**20
"""Bytes that are uploaded at a time."""

Place = str | os.PathLike[str]


def local_path(place: Place) -> Path | None:
    """The path on this machine; None for a place elsewhere.

    Example:
        >>> local_path("a/b"), local_path("file:///a/b"), local_path("s3://bucket/b")
        (PosixPath('a/b'), PosixPath('/a/b'), None)
    """
    text = os.fspath(place)
    if "://" not in text:
        return Path(place)
    if "::" in text or split_protocol(text)[0] not in LOCAL:
        return None
    return Path(url_to_fs(text)[1])


def file_system(place: Place) -> tuple[Any, str]:
    """The file system of a place, and its path there.

    Args:
        place: a path, or a URL; options and credentials are those that fsspec is configured with.

    Raises:
        InvalidInputError: nothing knows the protocol.
        MissingPackageError: the package that knows the protocol is not installed.
    """
    text, path = os.fspath(place), local_path(place)
    if path is not None:
        return LocalFileSystem(), str(path.absolute())
    try:
        found: tuple[Any, str] = url_to_fs(text)
    except ImportError as error:
        raise MissingPackageError(f"{text} needs a package that is not here: {error}") from error
    except ValueError as error:
        protocol = text.partition("://")[0]
        hint = did_you_mean(protocol, available_protocols()) or "install the package that adds it to fsspec"
        raise InvalidInputError(
            f"{text} cannot be opened ({error}); {hint}, or give a path, s3://, gs:// or hf://"
        ) from error
    return found


@contextmanager
def for_reading(place: Place, again: str) -> Iterator[Path]:
    """The file as one of this machine; a remote one is gone afterwards, but not what was mapped from it.

    Args:
        place: of the file.
        again: what to do where there is none.

    Raises:
        CacheFileError: there is no such file, or it cannot be fetched.
        InvalidInputError, MissingPackageError: as for `file_system`.
    """
    path = local_path(place)
    if path is not None:
        if not path.is_file():
            raise CacheFileError(f"{place} is not a file; {again}")
        yield path
        return
    files, inner = file_system(place)
    with tempfile.TemporaryDirectory(prefix="quantpress-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "fetched"
        try:
            files.get_file(inner, str(path))
        except FileNotFoundError as error:
            raise CacheFileError(f"{place} is not a file; {again}") from error
        except Exception as error:  # each package has exceptions of its own
            raise CacheFileError(f"{place} cannot be read: {error}") from error
        if not path.is_file():
            raise CacheFileError(f"{place} is not a file; {again}")
        yield path


def read_bytes(place: Place, start: int, stop: int, again: str) -> bytes:
    """The bytes from `start` to `stop` of a file; of a remote one no others are fetched.

    Raises:
        CacheFileError, InvalidInputError, MissingPackageError: as for `for_reading`.
    """
    path = local_path(place)
    try:
        if path is not None:
            with path.open("rb") as source:
                source.seek(start)
                return source.read(stop - start)
        files, inner = file_system(place)
        found: bytes = files.cat_file(inner, start=start, end=stop)
        return found
    except (FileNotFoundError, IsADirectoryError) as error:
        raise CacheFileError(f"{place} is not a file; {again}") from error
    except (InvalidInputError, MissingPackageError):
        raise
    except Exception as error:  # each package has exceptions of its own
        raise CacheFileError(f"{place} cannot be read: {error}") from error


@contextmanager
def for_writing(place: Place, mode: int) -> Iterator[Path]:
    """A file to be written, which is moved to its place once the block has ended without an error.

    Args:
        place: of the file; an older one is replaced.
        mode: who can read it, on this machine; elsewhere the place itself decides.

    Raises:
        CacheFileError: it cannot be written.
        InvalidInputError, MissingPackageError: as for `file_system`.
    """
    path = local_path(place)
    files, inner = (None, "") if path is not None else file_system(place)
    beside: dict[str, Any] = {} if path is None else {"prefix": f".{path.name}-", "dir": path.parent}
    try:
        # Only its owner can enter this folder, so that nobody sees an unfinished or readable file.
        with tempfile.TemporaryDirectory(**beside) as scratch:
            unfinished = Path(scratch) / "unfinished"
            yield unfinished
            unfinished.chmod(mode)
            if path is None:
                _upload(files, unfinished, inner)
                return
            _to_disk(unfinished)
            os.replace(unfinished, path)
        _to_disk(path.parent)
    except OSError as error:
        raise CacheFileError(f"{place} cannot be written: {error}") from error


def _upload(files: Any, path: Path, inner: str) -> None:
    """Put a file under another name, then move it."""
    folder, _, name = inner.rpartition("/")
    unfinished = f"{folder}/.{name}-{uuid4().hex}"
    try:
        # Some packages' put_file holds many pieces at once.
        with path.open("rb") as source, files.open(unfinished, "wb", block_size=PIECE) as target:
            shutil.copyfileobj(source, target, PIECE)
        files.mv(unfinished, inner)
    except Exception as error:  # each package has exceptions of its own
        with suppress(Exception):
            files.rm_file(unfinished)
        raise OSError(str(error) or type(error).__name__) from error


def _to_disk(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return  # only POSIX can open a folder
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
