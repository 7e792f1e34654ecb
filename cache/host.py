"""What differs between the versions of transformers that quantpress runs on, each found by its feature.

transformers 5.2 calls the cache `past_key_values` and gives every forward `cache_position`, the positions of
the new tokens among those that the cache holds. Later versions call it `cache` and give no positions.
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache, lru_cache
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

OLD_NAME, NEW_NAME, PLACES = "past_key_values", "cache", "cache_position"


TESTED = ("5.2.0", "5.17.0", "5.24.0")
"""The versions of transformers that the test suite runs on, oldest first."""


@lru_cache(maxsize=256)  # every layer of a model is asked about its forward
def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of this name."""
    return name in inspect.signature(function).parameters


CROP_REMOVES = not takes(DynamicLayer.crop, "max_length")
"""Whether `crop(0)` removes no token, because `crop` takes the number of tokens to remove, negated."""

CALLS_TAKE_PLACES = takes(DynamicLayer.get_mask_sizes, PLACES)
"""Whether forwards and masks are given `cache_position`."""

LINEAR_LAYER: Any = getattr(cache_utils, "LinearAttentionCacheLayerMixin", ())
"""Cache layers that keep a state of fixed size, alone or beside keys and values; () where there are none."""

FULL_AND_LINEAR_LAYER: Any = getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", None)
"""The layer that keeps such a state beside all keys and values; None where there is none."""

HOLDS_STATES = bool(LINEAR_LAYER)
"""Whether a DynamicCache can hold such layers (hybrid models)."""

_PLAIN_LAYERS = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    FULL_AND_LINEAR_LAYER,
    getattr(cache_utils, "LinearAttentionAndSlidingWindowAttentionLayer", None),
)

STATES = (
    "number_of_states",
    "conv_states",
    "recurrent_states",
    "is_conv_states_initialized",
    "is_recurrent_states_initialized",
    "has_previous_state",
    "conv_kernel_size",
    "record_past",
)
"""Attributes of a layer that keeps linear-attention states."""


@cache
def prepares_with(name: str) -> bool:
    """Whether the method with which `generate` prepares its inputs has a parameter of this name.

    Looked up when it is first asked for: models take a second to import.
    """
    from transformers import GenerationMixin

    return takes(GenerationMixin.prepare_inputs_for_generation, name)


def generate_cache() -> str:
    """The name of the cache among the arguments of `generate`."""
    return NEW_NAME if prepares_with(NEW_NAME) else OLD_NAME


def feeds_again() -> bool:
    """Whether assisted decoding feeds a filled cache every id again, in its first step."""
    return prepares_with("next_sequence_length")


@lru_cache(maxsize=256)
def _cache_name(kind: Any) -> str:
    return NEW_NAME if takes(kind.forward, NEW_NAME) else OLD_NAME


def cache_name(module: nn.Module) -> str:
    """The name of the cache among the arguments of a module's forward."""
    kind: Any = type(module)
    return _cache_name(kind)


def cache_in(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Cache | None:
    """The cache among the arguments of a call, whatever its name."""
    return next((one for one in (*kwargs.values(), *args) if isinstance(one, Cache)), None)


def mask_query(new_tokens: int, device: torch.device | None = None) -> Any:
    """The first argument of `get_mask_sizes` for this many new tokens."""
    return torch.arange(new_tokens, device=device) if CALLS_TAKE_PLACES else new_tokens


def query_count(query: Any) -> int:
    """How many new tokens the first argument of `get_mask_sizes` stands for."""
    return int(query.shape[0]) if isinstance(query, torch.Tensor) and query.dim() else int(query)


def keeps_tokens(layer: Any) -> bool:
    """Whether a cache layer keeps tokens: it is not a linear-attention state alone, nor a placeholder."""
    return hasattr(layer, "get_seq_length")


def token_layers(cache: Cache) -> list[Any]:
    """The layers of a cache that keep tokens."""
    return [layer for layer in cache.layers if keeps_tokens(layer)]


def holds_more(layer: Any) -> bool:
    """Whether a layer is of a class of transformers that holds more than keys, values and states.

    Quantized layers do, and those that choose tokens by an index or compress them.
    """
    kinds = [kind for kind in type(layer).__mro__ if issubclass(kind, DynamicLayer)]
    return any(kind.__module__.startswith("transformers.") and kind not in _PLAIN_LAYERS for kind in kinds)


def layer_that_holds_more(model: nn.Module) -> str | None:
    """The class of a layer of `holds_more` in a model's cache; None if there is none."""
    layers = (layer for layer in _configured(model).layers if isinstance(layer, DynamicLayer))
    return next((type(layer).__name__ for layer in layers if holds_more(layer)), None)


def _configured(model: nn.Module) -> DynamicCache:
    config: Any = getattr(model, "config", None)
    return DynamicCache(config=config)


def empty_cache(model: nn.Module) -> DynamicCache:
    """A new cache for a model.

    Plain layers appear when they are first written to. A cache whose layers keep states, or stand for others,
    is made from the model's configuration, which says where they are.
    """
    made = _configured(model)
    placed = any(isinstance(layer, LINEAR_LAYER) or not keeps_tokens(layer) for layer in made.layers)
    return made if placed else DynamicCache()


def is_hybrid(model: nn.Module) -> bool:
    """Whether layers of a model keep states of fixed size in its cache."""
    return any(isinstance(layer, LINEAR_LAYER) for layer in empty_cache(model).layers)


def linear_states(layer: Any) -> dict[str, Any]:
    """The linear-attention states that a layer keeps beside its tokens; empty for all others."""
    return {name: vars(layer)[name] for name in STATES} if isinstance(layer, LINEAR_LAYER) else {}


def state_tensors(cache: Cache) -> list[torch.Tensor]:
    """The linear-attention states of all layers."""
    kept = [linear_states(layer) for layer in cache.layers]
    kinds = [states[kind] for states in kept if states for kind in ("conv_states", "recurrent_states")]
    return [state for kind in kinds for state in kind.values() if state is not None]


def repeat_batch(cache: Cache, times: int) -> None:
    """Repeat each sequence of a batch, states included, which transformers' own method leaves out."""
    for layer in cache.layers:
        if keeps_tokens(layer):
            layer.batch_repeat_interleave(times)  # type: ignore[attr-defined]
        states = linear_states(layer)
        for kind in ("conv_states", "recurrent_states"):
            for slot, state in states.get(kind, {}).items():
                if state is not None:
                    states[kind][slot] = state.repeat_interleave(times, dim=0)


def copied(layer: Any) -> Any:
    """A shallow copy of a layer; linear-attention states are cloned, since steps write them in place."""
    other = copy.copy(layer)
    vars(other).update(copy.deepcopy(linear_states(layer)))
    return other


def described() -> str:
    """The host in words: its version, what was tested, and what its caches can hold."""
    cached = f"{NEW_NAME if generate_cache() == NEW_NAME else OLD_NAME}="
    hybrid = "hybrid models too" if HOLDS_STATES else "no hybrid models, which need 5.17 or later"
    tested = "tested" if transformers.__version__ in TESTED else f"tested on {', '.join(TESTED)}"
    return f"{tested}; caches are passed as {cached}; {hybrid}"


def warn_if_newer(version: str = transformers.__version__) -> None:
    """Warn of a version of transformers that is newer than those tested."""
    if Version(version) > Version(TESTED[-1]):
        warnings.warn(
            f"transformers {version} is newer than {TESTED[-1]}, the newest that quantpress was tested with; "
            f'if something fails, pip install "transformers=={TESTED[-1]}"',
            stacklevel=2,
        )


warn_if_newer()


def feed_new_tokens(prepare: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stand in for `model.prepare_inputs_for_generation` in assisted decoding over a filled cache.

    transformers 5.24 feeds such a cache every id again in the first step. Greedy and sampled decoding leave
    out those that the cache holds, and so does this.
    """
    cache = kwargs.get(generate_cache())
    ids = args[0] if args else kwargs.get("input_ids")
    given = len(args) > 1 or kwargs.get("next_sequence_length") is not None
    if feeds_again() and not given and isinstance(cache, Cache):
        held = int(cache.get_seq_length())
        if held and ids is not None and ids.shape[1] > held:
            kwargs["next_sequence_length"] = ids.shape[1] - held
    return prepare(*args, **kwargs)
