"""An attention module over chunks of queries: the same forward without a tensor of all queries.

Each chunk goes through the module's own forward: projections, norms, rotary embedding, attention to all
tokens so far, output projection. Keys and values are written into two tensors of full length, which the cache
takes over at the end. Hooks on the module run once, around the whole: they see all hidden states, keys,
values and outputs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from quantpress.pipelines.patching.attention_functions import TRIP
from quantpress.pipelines.reading.causal_chunks import CausalChunks, NotInChunksError
from quantpress.pipelines.reading.layer_chunks import TOKEN_DIMENSIONS, in_chunks

_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


def attention_in_chunks(
    module: nn.Module, forward: Callable[..., Any], chunk_tokens: int
) -> Callable[..., Any]:
    """The forward of an attention module over chunks of queries, wherever the result is the same.

    This needs a prefill of more than `chunk_tokens` tokens into an empty layer of a `DynamicCache`, without
    gradients, through `scaled_dot_product_attention`. Any other call goes to `forward`.

    Args:
        module: an attention module with a `config` and a `layer_idx`.
        forward: takes hidden states [B, T, H] and a cache, and returns a tuple that starts with the output
            [B, T, H].
        chunk_tokens: queries at a time.
    """

    def chunked(*args: Any, **kwargs: Any) -> Any:
        named = {"hidden_states": args[0], **kwargs} if len(args) == 1 else kwargs
        prefill = None if len(args) > 1 else _prefill(module, named, chunk_tokens)
        if prefill is not None:
            try:
                return _output(module, forward, prefill, chunk_tokens)
            except NotInChunksError:  # raised in the first chunk, before the cache has changed
                pass
        return forward(*args, **kwargs)

    return chunked


@dataclass(frozen=True)
class _Prefill:
    """A call of an attention module over T tokens that can be cut; its arguments by name."""

    arguments: dict[str, Any]
    cache_name: str
    layer_idx: int
    tokens: int

    @property
    def cache(self) -> Cache:
        cache: Cache = self.arguments[self.cache_name]
        return cache

    def chunk(self, start: int, end: int, states: "_States") -> dict[str, Any]:
        """The arguments for the tokens from `start` to `end`."""
        parts = {self.cache_name: states, "hidden_states": self.arguments["hidden_states"][:, start:end]}
        for name, dim in TOKEN_DIMENSIONS.items():
            if self.arguments.get(name) is not None:
                parts[name] = _narrowed(self.arguments[name], dim, start, end)
        if self.arguments.get("attention_mask") is not None:
            parts["attention_mask"] = self.arguments["attention_mask"][:, :, start:end, :end]
        return self.arguments | parts


class _States:
    """Takes the place of the cache for one layer, and collects its keys and values of T tokens."""

    def __init__(self, cache: Cache, tokens: int) -> None:
        self._cache = cache
        self._tokens = tokens
        self._filled = 0
        self._keys = self._values = torch.empty(0, dtype=torch.float32, device="cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys [B, Hkv, t, D] and values [B, Hkv, t, Dv] of the next tokens, and return all so far."""
        if not self._filled:
            self._keys, self._values = (self._allocated(states) for states in (keys, values))
        end = self._filled + keys.shape[2]
        for whole, part in ((self._keys, keys), (self._values, values)):
            whole[:, :, self._filled : end] = part
        self._filled = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def _allocated(self, states: torch.Tensor) -> torch.Tensor:
        return states.new_empty(*states.shape[:2], self._tokens, states.shape[-1])

    def hand_over(self, layer_idx: int) -> None:
        """Fill a layer of the cache."""
        cache, keys, values = self._cache, self._keys, self._values
        if cache.offloading or _held(cache, layer_idx) is not DynamicLayer:
            cache.update(keys, values, layer_idx)
        else:  # `update` would copy them
            cache.update(keys[:, :, :0], values[:, :, :0], layer_idx)
            cache.layers[layer_idx].keys, cache.layers[layer_idx].values = keys, values


def _output(module: nn.Module, forward: Callable[..., Any], prefill: _Prefill, chunk_tokens: int) -> Any:
    states, attention = _States(prefill.cache, prefill.tokens), CausalChunks()

    def part(start: int, end: int) -> Any:
        attention.behind = start > 0
        with attention, _not_causal(module) if start else nullcontext():
            output = forward(**prefill.chunk(start, end, states))
        if not attention.seen or any(one is not None for one in output[1:]):
            raise NotInChunksError
        return output

    output = in_chunks(part, prefill.tokens, chunk_tokens)
    states.hand_over(prefill.layer_idx)
    return output


@contextmanager
def _not_causal(module: nn.Module) -> Iterator[None]:
    """Keep newer transformers from cutting the keys of causal attention to as many as there are queries."""
    before = vars(module).get("is_causal", None)
    module.is_causal = False  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is None:
            del module.is_causal
        else:
            module.is_causal = before


def _prefill(module: nn.Module, arguments: dict[str, Any], chunk_tokens: int) -> _Prefill | None:
    hidden_states = arguments.get("hidden_states")
    if not isinstance(hidden_states, torch.Tensor) or hidden_states.dim() != 3:  # [B, T, H]
        return None
    tokens = hidden_states.shape[1]
    if tokens <= chunk_tokens or torch.is_grad_enabled() or module.training or TRIP.get() is not None:
        return None
    caches = [name for name, value in arguments.items() if isinstance(value, DynamicCache)]
    layer_idx, config = getattr(module, "layer_idx", None), getattr(module, "config", None)
    if len(caches) != 1 or layer_idx is None or getattr(config, "_attn_implementation", None) != "sdpa":
        return None
    cache = arguments[caches[0]]
    if type(cache).update is not Cache.update or _held(cache, layer_idx) not in _LAYERS:
        return None
    if cache.get_seq_length(layer_idx):
        return None
    if not all(_fits(name, value, tokens) for name, value in arguments.items() if name != "hidden_states"):
        return None
    return _Prefill(arguments, caches[0], layer_idx, tokens)


def _held(cache: Cache, layer_idx: int) -> type | None:
    """The class of a layer of a cache; of one that is not there yet, the class it will have."""
    if layer_idx < len(cache.layers):
        return type(cache.layers[layer_idx])
    made: type | None = cache.layer_class_to_replicate
    return made


def _fits(name: str, value: Any, tokens: int) -> bool:
    """Whether an argument can be cut into chunks of queries, or needs no cutting."""
    if name == "attention_mask" and isinstance(value, torch.Tensor):
        return value.dim() == 4 and value.shape[2:] == (tokens, tokens)
    if name in TOKEN_DIMENSIONS and isinstance(value, (torch.Tensor, tuple)):
        parts = value if isinstance(value, tuple) else (value,)
        return all(one.shape[TOKEN_DIMENSIONS[name]] == tokens for one in parts)
    if name == "shared_kv_states":  # a layer attends to all keys of another one
        return value is None
    return not isinstance(value, (torch.Tensor, tuple, list, dict))


def _narrowed(value: Any, dim: int, start: int, end: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value.narrow(dim, start, end - start)
    return tuple(one.narrow(dim, start, end - start) for one in value)
