"""Every exception that quantpress raises on purpose, and what to say of an unknown name.

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
    ├── MissingPackageError          (also an ImportError) an optional package that is not installed
    ├── ModelFilesError              the default model could not be fetched or is damaged
    └── CacheFileError               a saved cache or profile that cannot be written, or must not be read

Catch `QuantPressError` to catch them all. Each message names the value received and the remedy.
"""

import difflib
import sys
from collections.abc import Iterable
from importlib.machinery import PathFinder


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


class MissingPackageError(QuantPressError, ImportError):
    """Something needs a package that cannot be imported here."""


class ModelFilesError(QuantPressError):
    """The default model could not be fetched, or its files are damaged."""


class CacheFileError(QuantPressError):
    """A saved file that cannot be written; or one that is damaged, or of another version, model or codec."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name; empty if no name is near.

    Args:
        name: the unknown name.
        names: the known ones.

    Example:
        >>> did_you_mean("SnapVK", ["Knorm", "SnapKV"]), did_you_mean("x", ["Knorm"])
        ("did you mean 'SnapKV'?", '')
    """
    known = list(names)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or [one for one in known if name in one]
    near = near[:3]
    if near and (name in near[0] or near[0] in name):
        near = near[:1]
    return f"did you mean {' or '.join(map(repr, near))}?" if near else ""


def extra(name: str) -> str:
    """What to give `pip install` for an extra: there is no release yet, so that a checkout has to be at hand.

    Args:
        name: the extra.
    """
    return f'".[{name}]" in a checkout of quantpress'


def unknown_name(package: str, name: str, names: Iterable[str]) -> Exception:
    """What the `__getattr__` of a package raises for an unknown name; it says what was probably meant.

    Args:
        package: the package's name.
        name: the unknown name.
        names: the known ones.

    Returns:
        An AttributeError. To `from package import name` it is an ImportError, since Python drops the message
        of an AttributeError there.
    """
    known = list(names)
    hint = did_you_mean(name, known)
    if name.endswith("Press"):
        if name[: -len("Press")] in known:
            hint = f"it is {package}.{name[: -len('Press')]} here, and kvpress.{name} in kvpress"
        elif hasattr(sys.modules.get("kvpress"), name):
            hint = f"it is kvpress.{name}"
    end = f"; {hint}" if hint else ""
    imported = sys._getframe(2).f_code.co_name == "_handle_fromlist"  # of importlib, which asks first
    if imported and PathFinder.find_spec(f"{package}.{name}", sys.modules[package].__path__) is None:
        return ImportError(f"cannot import name {name!r} from {package!r}{end}", name=package)
    return AttributeError(f"module {package!r} has no attribute {name!r}{end}")
