"""A plan: how many bits the keys and the values of each layer of one model get, or of each KV head in it.

`quantpress fit` writes it, as JSON that people can read and edit, and `TurboQuant(plan=...)` packs with it.
"""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from quantpress.cache.saved.config_fingerprint import changed_fields
from quantpress.errors import CacheFileError, InvalidInputError
from quantpress.quantization.budget import WHOLE_BITS
from quantpress.version import __version__

FORMAT = 1
"""Version of the format of plans."""

SIDES = ("keys", "values")
AGAIN = "run `quantpress fit MODEL` for this model"

Number = TypeVar("Number", int, float)

Width = int | tuple[int, ...]
"""Bits of the keys, or of the values, of a layer: of all heads, or of each KV head."""

Error = float | tuple[float, ...]
"""Divergence that a width adds: of a layer, or of each of its KV heads."""

Widths = Mapping[int, tuple[Width, Width]]
Errors = Mapping[int, tuple[Mapping[int, Error], Mapping[int, Error]]]

_ABOUT: dict[str, Any] = {"model": str, "fingerprint": dict, "layers": dict}
_OPTIONAL: dict[str, Any] = {
    "text": str,
    "press": str,
    "method": str,
    "context": int,
    "bits": (int, float),
    "errors": dict,
}


@dataclass(frozen=True, repr=False)
class WidthPlan:
    """Code widths of keys and values, layer by layer or head by head, for one model.

    Args:
        model: name of the model.
        fingerprint: which models it is for, from `config_fingerprint`.
        widths: (key bits, value bits) by layer index, each 1, 2, 3, 4 or 8, of every layer that is packed. In
            place of a number, a tuple has the bits of each KV head.
        text: name of the text that the model was measured on.
        press: the press that it was measured under, as it is written.
        method: how it was measured: "layer-by-layer" or "one-pass".
        context: tokens of the context that the bytes were counted for; 0: not counted.
        bits: all bytes of the cache of such a context, in bits a value; 0: not counted.
        errors: by layer index, for keys and for values, the divergence in nats of the model that they add,
            by width; or a tuple with those of each KV head. Another budget can be met from them without the
            model.
        path: file that it was read from.

    Raises:
        InvalidInputError: there is no layer, a width is none of these, or keys and values of a layer have
            widths of different numbers of heads.

    Example:
        >>> WidthPlan("my-model", {}, {0: (4, 2), 1: ((3, 1), 2)}).mean_bits
        2.5
    """

    model: str
    fingerprint: Mapping[str, Any]
    widths: Widths
    text: str = ""
    press: str = ""
    method: str = ""
    context: int = 0
    bits: float = 0.0
    errors: Errors = field(default_factory=dict)
    path: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.widths:
            raise InvalidInputError(f"layers is {dict(self.widths)!r}; give the widths of each packed layer")
        for index, pair in self.widths.items():
            for side, bits in zip(SIDES, pair, strict=True):
                where = f'layers["{index}"]["{side}"]'
                for one in heads_of(bits) or (bits,):
                    _check_width(where, one)
            heads = [len(bits) for bits in pair if isinstance(bits, tuple)]
            if len({*heads}) > 1:
                raise InvalidInputError(
                    f'layers["{index}"] has widths of {heads[0]} heads for the keys and of {heads[1]} for '
                    "the values; give one for each KV head, or one number for all"
                )

    def __repr__(self) -> str:
        """The file that it was read from, as `TurboQuant(plan=...)` takes it; otherwise what it is."""
        if self.path is not None:
            return repr(self.path)
        return f"WidthPlan({self.model!r}, {len(self.widths)} layers, mean {self.mean_bits:.2f} bits)"

    @property
    def mean_bits(self) -> float:
        """Mean code width of keys and values over the layers, without scales and windows."""
        every = [heads_of(bits) for pair in self.widths.values() for bits in pair]
        return sum(sum(bits) / len(bits) for bits in every) / len(every)

    @property
    def by_head(self) -> bool:
        """Whether heads of a layer have widths of their own."""
        return any(isinstance(bits, tuple) for pair in self.widths.values() for bits in pair)

    def layer(self, index: int) -> tuple[Width, Width]:
        """Key bits and value bits of a layer.

        Raises:
            InvalidInputError: the plan does not have this layer.
        """
        if index not in self.widths:
            there = ", ".join(map(str, sorted(self.widths)))
            raise InvalidInputError(f"{self._name} has no widths of layer {index} (it has {there}); {AGAIN}")
        return self.widths[index]

    def check(self, config: Any, without: tuple[str, ...] = ()) -> None:
        """Refuse a model of another architecture or shape.

        A model of the same shape with other weights, such as a fine-tuned one, is accepted. Its cache is
        packed correctly with any widths.

        Args:
            config: configuration of the model: that of transformers, or vLLM's `hf_config`.
            without: fields of the fingerprint that do not count.

        Raises:
            CacheFileError: the plan is for another model; the message names both and the fields.
        """
        counted = {name: value for name, value in self.fingerprint.items() if name not in without}
        changed = changed_fields(counted, config)
        if changed:
            text = config.get_text_config(decoder=True)
            here = getattr(config, "name_or_path", "") or getattr(text, "model_type", type(config).__name__)
            raise CacheFileError(
                f"{self._name} has widths for {self.model}, not for {here}: {changed}; {AGAIN}"
            )

    @property
    def _name(self) -> str:
        return "the plan" if self.path is None else f"the plan {self.path}"

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write the plan, completely or not at all.

        Returns:
            Size of the file in bytes.

        Raises:
            CacheFileError: the file cannot be written.
        """
        text = json.dumps(self._plain(), indent=1)
        return write_json(path, text)

    def _plain(self) -> dict[str, Any]:
        """The contents of the file."""
        names = [name for name in (*_ABOUT, *_OPTIONAL) if name not in ("layers", "errors")]
        errors = {
            str(index): {
                side: {str(bits): _rounded(error) for bits, error in one.items()}
                for side, one in zip(SIDES, pair, strict=True)
            }
            for index, pair in sorted(self.errors.items())
        }
        layers = {
            str(index): dict(zip(SIDES, pair, strict=True)) for index, pair in sorted(self.widths.items())
        }
        about = {name: getattr(self, name) for name in names}
        written_by = {"quantpress_plan": FORMAT, "quantpress": __version__}
        return {**written_by, **about, "layers": layers, "errors": errors}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "WidthPlan":
        """Read a plan.

        Raises:
            CacheFileError: the file does not exist, or it is no plan; the message names file, key and value.
        """
        try:
            plain = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CacheFileError(
                f"{path} cannot be read as a plan: {error}; give a file of `quantpress fit`"
            ) from error
        except ValueError as error:
            raise CacheFileError(
                f"{path} is no plan: it is not JSON ({error}); give a file of `quantpress fit`"
            ) from error
        try:
            return cls(**_parsed(plain), path=str(path))
        except InvalidInputError as error:
            raise CacheFileError(f"{path} is no usable plan: {error}") from error


def heads_of(one: Number | tuple[Number, ...]) -> tuple[Number, ...]:
    """The width, or error, of each head, or the one of all."""
    return one if isinstance(one, tuple) else (one,)


def write_json(path: str | os.PathLike[str], text: str) -> int:
    """Write a text file, completely or not at all; the number of its bytes.

    Raises:
        CacheFileError: the file cannot be written.
    """
    path, data = Path(path), f"{text}\n".encode()
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
            unfinished = Path(scratch) / path.name
            unfinished.write_bytes(data)
            os.replace(unfinished, path)
    except OSError as error:
        raise CacheFileError(f"{path} cannot be written: {error}") from error
    return len(data)


def _parsed(plain: Any) -> dict[str, Any]:
    """The arguments of `WidthPlan` from the contents of a file."""
    if not isinstance(plain, dict) or "quantpress_plan" not in plain:
        raise InvalidInputError("it has no quantpress_plan; give a file of `quantpress fit`")
    if plain["quantpress_plan"] != FORMAT:
        raise InvalidInputError(
            f"quantpress_plan is {plain['quantpress_plan']!r}, this quantpress {__version__} reads {FORMAT}; "
            "run `quantpress fit` again"
        )
    about = {}
    for name, kind in {**_ABOUT, **_OPTIONAL}.items():
        value = plain.get(name)
        if value is None and name in _OPTIONAL:
            continue
        if not isinstance(value, kind) or isinstance(value, bool):
            words = kind.__name__ if isinstance(kind, type) else "number"
            raise InvalidInputError(f"{name} is {value!r}, not a {words}; {AGAIN}")
        about[name] = value
    layers = about.pop("layers")
    about["widths"] = {_index(key): _widths(f'layers["{key}"]', one) for key, one in layers.items()}
    errors = about.pop("errors", {})
    about["errors"] = {_index(key): _errors(f'errors["{key}"]', one) for key, one in errors.items()}
    return about


def _index(key: str) -> int:
    if not key.isdecimal():
        raise InvalidInputError(f'layers["{key}"] names no layer; give the index of a layer, such as "0"')
    return int(key)


def _widths(where: str, one: Any) -> tuple[Any, ...]:
    return tuple(tuple(bits) if isinstance(bits, list) else bits for bits in _sides(where, one))


def _rounded(error: Error) -> float | list[float]:
    if isinstance(error, tuple):
        return [float(f"{one:.4g}") for one in error]
    return float(f"{error:.4g}")


def _sides(where: str, one: Any) -> tuple[Any, Any]:
    if not isinstance(one, dict) or set(one) != set(SIDES):
        raise InvalidInputError(f'{where} is {one!r}; give both widths, such as {{"keys": 3, "values": 2}}')
    return one["keys"], one["values"]


def _errors(where: str, one: Any) -> Any:
    found = []
    for side, by_width in zip(SIDES, _sides(where, one), strict=True):
        here = f'{where}["{side}"]'
        if not isinstance(by_width, dict):
            raise InvalidInputError(f"{here} is {by_width!r}, not an error for each width; {AGAIN}")
        for bits, error in by_width.items():
            _check_width(here, int(bits) if bits.isdecimal() else bits)
            for part in error if isinstance(error, list) and error else [error]:
                plain = isinstance(part, (int, float)) and not isinstance(part, bool)
                if not plain or not math.isfinite(part) or part < 0:
                    raise InvalidInputError(f'{here}["{bits}"] is {error!r}, not a divergence; {AGAIN}')
        found.append({int(bits): _error(error) for bits, error in by_width.items()})
    return tuple(found)


def _error(error: Any) -> Error:
    return tuple(map(float, error)) if isinstance(error, list) else float(error)


def _check_width(where: str, bits: Any) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in WHOLE_BITS:
        raise InvalidInputError(f"{where} is {bits!r}; give one of {', '.join(map(str, WHOLE_BITS))}")
