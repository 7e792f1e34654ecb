"""What a cache or a codec is made of: a tree of named tensors and plain values that can be saved and loaded.

Each class says once, beside its own code, how it is taken apart and how it is put together again::

    @portable("pages")
    class PageStore:
        def parts(self) -> Parts: ...
        @classmethod
        def from_parts(cls, parts: Parts) -> "PageStore": ...

A new class needs nothing else to be saved and loaded. The kind is the name of the class in files, so it must
not change. To load a file, the module of every class in it must have been imported.
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
        kind: the name of its class in files; `rebuild` looks the class up by it.
        about: plain JSON values.
        tensors: tensors by name; a name has no slash.
        inner: the nodes below this one, by name.
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
        """The tree as JSON values, with the names of its tensors in place of the tensors."""
        inner = {name: one.outline() for name, one in self.inner.items()}
        return {"kind": self.kind, "about": self.about, "tensors": list(self.tensors), "inner": inner}

    @classmethod
    def from_outline(cls, outline: Any, tensors: dict[str, Tensor], path: str = "") -> "Parts":
        """Put a tree together from what `outline` and `flat` returned.

        Args:
            outline: what `outline` returned.
            tensors: what `flat` returned.
            path: where in `tensors` the tree begins.

        Raises:
            InvalidInputError: `outline` is not an outline, or a tensor that it names is missing.
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
    """A class whose objects can be taken apart and put together again."""

    def parts(self) -> Parts:
        """What the object is made of; tensors are not copied."""
        ...

    @classmethod
    def from_parts(cls, parts: Parts) -> Any:
        """The object that `parts` took apart; tensors are not copied."""
        ...


Kind = TypeVar("Kind", bound=type[Portable])
_MAKERS: dict[str, Callable[[Parts], Any]] = {}
_KINDS: dict[type, str] = {}


def portable(kind: str) -> Callable[[Kind], Kind]:
    """Register a class under the kind that its parts have."""

    def register(cls: Kind) -> Kind:
        _KINDS[cls] = kind
        register_maker(kind, cls.from_parts)
        return cls

    return register


def register_maker(kind: str, make: Callable[[Parts], Any]) -> None:
    """Let `rebuild` call `make` for parts of a kind whose class is not ours to decorate."""
    _MAKERS[kind] = make


def kind_of(one: Portable) -> str:
    """The kind that the object's class is registered under; subclasses need a registration of their own.

    Raises:
        InvalidInputError: the class is not registered.
    """
    kind = _KINDS.get(type(one))
    if kind is None:
        raise InvalidInputError(
            f"{type(one).__name__} cannot be saved, because no file could name it; decorate the class with "
            "quantpress.codecs.parts.portable"
        )
    return kind


def rebuild(parts: Parts, *kinds: str) -> Any:
    """Put together the object that the parts were taken from.

    Args:
        parts: what `parts()` returned.
        kinds: the kinds that are allowed here; every registered one when left out.

    Raises:
        InvalidInputError: the kind is not registered, or not allowed here.
    """
    make = _MAKERS.get(parts.kind)
    if make is None or (kinds and parts.kind not in kinds):
        known = ", ".join(sorted(kinds or _MAKERS))
        raise InvalidInputError(
            f"parts of kind {parts.kind!r} are not known here; known are {known}; "
            "import the module that defines it"
        )
    return make(parts)
