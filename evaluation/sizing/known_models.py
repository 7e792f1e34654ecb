"""Models that are known by name: their configurations lie in known_models.json, so that no hub is asked.

A configuration holds those fields of the config.json in the model's repository on the hub that its shape and
weights depend on. A model that is built from them has as many parameters as the published checkpoint.
"""

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

_VARIANTS = re.compile(r"-(instruct|it|pt|base|chat|hf)(?=-|$)|^meta-")
"""What a name may have more, without another shape."""


@dataclass(frozen=True)
class KnownModel:
    """A model that is known by name.

    Args:
        name: short name, such as "llama-3.1-8b".
        repository: where its config.json is on the hub.
        parameters: number of parameters of the published checkpoint; tied ones count once.
        config: fields of its config.json.
    """

    name: str
    repository: str
    parameters: int
    config: dict[str, Any]


@cache
def known_models() -> dict[str, KnownModel]:
    """All known models, by short name."""
    path = resources.files("quantpress.evaluation.sizing") / "known_models.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    return {name: KnownModel(name, **row) for name, row in rows.items()}


def known_model(name: str) -> KnownModel | None:
    """The known model that a name means, or None.

    Args:
        name: short name or id on the hub, in upper or lower case. The owner of a repository does not count,
            nor that a model is instruction-tuned.

    Example:
        >>> [known_model(name).name for name in ("LLAMA-3.1-8B", "unsloth/Meta-Llama-3.1-8B-Instruct")]
        ['llama-3.1-8b', 'llama-3.1-8b']
        >>> known_model("Qwen/Qwen3-8B-AWQ") is None
        True
    """
    return _by_shape().get(_shape_name(name))


@cache
def _by_shape() -> dict[str, KnownModel]:
    models = known_models().values()
    return {_shape_name(name): one for one in models for name in (one.repository, one.name)}


def _shape_name(name: str) -> str:
    return _VARIANTS.sub("", name.lower().rsplit("/", 1)[-1])
