"""Options that several commands share, and checks of arguments.

None of it needs a model, or an import that takes seconds.
"""

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from quantpress.errors import EmptyContextError, InvalidInputError

STDIN = "-"
AUTO = "auto"
SYNTAX = 'such as "SnapKV(0.5) | TurboQuant(bits=3)"'

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Id or folder of a model; left out, the default model.")
]
Device = Annotated[
    str | None,
    typer.Option(help="Such as cuda:1 or cpu; auto spreads the model over all GPUs; left out, a GPU if any."),
]
Dtype = Annotated[
    Literal["bfloat16", "float16", "float32"] | None,
    typer.Option(help="Dtype of the model; left out, the model's own."),
]
Press = Annotated[str, typer.Option("--press", "-p", help=f"What compresses the cache, {SYNTAX}.")]
Presses = Annotated[
    list[str] | None,
    typer.Option("--press", "-p", help=f"What compresses the cache, {SYNTAX}; may be repeated."),
]
Store = Annotated[str | None, typer.Option(help="Folder or URL of a context store.")]
StoreBytes = Annotated[str | None, typer.Option(help="Most bytes of the store, such as 20GB.")]
Questions = Annotated[
    list[str] | None, typer.Option("--question", "-q", help="Asked after the text; may be repeated.")
]
QuestionAware = Annotated[
    bool,
    typer.Option(
        "--question-aware", help="Read each question with the text, in view of the press: a reading for each."
    ),
]

UNITS = {"B": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}}
UNITS |= {f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)}


def byte_count(text: str) -> int:
    """Read a number of bytes with its unit: kB, MB, GB and TB go by 1000, KiB, MiB, GiB and TiB by 1024.

    Raises:
        InvalidInputError: `text` is not a number of bytes, or the unit is left out.

    Example:
        >>> byte_count("80GB"), byte_count("1.5 GiB"), byte_count("512 B")
        (80000000000, 1610612736, 512)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {name.lower(): size for name, size in UNITS.items()}
    if found is not None and not found[2]:
        raise InvalidInputError(
            f"{text!r} has no unit; write {found[1]}GB (10^9 bytes each) or {found[1]}GiB (2^30 bytes each)"
        )
    if found is None or found[2].lower() not in units or not float(found[1]):
        raise InvalidInputError(f"{text!r} is not a number of bytes; write it like 80GB, 24GiB or 512MB")
    return int(float(found[1]) * units[found[2].lower()])


def read_text(file: str) -> str:
    """Read a text file, or the standard input for "-".

    Raises:
        InvalidInputError: the file cannot be read, or it is not UTF-8.
        EmptyContextError: the text is empty, or only white space.
    """
    try:
        text = sys.stdin.read() if file == STDIN else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{file} cannot be read as text: {error}") from error
    if not text.strip():
        raise EmptyContextError(f"{'the standard input' if file == STDIN else file} has no text; give some")
    return text


def is_url(place: str) -> bool:
    """Whether this is a URL, such as s3://bucket/name, and no path."""
    return "://" in place


def check_url(url: str) -> None:
    """Check that something here knows the protocol of a URL; nothing is fetched.

    Raises:
        InvalidInputError, MissingPackageError: as for `file_system`.
    """
    from quantpress.cache.saved.places import file_system

    file_system(url)


def store_bound(store: str | None, store_bytes: str | None) -> int | None:
    """The most bytes of a context store; None: no bound. Checks the store's place, as far as it is a URL.

    Raises:
        InvalidInputError: there is a bound and no store, or as for `byte_count` and `check_url`.
        MissingPackageError: as for `check_url`.
    """
    if store is not None and is_url(store):
        check_url(store)
    if store_bytes is None:
        return None
    bound = byte_count(store_bytes)
    if store is None:
        raise InvalidInputError(
            f"--store-bytes {store_bytes} bounds a store; give its place, --store PATH, too"
        )
    return bound


def check_packed(file: str) -> None:
    """Check that a packed context can be opened; of a URL, that its protocol is known.

    Raises:
        InvalidInputError: there is no such file, or it may not be read.
        MissingPackageError: the package for a URL is not installed.
    """
    if is_url(file):
        return check_url(file)
    if not Path(file).is_file():
        raise InvalidInputError(f"{file} is not a file; give one that `quantpress pack` wrote")
    if not os.access(file, os.R_OK):
        raise InvalidInputError(f"{file} cannot be read; check its permissions")


def texts_and_output(files: list[str] | None, output: str) -> dict[str, str]:
    """Read the texts of a command, by name, and check the file that it will write.

    Raises:
        InvalidInputError: a text cannot be read, the file cannot be written, or it is one of the texts.
        EmptyContextError: a text is empty.
    """
    files = files or []
    texts = {"the standard input" if file == STDIN else file: read_text(file) for file in files}
    check_output_file(output)
    for file in files:
        if file != STDIN and Path(output).exists() and Path(output).samefile(file):
            raise InvalidInputError(f"{output} is a text to read; give --output another name")
    return texts


def check_output_file(file: str) -> None:
    """Check that a file can be written; of a URL, that its protocol is known.

    Raises:
        InvalidInputError: it is a folder, or its own folder does not exist or may not be written.
        MissingPackageError: the package for a URL is not installed.
    """
    if is_url(file):
        return check_url(file)
    path = Path(file)
    if path.is_dir():
        raise InvalidInputError(f"{file} is a folder; give the name of a file to write")
    if not path.parent.is_dir():
        raise InvalidInputError(f"{file} cannot be written: there is no folder {path.parent}; make it first")
    _check_writable(path.parent, file)


def check_output_folder(folder: Path) -> None:
    """Check that a folder can be written, or made.

    Raises:
        InvalidInputError: a file is in its way, or the folder that it would be in may not be written.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InvalidInputError(f"{folder} cannot be made a folder: {there} is a file; give another name")
    _check_writable(there, folder)


def _check_writable(folder: Path, wanted: str | Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidInputError(f"{wanted} cannot be written: you may not write in {folder}; choose another")


def check_loading(model: str | None, device: str | None, dtype: str | None) -> None:
    """Check what `load_pipeline` will be given, as far as that is possible without loading.

    Args:
        model: id or folder; None for the default model. Ids are looked up only when the model is loaded.
        device: as for `load_pipeline`.
        dtype: as for `load_pipeline`. Left out, `QUANTPRESS_DTYPE` is checked for the default model.

    Raises:
        InvalidInputError: the folder holds no model, this machine has no such device, or
            `QUANTPRESS_DTYPE` names no dtype.
    """
    if model is not None:
        _check_model(model)
    if device not in (None, AUTO, "cpu"):
        _check_device(str(device))
    if model is None and dtype is None:
        from quantpress.pipelines.default_model.quick_dtype import forced_name

        forced_name()


def _check_model(model: str) -> None:
    """Refuse a folder that is not there, or has no model in it; an id of the hub has at most one slash."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InvalidInputError(f"{model} cannot be loaded: it has no config.json; give a model's folder")
    elif folder.exists():
        raise InvalidInputError(f"{model} cannot be loaded: it is a file; give the model's folder")
    elif model.count("/") > 1 or model.startswith((".", "/", "~")) or not model.strip():
        raise InvalidInputError(f"{model} cannot be loaded: there is no such folder; give an id or a folder")


def _check_device(device: str) -> None:
    """Refuse a device that this machine does not have."""
    import torch

    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise InvalidInputError(f"there is no device {device!r}; use cpu, cuda, cuda:1 or auto") from error
    here = torch.accelerator.current_accelerator(check_available=True)
    count = 0 if here is None or here.type != wanted.type else torch.accelerator.device_count()
    if wanted.type != "cpu" and (wanted.index or 0) >= count:
        name = wanted.type
        found = f"{name}:0 to {name}:{count - 1}" if count > 1 else f"{name}:0" if count else f"no {name}"
        why = " (torch is a CPU build)" if name == "cuda" and torch.version.cuda is None else ""
        raise InvalidInputError(
            f"there is no device {device}: torch finds {found} here{why}; use cpu or auto"
        )
