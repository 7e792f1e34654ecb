"""One safetensors file that is what was written, or is refused with the reason.

Beside its tensors the file holds, in the header of the safetensors format, a JSON text and its SHA-256. The
text has the format's version, whatever the writer describes, and dtype, shape and SHA-256 of every tensor.
So a byte that changed anywhere is noticed: in the data by a tensor's digest, in the table of tensors by what
the text says about them, in the text by its own digest.

Tensors that are read are views of a private memory map: nothing is held until it is used, and what is written
to them stays in this process. Checking the digests reads the file through once.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantpress import __version__
from quantpress.errors import CacheFileError

FORMAT = 1
"""Raise it when files of before can no longer be read right: another page layout, other names of parts."""

_TEXT, _DIGEST = "quantpress", "sha256"
_PRIVATE = 0o600


def write_file(path: str | os.PathLike[str], about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """Write a file that is complete or not there at all, readable by its owner only.

    Args:
        path: an older file of this name is replaced, once the new one is on the disk.
        about: plain values, as JSON has them.
        tensors: of any device; moved to the CPU one by one.

    Returns:
        Bytes written.

    Raises:
        CacheFileError: the file system refuses.
    """
    path = Path(path)
    held = _plain(tensors)
    table = {name: {**_shape(tensor), "sha256": _digest(tensor)} for name, tensor in held.items()}
    text = json.dumps({"format": FORMAT, "quantpress": __version__, **about, "tensors": table})
    header = {_TEXT: text, _DIGEST: hashlib.sha256(text.encode()).hexdigest()}
    try:
        # A folder that only its owner can enter, so that no half or readable file is ever seen.
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
            unfinished = Path(scratch) / path.name
            save_file(held, unfinished, metadata=header)
            unfinished.chmod(_PRIVATE)
            _to_disk(unfinished)
            os.replace(unfinished, path)
        _to_disk(path.parent)
    except OSError as error:
        raise CacheFileError(f"{path} cannot be written: {error}") from error
    return path.stat().st_size


def read_file(path: str | os.PathLike[str], verify: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write_file` has written.

    Args:
        path: the file. Do not change it in place while its tensors are in use; replacing it is safe.
        verify: compare every tensor with its digest. Without, only the header is known to be right.

    Returns:
        The description, with "format", "quantpress" and "tensors"; the tensors by name, mapped, on the CPU.

    Raises:
        CacheFileError: not there, cut short, changed, not such a file, or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise CacheFileError(f"{path} is not a file; give one that CachedContext.save or `pack` wrote")
    try:
        with safe_open(path, framework="pt") as source:
            about = _described(path, source.metadata() or {})
            if set(source.keys()) != set(about["tensors"]):
                raise CacheFileError(f"{path} is damaged: its table of tensors has changed; pack it again")
            tensors = {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118
    except CacheFileError:
        raise
    except Exception as error:  # the library raises many kinds for what is no safetensors file
        raise CacheFileError(f"{path} is damaged or cut short ({error}); pack it again") from error
    for name, tensor in tensors.items():
        entry = about["tensors"][name]
        if _shape(tensor) != {"dtype": entry["dtype"], "shape": entry["shape"]}:
            raise CacheFileError(f"{path} is damaged: {name} has changed its form; pack it again")
        if verify and _digest(tensor) != entry["sha256"]:
            raise CacheFileError(f"{path} is damaged: the bytes of {name} have changed; pack it again")
    return about, tensors


def _described(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    text = header.get(_TEXT)
    if text is None:
        raise CacheFileError(f"{path} is a safetensors file, but no saved cache")
    if hashlib.sha256(text.encode()).hexdigest() != header.get(_DIGEST):
        raise CacheFileError(f"{path} is damaged: its description has changed; pack it again")
    about: dict[str, Any] = json.loads(text)
    if about.get("format") != FORMAT:
        raise CacheFileError(
            f"{path} has format {about.get('format')!r} (written by quantpress {about.get('quantpress')}), "
            f"this quantpress {__version__} reads format {FORMAT}; pack it again, or use that version"
        )
    return about


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, none sharing memory with another: what the format can hold."""
    held: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        one = tensor.detach().to("cpu").contiguous()
        if one.untyped_storage().data_ptr() in seen:
            one = one.clone()
        seen.add(one.untyped_storage().data_ptr())
        held[name] = one
    return held


def _shape(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def _digest(tensor: Tensor) -> str:
    flat = tensor.reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def _to_disk(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return  # elsewhere a folder cannot be opened
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
