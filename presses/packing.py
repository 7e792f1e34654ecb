"""Turns the layers of a prefilled cache into packed ones, layer by layer, from inside the forward pass."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from quantpress.cache.layer import PackedLayer
from quantpress.presses.model_support import full_attention_modules, is_sliding
from quantpress.presses.prefill import PrefillCall, check_fresh, check_states, plain_states, prefill_call
from quantpress.presses.queries import UnknownAttentionError, query_moment, recomputed_keys
from quantpress.presses.token_order import sort_by_position, survivor_positions

if TYPE_CHECKING:
    from quantpress.presses.turboquant import TurboQuant

States = tuple[torch.Tensor, torch.Tensor]


class Packer:
    """What one use of a `TurboQuant` press remembers between its hooks.

    `record` runs before the evictors of a layer and keeps a reference to what they start from; `pack` runs
    after them, puts the survivors in the order of the text, packs them and lets everything else go.

    Args:
        press: the settings.
        sink_tokens: pinned first tokens, where the evictors keep more than the press asks for.
        rerotated: the evictors number the survivors anew, so that the next position is their count.
        at_exit: pack when `recording` ends, for presses that evict only then.
    """

    def __init__(
        self,
        press: "TurboQuant",
        *,
        sink_tokens: int | None = None,
        rerotated: bool = False,
        at_exit: bool = False,
    ) -> None:
        self.press = press
        self.sink_tokens = press.sink_tokens if sink_tokens is None else sink_tokens
        self.rerotated = rerotated
        self.at_exit = at_exit
        self._originals: dict[int, States] = {}
        self._waiting: dict[int, tuple[Cache, int, dict[int, torch.Tensor]]] = {}
        self._warned = False

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Enter before the evictors: their hooks run in the order in which they were registered."""
        with _hooked(model, self.record):
            try:
                yield
                self._pack_waiting(model)
            finally:
                self._originals.clear()
                self._waiting.clear()

    @contextmanager
    def packing(self, model: nn.Module) -> Iterator[None]:
        """Enter after the evictors."""
        with _hooked(model, self.pack):
            yield

    def record(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook: keep a reference to all keys and values of this layer until `pack`."""
        call = prefill_call(module, args, kwargs)
        if call is None:
            return
        keys, values = plain_states(call.cache, call.layer_idx)
        check_fresh(call, keys)
        if not self.at_exit:
            self._originals[call.layer_idx] = (keys, values)

    def pack(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook: replace this layer of the cache by a packed one."""
        call = prefill_call(module, args, kwargs)
        if call is None or is_sliding(module):
            return
        originals = self._originals.pop(call.layer_idx, None)
        keys, values = plain_states(call.cache, call.layer_idx)
        settings = self.press.layer_settings(module, keys.shape[-1], values.shape[-1], self.sink_tokens)
        if settings is None:
            return
        with torch.no_grad():
            check_states(call, keys, values)
            wants_queries = settings.balance and settings.key_codec.wants_statistics
            moment = self._moment(call, keys, originals) if wants_queries else None
            if self.at_exit:
                self._wait(call, moment)
                return
            _set_masked_slots(module)
            if keys.shape[2] < call.tokens:
                keys, values = self._in_order(call, keys, values, originals)
            call.cache.layers[call.layer_idx] = PackedLayer.from_states(
                keys.detach(),
                values.detach(),
                settings,
                query_moment=moment,
                tokens_seen=keys.shape[2] if self.rerotated else call.tokens,
            )

    def _moment(self, call: PrefillCall, keys: torch.Tensor, originals: States | None) -> torch.Tensor | None:
        all_keys = keys if originals is None else originals[0]
        known = all_keys if all_keys.shape[2] == call.tokens else None
        try:
            return query_moment(
                call.module,
                call.hidden_states,
                call.position_embeddings,
                keys.shape[1],
                self.press.balance_window,
                known,
            )
        except UnknownAttentionError as reason:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"the queries of {type(call.module).__name__} are not known ({reason}): its keys are "
                    "packed without balanced channels, which costs accuracy; TurboQuant(balance=False) is "
                    "the same without this warning",
                    stacklevel=2,
                )
            return None

    def _in_order(
        self, call: PrefillCall, keys: torch.Tensor, values: torch.Tensor, originals: States | None
    ) -> States:
        """Survivors in the order of the text, or as they are when it cannot be found again."""
        if originals is not None:
            positions = survivor_positions(*originals, keys, values)
        else:
            try:
                before = recomputed_keys(call.module, call.hidden_states, call.position_embeddings)
            except UnknownAttentionError:
                return keys, values
            positions = survivor_positions(before, None, keys, None)
        if positions is None:
            return keys, values
        _set_masked_slots(call.module, positions)
        return sort_by_position(keys, values, positions)

    def _wait(self, call: PrefillCall, moment: torch.Tensor | None) -> None:
        _, _, moments = self._waiting.setdefault(id(call.cache), (call.cache, call.tokens, {}))
        if moment is not None:
            moments[call.layer_idx] = moment

    def _pack_waiting(self, model: nn.Module) -> None:
        for cache, tokens, moments in self._waiting.values():
            pack_cache(self.press, model, cache, moments, tokens, self.sink_tokens)


def pack_cache(
    press: "TurboQuant",
    model: nn.Module,
    cache: Cache,
    query_moments: dict[int, torch.Tensor] | None = None,
    tokens_seen: int | None = None,
    sink_tokens: int | None = None,
) -> None:
    """Pack every full-attention layer of a cache that is filled already.

    Args:
        press: the settings.
        model: the model that filled it.
        cache: changed in place, layer by layer.
        query_moments: E[q_j^2] per layer index, [B, Hkv, D] each, for channel balance.
        tokens_seen: tokens read so far; a layer that keeps more counts its own. Left out, what each layer
            keeps.
        sink_tokens: pinned first tokens; the press's own when left out.

    Raises:
        InvalidInputError: a layer is not a plain `DynamicLayer`.
        NonFiniteError: keys or values hold NaN or infinity.
    """
    sinks = press.sink_tokens if sink_tokens is None else sink_tokens
    for module in full_attention_modules(model):
        index = int(module.layer_idx)  # type: ignore[arg-type]
        keys, values = plain_states(cache, index)
        settings = press.layer_settings(module, keys.shape[-1], values.shape[-1], sinks)
        if settings is None:
            continue
        with torch.no_grad():
            cache.layers[index] = PackedLayer.from_states(
                keys.detach(),
                values.detach(),
                settings,
                query_moment=(query_moments or {}).get(index),
                tokens_seen=max(keys.shape[2], tokens_seen or 0),
            )
        del keys, values


def _set_masked_slots(module: nn.Module, positions: torch.Tensor | None = None) -> None:
    """Head-wise presses name (batch, head, slot), in a tuple or a list; sorting by position moves slots."""
    masked: Any = getattr(module, "masked_key_indices", None)
    if masked is not None:
        batch, head, slot = masked
        if positions is not None:
            batch, head, slot = (index.to(positions.device) for index in masked)
            slot = positions.argsort(dim=-1).argsort(dim=-1)[batch, head, slot]
        module.masked_key_indices = (batch, head, slot)  # type: ignore[assignment]


@contextmanager
def _hooked(model: nn.Module, hook: Any) -> Iterator[None]:
    handles = [
        module.register_forward_hook(hook, with_kwargs=True) for module in full_attention_modules(model)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
