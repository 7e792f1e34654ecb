"""Read one value of a GGUF file's metadata."""

from typing import Any

from gguf import GGUFReader

from quantpress.errors import ModelFilesError


def value(reader: GGUFReader, key: str) -> Any:
    """The value stored under `key`: a number, a string or a list of them.

    Raises:
        ModelFilesError: the file has no such key.
    """
    field = reader.get_field(key)
    if field is None:
        raise ModelFilesError(f"the GGUF file's metadata has no {key!r}: it is not the expected model.")
    return field.contents()
