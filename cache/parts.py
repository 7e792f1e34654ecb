"""What a cache is made of: named tensors and plain values, in a tree that can be written down and read again.

Whatever a cache keeps says once, beside its own code, how it comes apart and how it is put together::

    @portable("pages")
    class PageStore:
        def parts(self) -> Parts: ...
        @classmethod
        def from_parts(cls, parts: Parts) -> "PageStore": ...

A new kind of storage needs nothing else to be saved and loaded. Kinds are names in files: they stay.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor

from quantpress.errors import InvalidInputError

SEPARATOR = "/"


@dataclass(frozen=True)
class Parts:
    """One node of the tree.

    Args:
        kind: what it is; `rebuild` goes by it.
        about: plain values, as JSON has them.
        tensors: by name; a name has no slash.
        inner: what it is made of beside.
    """

    kind: str
    about: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    inner: dict[str, "Parts"] = field(default_factory=dict)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Parts":
        """The same tree with `change` applied to every tensor."""
        tensors = {name: change(tensor) for name, tensor in self.tensors.items()}
        return Parts(
            self.kind, self.about, tensors, {name: one.map(change) for name, one in self.inner.items()}
        )

    def flat(self, path: str = "") -> dict[str, Tensor]:
        """Every tensor of the tree under its path, such as "layers/0/tokens/sink_keys"."""
        tensors = {f"{path}{name}": tensor for name, tensor in self.tensors.items()}
        for name, one in self.inner.items():
            tensors.update(one.flat(f"{path}{name}{SEPARATOR}"))
        return tensors

    def outline(self) -> dict[str, Any]:
        """The tree without its tensors, as JSON has it."""
        inner = {name: one.outline() for name, one in self.inner.items()}
        return {"kind": self.kind, "about": self.about, "tensors": list(self.tensors), "inner": inner}

    @classmethod
    def from_outline(cls, outline: Any, tensors: dict[str, Tensor], path: str = "") -> "Parts":
        """The tree that `outline` and `flat` were made of.

        Raises:
            InvalidInputError: this is no outline, or a tensor that it names is missing.
        """
        try:
            about, names, inner = dict(outline["about"]), list(outline["tensors"]), dict(outline["inner"])
            own = {name: tensors[f"{path}{name}"] for name in names}
            kind = str(outline["kind"])
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInputError(f"what is below {path!r} cannot be read: {error!r}") from error
        below = {
            name: cls.from_outline(one, tensors, f"{path}{name}{SEPARATOR}") for name, one in inner.items()
        }
        return cls(kind, about, own, below)


class Portable(Protocol):
    """What can be taken apart, and put together again."""

    def parts(self) -> Parts:
        """What it is made of; tensors are not copied."""
        ...

    @classmethod
    def from_parts(cls, parts: Parts) -> Any:
        """The same thing again; tensors are not copied."""
        ...


Kind = TypeVar("Kind", bound=type[Portable])
_MAKERS: dict[str, Callable[[Parts], Any]] = {}


def portable(kind: str) -> Callable[[Kind], Kind]:
    """Register a class under the name that its parts carry."""

    def register(cls: Kind) -> Kind:
        register_maker(kind, cls.from_parts)
        return cls

    return register


def register_maker(kind: str, make: Callable[[Parts], Any]) -> None:
    """Let `rebuild` call `make` for parts of a kind, for classes that are not ours."""
    _MAKERS[kind] = make


def rebuild(parts: Parts, *kinds: str) -> Any:
    """What these parts were taken from.

    Args:
        parts: of any registered kind.
        kinds: those that are wanted here; any when left out.

    Raises:
        InvalidInputError: the kind is not known, or not wanted here.
    """
    make = _MAKERS.get(parts.kind)
    if make is None or (kinds and parts.kind not in kinds):
        known = ", ".join(sorted(kinds or _MAKERS))
        raise InvalidInputError(f"parts of kind {parts.kind!r} are not known here; known are {known}")
    return make(parts)
