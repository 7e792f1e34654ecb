"""Every exception that quantpress raises on purpose.

The tree::

    QuantPressError
    ├── InvalidInputError            (also a ValueError)
    │   ├── UnsupportedBitsError     a width that no codec stores
    │   ├── UnsupportedHeadDimError  a head_dim that cannot be rotated or packed
    │   ├── EmptyContextError        nothing to read
    │   ├── ContextTooLongError      more tokens than the model has positions
    │   └── NonFiniteError           NaN or infinity where a number is needed
    ├── CompositionError             (also a ValueError) presses that do not go together
    ├── NotAppliedError              a run went by and nothing was compressed
    ├── PoolFullError                no block, or no place for a sequence, is free
    ├── UnsupportedModelError        a model, or an attention of it, that cannot be packed
    ├── ModelFilesError              the default model could not be fetched or is damaged
    └── CacheFileError               a saved cache that cannot be written, or must not be read

Catch `QuantPressError` to catch them all. Each message names the value received and the remedy.
"""


class QuantPressError(Exception):
    """Base of every exception that quantpress raises on purpose."""


class InvalidInputError(QuantPressError, ValueError):
    """An argument has a value that cannot be used."""


class UnsupportedBitsError(InvalidInputError):
    """A code width that no codec can store."""


class UnsupportedHeadDimError(InvalidInputError):
    """A head_dim that cannot be rotated or packed."""


class EmptyContextError(InvalidInputError):
    """The context holds no token."""


class ContextTooLongError(InvalidInputError):
    """The context holds more tokens than the model has positions."""


class NonFiniteError(InvalidInputError):
    """A tensor holds NaN or infinity."""


class CompositionError(QuantPressError, ValueError):
    """Presses that cannot be used together, or not in this order."""


class NotAppliedError(QuantPressError):
    """A run went by and nothing was compressed."""


class PoolFullError(QuantPressError):
    """Paged attention has no free block, or no free place for a sequence. Nothing was changed."""


class UnsupportedModelError(QuantPressError):
    """A model, or its attention implementation, whose cache cannot be packed."""


class ModelFilesError(QuantPressError):
    """The default model could not be fetched, or its files are damaged."""


class CacheFileError(QuantPressError):
    """A saved cache that cannot be written; or one damaged, of another version, model or codec."""
