"""Hands hooks of kvpress the names that they read, where transformers does not pass them any more.

kvpress reads `past_key_values` and `cache_position` from the keyword arguments of an attention module, and
some of its presses replace the decoder's forward by one that takes `past_key_values`. Where transformers
still passes both names, nothing here changes a call.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

from quantpress.cache import host
from quantpress.cache.host import NEW_NAME, OLD_NAME, PLACES


class OldNames(dict[str, Any]):
    """Keyword arguments of an attention module that also answer to the names that hooks of kvpress read.

    torch hands one object to both: the forward gets what is stored, and hooks ask by name.

    Args:
        stored: the keyword arguments of the call.
        cache: the cache of the call.
        seen: tokens that the layer held before the call.
        hidden_states: [B, N, H], the input of the module.
    """

    def __init__(
        self, stored: Mapping[str, Any], cache: Cache, seen: int, hidden_states: torch.Tensor
    ) -> None:
        super().__init__(stored)
        self._cache, self._seen, self._hidden = cache, seen, hidden_states

    def __missing__(self, name: str) -> Any:
        if name == OLD_NAME:
            return self._cache
        if name == PLACES:
            new_tokens, device = self._hidden.shape[1], self._hidden.device
            return torch.arange(self._seen, self._seen + new_tokens, device=device)
        if name == "hidden_states":
            return self._hidden
        raise KeyError(name)

    @property
    def end(self) -> int | None:
        """One more than the last of the positions that are made up here; None: the call has its own."""
        return None if PLACES in self else self._seen + self._hidden.shape[1]

    def get(self, name: str, default: Any = None) -> Any:
        """As `[name]`, or the default."""
        try:
            return self[name]
        except KeyError:
            return default


@contextmanager
def old_names(decoder: nn.Module, attention: Iterable[nn.Module]) -> Iterator[None]:
    """While inside, hooks of the attention modules and replaced forwards of the decoder find the old names.

    Enter it before hooks are registered and the forward is replaced. It may be nested.

    Args:
        decoder: the text decoder of a model.
        attention: its attention modules.
    """
    handles = [module.register_forward_pre_hook(_name_old, with_kwargs=True) for module in attention]
    undo = _rename(decoder, handles) if host.cache_name(decoder) == NEW_NAME else None
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        if undo is not None:
            undo()


def _name_old(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    if isinstance(kwargs, OldNames) or (OLD_NAME in kwargs and PLACES in kwargs):
        return None
    cache = host.cache_in(args, kwargs)
    if cache is None:
        return None
    layer_idx: Any = module.layer_idx
    if layer_idx < len(cache.layers) and not host.keeps_tokens(cache.layers[layer_idx]):
        return None  # a layer that borrows the keys of another one
    hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return args, OldNames(kwargs, cache, int(cache.get_seq_length(layer_idx)), hidden_states)


def _rename(decoder: nn.Module, handles: list[Any]) -> Callable[[], None] | None:
    """Give the old name to the decoder's forward, which presses replace, and the new one to the original."""
    if any(getattr(hook, "renames", False) for hook in decoder._forward_pre_hooks.values()):
        return None  # an outer context does it, and a press may have replaced the forward since
    known = vars(decoder).get("forward")
    original = decoder.forward

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return (args, _renamed(kwargs, NEW_NAME, OLD_NAME)) if NEW_NAME in kwargs else None

    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **_renamed(kwargs, OLD_NAME, NEW_NAME))

    before.renames = True  # type: ignore[attr-defined]
    forward.__wrapped__ = original  # type: ignore[attr-defined]
    handles.append(decoder.register_forward_pre_hook(before, with_kwargs=True))
    decoder.forward = forward

    def undo() -> None:
        if known is None:
            vars(decoder).pop("forward", None)
        else:
            decoder.forward = known

    return undo


def _renamed(kwargs: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new if name == old else name: value for name, value in kwargs.items()}


def take_keywords(kind: type[DynamicLayer]) -> None:
    """Let a cache layer written for `update(keys, values, cache_kwargs)` be called as newer versions do."""
    update = kind.update
    parameters = inspect.signature(update).parameters.values()
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters):

        def any_keywords(self: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
            return update(self, keys, values)

        kind.update = any_keywords  # type: ignore[assignment]


def name_old_until_unhooked(attention: Iterable[nn.Module]) -> None:
    """As `old_names`, for contexts that are not ours: a hook goes when it finds no other on its module."""
    for module in attention:
        if not any(isinstance(hook, _SelfRemoving) for hook in module._forward_pre_hooks.values()):
            hook = _SelfRemoving()
            hook.handle = module.register_forward_pre_hook(hook, with_kwargs=True)


class _SelfRemoving:
    handle: Any = None

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if not module._forward_hooks:
            self.handle.remove()
            return None
        return _name_old(module, args, kwargs)
