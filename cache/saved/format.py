"""The file format: a safetensors file with checksums. A file that has changed is refused.

Files lie on this machine or elsewhere; see `quantpress.cache.saved.places`.

The header of the safetensors file holds a JSON text and its SHA-256. The text contains the version of the
format, the description given by the writer, and dtype, shape and SHA-256 of every tensor. So a change of any
byte is detected: in a tensor by its digest, in the table of tensors by comparison with the text, and in the
text by its own digest.

The tensors of a file that was read are views of a private memory map. Data is loaded when it is used, and
writes to the tensors stay in this process. Checking the digests reads the whole file once.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantpress.cache.saved.places import Place, for_reading, for_writing, read_bytes
from quantpress.errors import CacheFileError
from quantpress.version import __version__

FORMAT = 1
"""Version of the format of every kind of file. Increase it when older files can no longer be read: another
page layout or names."""

_DIGEST = "sha256"
_LENGTH = 8  # bytes in front of the header, which say how long it is
_LARGEST_HEADER = 100_000_000  # bytes; safetensors allows no more


@dataclass(frozen=True)
class FileKind:
    """What a file holds, as far as format and messages depend on it.

    Args:
        entry: entry of the header that holds the description.
        name: what the file is, such as "saved cache".
        writers: what writes such a file.
        again: what to do when it cannot be read.
        mode: who can read it, as POSIX has it.
    """

    entry: str
    name: str
    writers: str
    again: str
    mode: int

    @property
    def remedy(self) -> str:
        """What to do where a file is none of this kind."""
        return f"give one that {self.writers} wrote"


SAVED_CACHE = FileKind(
    "quantpress", "saved cache", "CachedContext.save or `pack`", "pack it again", mode=0o600
)


def write_file(
    path: Place,
    about: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    kind: FileKind = SAVED_CACHE,
) -> int:
    """Write a file, completely or not at all.

    Args:
        path: path or URL of the file. An existing file is replaced once the new one is complete.
        about: the description: plain values that JSON can hold.
        tensors: tensors by name, on any device; they are moved to the CPU one by one.
        kind: what the file holds.

    Returns:
        Size of the file in bytes.

    Raises:
        CacheFileError: the file cannot be written.
        InvalidInputError, MissingPackageError: nothing here knows the URL's protocol.
    """
    held = _plain(tensors)
    table = {name: {**_shape(tensor), "sha256": _digest(tensor)} for name, tensor in held.items()}
    text = json.dumps({"format": FORMAT, "quantpress": __version__, **about, "tensors": table})
    header = {kind.entry: text, _DIGEST: hashlib.sha256(text.encode()).hexdigest()}
    with for_writing(path, kind.mode) as unfinished:
        save_file(held, unfinished, metadata=header)
        size = unfinished.stat().st_size
    return size


def read_file(
    path: Place, verify: bool = True, kind: FileKind = SAVED_CACHE
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file written by `write_file`.

    Args:
        path: path or URL of the file. Do not change a file of this machine in place while its tensors are in
            use; replacing it is safe.
        verify: compare every tensor with its digest. If False, only the header is checked.
        kind: what the file must hold.

    Returns:
        The description, with "format", "quantpress" and "tensors" added; and the tensors by name, memory
        mapped, on the CPU.

    Raises:
        CacheFileError: the file does not exist, is truncated, has changed, has another format or version.
    """
    with for_reading(path, kind.remedy) as here:
        try:
            with safe_open(here, framework="pt") as source:
                about = _described(path, source.metadata() or {}, kind)
                if set(source.keys()) != set(about["tensors"]):
                    raise CacheFileError(f"{path} is damaged: its table of tensors has changed; {kind.again}")
                tensors = {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118
        except CacheFileError:
            raise
        except Exception as error:  # safetensors raises exceptions of many types
            raise CacheFileError(f"{path} is damaged or cut short ({error}); {kind.again}") from error
    for name, tensor in tensors.items():
        entry = about["tensors"][name]
        if _shape(tensor) != {"dtype": entry["dtype"], "shape": entry["shape"]}:
            raise CacheFileError(f"{path} is damaged: {name} has changed its form; {kind.again}")
        if verify and _digest(tensor) != entry["sha256"]:
            raise CacheFileError(f"{path} is damaged: the bytes of {name} have changed; {kind.again}")
    return about, tensors


def read_description(path: Place, kind: FileKind = SAVED_CACHE) -> dict[str, Any]:
    """The description alone, of a file that `read_file` reads; nothing after the header is read.

    Raises:
        CacheFileError: as for `read_file`, as far as the header tells.
    """
    size = int.from_bytes(read_bytes(path, 0, _LENGTH, kind.remedy), "little")
    try:
        if size > _LARGEST_HEADER:
            raise ValueError(f"a header of {size} bytes")
        header = json.loads(read_bytes(path, _LENGTH, _LENGTH + size, kind.remedy))
        known = dict(header.get("__metadata__") or {})
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise CacheFileError(f"{path} is damaged or cut short ({error}); {kind.again}") from error
    return _described(path, known, kind)


def _described(path: Place, header: Mapping[str, str], kind: FileKind) -> dict[str, Any]:
    text = header.get(kind.entry)
    if text is None:
        raise CacheFileError(f"{path} is a safetensors file, but no {kind.name}; {kind.remedy}")
    if hashlib.sha256(text.encode()).hexdigest() != header.get(_DIGEST):
        raise CacheFileError(f"{path} is damaged: its description has changed; {kind.again}")
    about: dict[str, Any] = json.loads(text)
    if about.get("format") != FORMAT:
        raise CacheFileError(
            f"{path} has format {about.get('format')!r} (written by quantpress {about.get('quantpress')}), "
            f"this quantpress {__version__} reads format {FORMAT}; {kind.again}, or use that version"
        )
    return about


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors needs them: on the CPU, contiguous, none sharing memory with another."""
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
