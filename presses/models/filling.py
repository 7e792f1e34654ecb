"""Reading a context must fill the cache: refuses models that would not, and checks the cache afterwards.

A model may run through a whole context and keep nothing of it: under gradient checkpointing, transformers
takes the cache away from every layer. Answers from such a cache have seen no context.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from quantpress.cache import host
from quantpress.errors import InvalidInputError, UnsupportedModelError
from quantpress.presses.models.attention import attention_modules, decoder_of, full_attention_modules
from quantpress.presses.models.eligibility import HOOKABLE, LAYERED, check
from quantpress.presses.models.old_names import old_names
from quantpress.presses.models.scanning import modules_below


def check_keeps(model: nn.Module) -> None:
    """Refuse a model that would not keep what it reads.

    Args:
        model: a model that is about to read a context, or a question about one.

    Raises:
        UnsupportedModelError: its states are not keys and values in layers of a cache, or it is in training
            mode with gradient checkpointing.
    """
    check(model, LAYERED)
    checkpointed = (getattr(module, "gradient_checkpointing", False) for module in _training(model))
    if any(checkpointed):
        new_name = "activation_checkpointing_disable"
        disable = new_name if hasattr(model, new_name) else "gradient_checkpointing_disable"
        raise UnsupportedModelError(
            f"{type(model).__name__} is in training mode with gradient checkpointing, under which "
            "transformers keeps no cache, so that what is read is forgotten; call model.eval(), or "
            f"model.{disable}()"
        )


def check_takes_states(model: nn.Module, cache: Cache) -> None:
    """Refuse an empty cache of plain layers for a hybrid model, some of whose layers keep states instead.

    Raises:
        InvalidInputError: the cache was made without the model's configuration.
    """
    if not getattr(cache, "layers", True) and host.is_hybrid(model):
        raise InvalidInputError(
            f"{type(model).__name__} keeps states in some layers, and a {type(cache).__name__} of plain "
            "layers cannot hold them; give DynamicCache(config=model.config)"
        )


def check_filled(model: nn.Module, cache: Cache) -> None:
    """Refuse a cache that is still empty, or has empty layers, after a context was read.

    Args:
        model: the model that has read a context into `cache`.
        cache: checked if it has `layers`.

    Raises:
        UnsupportedModelError: the cache has empty layers; the message names them.
    """
    layers: list[Any] | None = getattr(cache, "layers", None)
    if layers is None:
        return
    modules = [module for module in attention_modules(model) if not _borrows(module)]
    wanted = {int(module.layer_idx) for module in modules}  # type: ignore[arg-type]
    empty = sorted(index for index in wanted if index >= len(layers) or not _holds(layers[index]))
    if empty or not any(_holds(layer) for layer in layers if host.keeps_tokens(layer)):
        where = f"in layers {', '.join(map(str, empty))} of {len(wanted)}" if empty else "in every layer"
        raise UnsupportedModelError(
            f"{type(model).__name__} has read the context and left the cache empty {where}: it does not "
            "keep keys and values in the cache that it is given, so that they can be neither compressed nor "
            "asked; use the model without quantpress"
        )


def count_kept(model: nn.Module, cache: Cache) -> None:
    """Give an empty cache plain layers where the model's window spans every position.

    For such a window transformers makes sliding-window layers, whose length is the number of tokens seen.
    They never slide, so presses evict from them, and positions and masks then need the number of tokens kept.

    Args:
        model: a model that is about to read a context under a press.
        cache: an empty cache; some of its `layers` are replaced.
    """
    layers: list[Any] = getattr(cache, "layers", [])
    for module in full_attention_modules(model):
        index = int(module.layer_idx)  # type: ignore[arg-type]
        if index < len(layers) and type(layers[index]) is DynamicSlidingWindowLayer:
            layers[index] = DynamicLayer()


def warn_of_chance(model: nn.Module) -> None:
    """Warn when dropout is on, since the cache and every answer then depend on chance."""
    for module in _training(model):
        rate = float(module.p) if isinstance(module, nn.modules.dropout._DropoutNd) else 0.0
        rates = (value for name, value in vars(module).items() if name.endswith(("dropout", "jitter_noise")))
        if rate or any(isinstance(one, float) and one > 0 for one in rates):
            warnings.warn(
                f"{type(model).__name__} is in training mode, and {type(module).__name__} drops numbers at "
                "random: what it reads and answers depends on chance; call model.eval()",
                stacklevel=3,
            )
            return


@contextmanager
def filled_caches(model: nn.Module, evicts: bool = True) -> Iterator[None]:
    """Inside this context, every prefill fills the cache that it is given, or raises an error.

    Args:
        model: the model that a press is applied to.
        evicts: whether a forward without a cache is an error, because kvpress's hooks need one. False: it is
            a warning, because nothing is compressed.

    Raises (on entering, and in a forward):
        UnsupportedModelError: see `check_keeps` and `check_filled`; with `evicts`, the model breaks a rule of
            `HOOKABLE`.
        InvalidInputError: a forward runs without a cache, and `evicts` is True.
    """
    check(model, HOOKABLE if evicts else LAYERED)
    empty: list[Cache] = []

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        empty.clear()
        cache = next((one for one in (*args, *kwargs.values()) if isinstance(one, Cache)), None)
        if cache is None and not _makes_cache(module, kwargs):
            _no_cache(evicts)
        elif cache is None or not int(cache.get_seq_length()):
            check_keeps(model)
            if cache is not None:
                check_takes_states(model, cache)
                count_kept(model, cache)
                empty.append(cache)

    def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if empty:
            check_filled(model, empty.pop())

    decoder = decoder_of(model)
    handles = [
        decoder.register_forward_pre_hook(before, with_kwargs=True),
        decoder.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        with old_names(decoder, attention_modules(model)):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _training(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in modules_below(decoder_of(model)) if module.training)


def _borrows(module: nn.Module) -> bool:
    """Whether a module attends to keys of another layer (Gemma 3n), or to something other than the text."""
    crosses = "Cross" in type(module).__name__ or bool(getattr(module, "is_cross_attention", False))
    return crosses or bool(getattr(module, "is_kv_shared_layer", False))


def _holds(layer: Any) -> bool:
    """Whether anything was written to a layer; a press may have evicted all of it since."""
    if not layer.is_initialized:
        return False
    return not layer.is_compileable or bool(
        layer.get_seq_length() > 0
    )  # static layers may be made beforehand


def _makes_cache(decoder: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether a decoder makes a cache when it is given none."""
    use_cache = kwargs.get("use_cache")
    return bool(
        getattr(getattr(decoder, "config", None), "use_cache", True) if use_cache is None else use_cache
    )


def _no_cache(evicts: bool) -> None:
    message = (
        "the model runs without a cache (use_cache=False in the call, or in its configuration), so that "
        "nothing can be compressed; give use_cache=True, or past_key_values=DynamicCache()"
    )
    if evicts:
        raise InvalidInputError(message)
    warnings.warn(message, stacklevel=2)
