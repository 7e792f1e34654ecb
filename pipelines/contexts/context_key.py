"""The name of a context in a store: a digest of everything that its cache follows from."""

import hashlib
import inspect
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePath
from typing import Any

from torch import Tensor

from quantpress.cache.saved.format import FORMAT
from quantpress.errors import InvalidInputError
from quantpress.pipelines.reading.planned import Reading
from quantpress.presses.base_press import BasePress
from quantpress.presses.compose import Compose
from quantpress.version import __version__

_PLAIN = (bool, int, float, str, type(None))


def context_key(plan: Reading, model: Mapping[str, Any]) -> str:
    """The key of a context: 64 hexadecimal digits, the same in every process.

    It depends on the token ids, the text after a question, the press with all its settings, the chunks of
    reading, the model's fingerprint, and the versions of quantpress and kvpress.

    Args:
        plan: what would be read, and how.
        model: the fingerprint of the model (`model_fingerprint`).

    Raises:
        InvalidInputError: a setting of the press has no lasting name, such as a function or a tensor.
    """
    about = {
        "versions": [FORMAT, __version__, _kvpress()],
        "ids": [list(plan.ids.shape), _digest(plan.ids)],
        "after": plan.after,
        "press": _settings(plan.press, "press"),
        "chunk_tokens": plan.chunk_tokens,
        "model": model_digest(model),
    }
    return _sha256(about)


def model_digest(model: Mapping[str, Any]) -> str:
    """A fingerprint (`model_fingerprint`) as 64 hexadecimal digits; the model's name does not count."""
    known = {name: value for name, value in model.items() if name not in ("name", "rotary")}
    rotary = [[f"{number:.3g}" for number in one] for one in model.get("rotary") or ()]  # devices round
    return _sha256({**known, "rotary": rotary})


def _sha256(about: Any) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _kvpress() -> str | None:
    try:
        return version("kvpress")
    except PackageNotFoundError:
        return None


def _digest(ids: Tensor) -> str:
    return hashlib.sha256(ids.cpu().contiguous().numpy().tobytes()).hexdigest()


def _settings(value: Any, where: str) -> Any:
    """A setting as JSON values; a press is its class and the arguments that would make it again."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_settings(one, where) for one in value]
    if isinstance(value, Mapping):
        pairs = [[_settings(one, where) for one in pair] for pair in value.items()]
        return {"pairs": sorted(pairs, key=repr)}
    if isinstance(value, BasePress):
        if isinstance(value, Compose) and len(value) == 1:
            return _settings(value.presses[0], where)  # which it works as
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        return [name, {one: _settings(inner, f"{where}.{one}") for one, inner in _arguments(value)}]
    raise InvalidInputError(
        f"{where} is {value!r}, by which no store can find a context again: only numbers, text, lists and "
        "presses have a lasting name; use pipe.read and context.save"
    )


def _arguments(press: BasePress) -> list[tuple[str, Any]]:
    """The arguments of a press, and what else was set on one that neither kvpress nor quantpress made."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(type(press)).parameters.values()
    names = [one.name for one in parameters]
    missing = [one.name for one in parameters if one.kind in kinds or not hasattr(press, one.name)]
    if missing:
        raise InvalidInputError(
            f"{type(press).__name__} does not keep its argument {missing[0]}, so that no store can find a "
            f"context of it again; set self.{missing[0]}, or use pipe.read and context.save"
        )
    if type(press).__module__.partition(".")[0] not in ("kvpress", "quantpress"):
        names += [name for name, value in vars(press).items() if isinstance(value, _PLAIN)]
    return [(name, getattr(press, name)) for name in sorted(set(names))]
