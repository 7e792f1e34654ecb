"""Packs the layers of a cache during the prefill, each as soon as its attention module has filled it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn
from transformers.cache_utils import Cache

from quantpress.cache.hybrid_layer import packed_kind
from quantpress.cache.layer import PackedLayer
from quantpress.cache.settings import LayerSettings
from quantpress.cache.tokens.demotion import Demotion
from quantpress.errors import InvalidInputError
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.presses.models.attention import decoder_of, full_attention_modules, hooked, is_sliding
from quantpress.presses.packing.filled_cache import Quantizer, pack_cache
from quantpress.presses.packing.head_wise import name_slots, named_slots
from quantpress.presses.packing.prefill_hook import (
    PrefillCall,
    check_fresh,
    check_states,
    is_padded,
    plain_states,
    prefill_call,
)
from quantpress.presses.packing.queries import UnknownAttentionError, query_moment, recomputed_keys
from quantpress.presses.packing.settlement import Settlement
from quantpress.presses.packing.short_contexts import warn_if_nothing_is_packed
from quantpress.presses.packing.sinks import places_with_sinks_first
from quantpress.presses.packing.token_order import Survivors, survivor_positions

States = tuple[torch.Tensor, torch.Tensor]


class Demoter(Protocol):
    """A press that chooses tokens to be packed in fewer bits."""

    def take_scores(self, layer_idx: int) -> torch.Tensor | None:
        """[B, Hkv, T] scores of a layer's tokens in the present prefill; gone afterwards."""
        ...

    def demotion(
        self, quantizer: Any, module: nn.Module, scores: torch.Tensor, key_dim: int, value_dim: int
    ) -> Demotion | None:
        """The tokens of one layer to demote, and their codecs; None when there are none."""
        ...


class Packer:
    """What one use of a quantizing press remembers between its hooks.

    `record` runs before the evictors of a layer and keeps a reference to what they start from. `follow` runs
    behind each of them and finds out which tokens are left. `pack` runs last: it puts the survivors in the
    order of the text, packs them and lets everything else go.

    Args:
        press: says how each layer is stored.
        sink_tokens: pinned first tokens, where the evictors keep more than the press asks for.
        rerotated: the evictors give the survivors new positions, so that the next position is their count.
        at_exit: pack when `recording` ends, for presses that evict only then.
        by_head: free the memory of tokens that a head-wise press has named; False: only hide them.
        demote: chooses the tokens that are packed in fewer bits.
    """

    def __init__(
        self,
        press: Quantizer,
        *,
        sink_tokens: int | None = None,
        rerotated: bool = False,
        at_exit: bool = False,
        by_head: bool = True,
        demote: Demoter | None = None,
    ) -> None:
        self.press = press
        self.sink_tokens = press.sink_tokens if sink_tokens is None else sink_tokens
        self.rerotated = rerotated
        self.at_exit = at_exit
        self.by_head = by_head
        self.demote = demote
        self._originals: dict[int, States] = {}
        self._positions: dict[int, torch.Tensor | None] = {}
        self._waiting: dict[int, tuple[Cache, int, dict[int, torch.Tensor]]] = {}
        self._last: nn.Module | None = None
        self._settlement = Settlement()
        self._warned = False

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Enter before the evictors, since hooks run in the order in which they were registered."""
        with hooked(model, self.record):
            try:
                yield
                self._pack_waiting(model)
            finally:
                self._originals.clear()
                self._positions.clear()
                self._waiting.clear()

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Enter behind each evictor."""
        with hooked(model, self.follow):
            yield

    @contextmanager
    def packing(self, model: nn.Module) -> Iterator[None]:
        """Enter behind the last evictor. What a forward has packed is checked when it ends."""
        self._last = next(reversed(full_attention_modules(model)), None)
        with hooked(model, self.pack), self._settlement.at_end_of(decoder_of(model)):
            yield

    def record(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook: keep a reference to all keys and values of this layer until `pack`."""
        call = prefill_call(module, args, kwargs)
        if call is None:
            return
        keys, values = plain_states(call.cache, call.layer_idx)
        if not self.at_exit:
            check_fresh(call, keys)
            self._originals[call.layer_idx] = (keys, values)

    def follow(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook: find the tokens that the evictors have left so far."""
        call = prefill_call(module, args, kwargs)
        if call is None or call.layer_idx not in self._originals:
            return
        keys, values = plain_states(call.cache, call.layer_idx)
        if keys.shape[2] < call.tokens:
            found = survivor_positions(*self._originals[call.layer_idx], keys, values)
            before = self._positions.get(call.layer_idx)
            if found is None and before is not None and before.shape[-1] == keys.shape[2]:
                found = before  # nothing was evicted since then, but numbers were changed in place
            self._positions[call.layer_idx] = found

    def pack(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook: replace this layer of the cache by a packed one."""
        call = prefill_call(module, args, kwargs)
        if call is None or is_sliding(module):
            return
        with self._settlement.collecting():
            self._pack(call)
        packed = call.cache.layers[call.layer_idx]
        if isinstance(packed, PackedLayer):
            self._settlement.add(packed)
        if module is self._last and not self.at_exit:
            warn_if_nothing_is_packed(self.press, call.cache, call.tokens)

    def _pack(self, call: PrefillCall) -> None:
        originals = self._originals.pop(call.layer_idx, None)
        positions = self._positions.pop(call.layer_idx, None)
        keys, values = plain_states(call.cache, call.layer_idx)
        settings = self.press.layer_settings(call.module, keys.shape[-1], values.shape[-1], self.sink_tokens)
        if settings is None:
            return
        with torch.no_grad():
            check_states(call, keys, values)
            moment = self._moment(call, settings, keys, originals)
            if self.at_exit:
                self._wait(call, moment)
                return
            scores = None if self.demote is None else self.demote.take_scores(call.layer_idx)
            tokens = Survivors(keys, values, named_slots(call.module, keys), scores)
            if keys.shape[2] < call.tokens:
                if originals is None:
                    positions = _positions_by_recomputing(call, keys)
                tokens = tokens if positions is None else tokens.sorted_by(positions)
            places = self._places(call, tokens, settings)
            if places is not None:
                tokens = tokens.sorted_by(places)
                settings = replace(settings, sink_tokens=settings.sink_tokens + self.press.detect_sinks)
            call.cache.layers[call.layer_idx] = self._packed(call, tokens, settings, moment)

    def _packed(
        self, call: PrefillCall, tokens: Survivors, settings: LayerSettings, moment: torch.Tensor | None
    ) -> PackedLayer:
        hidden = tokens.hidden
        by_head = hidden is not None and self.by_head and not is_padded(call.attention_mask)
        if hidden is not None:
            name_slots(call.module, hidden, evicted=by_head)
        replaced = call.cache.layers[call.layer_idx]
        packed = packed_kind(replaced).from_states(
            tokens.keys.detach(),
            tokens.values.detach(),
            settings,
            query_moment=moment,
            tokens_seen=tokens.keys.shape[2] if self.rerotated else call.tokens,
            hidden=hidden if by_head else None,
            demotion=self._demotion(call, tokens),
        )
        packed.take_over(replaced)
        return packed

    def _places(self, call: PrefillCall, tokens: Survivors, settings: LayerSettings) -> torch.Tensor | None:
        """[B, Hkv, K] places with detected sinks right behind the first tokens; None to leave the order."""
        count, first, recent = self.press.detect_sinks, settings.sink_tokens, settings.recent_tokens
        if not count or tokens.keys.shape[2] < first + count + recent + PAGE_TOKENS:
            return None
        if is_padded(call.attention_mask):
            self._warn(
                "sinks are not detected in a padded batch, whose mask goes by slot: they are packed, which "
                "costs accuracy. Give contexts one at a time, or of equal length; TurboQuant(detect_sinks=0) "
                "is the same without this warning"
            )
            return None
        try:
            return places_with_sinks_first(call, tokens.keys, first, recent, count, tokens.hidden)
        except UnknownAttentionError as reason:
            attention = type(call.module).__name__
            self._warn_of_queries(attention, reason, "without detected sinks", "detect_sinks=0")
            return None

    def _demotion(self, call: PrefillCall, tokens: Survivors) -> Demotion | None:
        if self.demote is None or tokens.scores is None:
            return None
        if is_padded(call.attention_mask):
            raise InvalidInputError(
                "Demote moves tokens, and the mask of a padded batch goes by slot; give contexts one at a "
                "time, or of equal length"
            )
        dims = tokens.keys.shape[-1], tokens.values.shape[-1]
        return self.demote.demotion(self.press, call.module, tokens.scores, *dims)

    def _moment(
        self, call: PrefillCall, settings: LayerSettings, keys: torch.Tensor, originals: States | None
    ) -> torch.Tensor | None:
        """[B, Hkv, D] mean square of the last queries; None when it is not needed or not known."""
        if not (settings.balance and settings.key_codec.wants_statistics):
            return None
        all_keys = keys if originals is None else originals[0]
        known = all_keys if all_keys.shape[2] == call.tokens else None
        window = self.press.balance_window

        attention = type(
            call.module
        ).__name__  # a check waits for the end: it must not keep the call's tensors

        def warn(reason: UnknownAttentionError) -> None:
            self._warn_of_queries(attention, reason, "without balanced channels", "balance=False")

        inputs = call.module, call.hidden_states, call.position_embeddings
        try:
            return query_moment(*inputs, keys.shape[1], window, known, warn)
        except UnknownAttentionError as reason:
            warn(reason)
            return None

    def _warn_of_queries(self, attention: str, reason: Exception, effect: str, remedy: str) -> None:
        self._warn(
            f"the queries of {attention} are not known ({reason}): its keys are packed "
            f"{effect}, which costs accuracy; TurboQuant({remedy}) is the same without this warning"
        )

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(message, stacklevel=4)

    def _wait(self, call: PrefillCall, moment: torch.Tensor | None) -> None:
        _, _, moments = self._waiting.setdefault(id(call.cache), (call.cache, call.tokens, {}))
        if moment is not None:
            moments[call.layer_idx] = moment

    def _pack_waiting(self, model: nn.Module) -> None:
        for cache, tokens, moments in self._waiting.values():
            pack_cache(self.press, model, cache, moments, tokens, self.sink_tokens, by_head=self.by_head)
            warn_if_nothing_is_packed(self.press, cache, tokens)


def _positions_by_recomputing(call: PrefillCall, keys: torch.Tensor) -> torch.Tensor | None:
    """Positions without a record: keys computed from the hidden states are mostly equal bit for bit."""
    try:
        before = recomputed_keys(call.module, call.hidden_states, call.position_embeddings)
    except UnknownAttentionError:
        return None
    return survivor_positions(before, None, keys, None)
