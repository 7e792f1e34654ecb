"""Hybrid models, as presses of kvpress see them: only their layers of full attention.

kvpress puts its hooks on `model.model.layers[i].self_attn`, which layers of linear attention, state spaces
and convolutions do not have. States pass through unevicted. Only presses that were tried there are taken.
"""

from types import SimpleNamespace
from typing import Any

from torch import nn

from quantpress.cache import host
from quantpress.errors import UnsupportedModelError
from quantpress.presses.models.attention import decoder_of, full_attention_modules

_BY_KEYS = frozenset({"KnormPress", "KeyDiffPress", "LagKVPress", "RandomPress", "StreamingLLMPress"})
_BY_QUERIES = frozenset({"ExpectedAttentionPress", "SnapKVPress", "TOVAPress"})
_PLAIN_QUERIES = frozenset({"FalconH1Attention"})
"""Attention that projects hidden states and rotates whole heads, as kvpress takes all attention to do."""

_AROUND_OTHERS = frozenset({"AdaKVPress", "ChunkKVPress", "ComposedPress"})
_BASES = frozenset({"BasePress", "ScorerPress"})  # of presses of the user's own


def as_kvpress_sees(model: Any, press: Any) -> Any:
    """What to give to a press's context as its model: the model itself, unless kvpress meets a hybrid one.

    Args:
        model: the model that the press is applied to.
        press: the press.

    Raises:
        UnsupportedModelError: the model is a hybrid one, and the press was not tried there or needs queries
            that kvpress does not compute as the model does.
    """
    if not _of_kvpress(press) or not host.is_hybrid(model):
        return model  # hooks of our own base find the layers of full attention
    reason = _why_not(press, full_attention_modules(model))
    if reason is not None:
        raise UnsupportedModelError(
            f"{type(press).__name__} is not applied to {type(model).__name__}, a hybrid model: {reason}; use "
            "Knorm, KeyDiff, LagKV or StreamingLLM, or TurboQuant alone"
        )
    named: type[_Stand] = type(type(model).__name__, (_Stand,), {"__module__": type(model).__module__})
    return named(model, model=_Stand(decoder_of(model), **_parts(model)))  # kvpress's log shows the name


def _parts(model: nn.Module) -> dict[str, Any]:
    layers = [SimpleNamespace(self_attn=module) for module in full_attention_modules(model)]
    return {"layers": layers, "rotary_emb": getattr(decoder_of(model), "rotary_emb", None)}


class _Stand:
    """An object with some attributes of its own, and all others of another object."""

    def __init__(self, other: Any, **own: Any) -> None:
        vars(self).update(own, _other=other)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._other, name)


def _why_not(press: Any, modules: list[nn.Module]) -> str | None:
    name = _of_kvpress(press)
    if name in _BY_QUERIES and any(type(module).__name__ not in _PLAIN_QUERIES for module in modules):
        return "kvpress does not compute the queries of its attention as the model does"
    if not name or name in _BY_QUERIES | _BY_KEYS | _AROUND_OTHERS | _BASES:
        inner = [getattr(press, "press", None), *getattr(press, "presses", ())]
        reasons = (_why_not(one, modules) for one in inner if one is not None)
        return next((reason for reason in reasons if reason is not None), None)
    return "it was not tried there"


def _of_kvpress(press: Any) -> str:
    """The name of kvpress's class that a press is; empty for a press on our own base."""
    return next((kind.__name__ for kind in type(press).__mro__ if kind.__module__.startswith("kvpress.")), "")
