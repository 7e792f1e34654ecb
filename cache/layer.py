"""`PackedLayer`: one layer of a transformers cache whose keys and values are packed."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from quantpress.cache import host
from quantpress.cache.attention.dispatch import PACKED_ATTENTION
from quantpress.cache.attention.states import PackedStates
from quantpress.cache.attention.step import is_compiled_step
from quantpress.cache.settings import LayerSettings
from quantpress.cache.tokens.demotion import Demotion
from quantpress.cache.tokens.eviction import check_hidden, evict, keep, pack_by_head
from quantpress.cache.tokens.fixed_tokens import FixedTokens, Window
from quantpress.cache.tokens.packed_tokens import PackedTokens
from quantpress.cache.tokens.segments import join
from quantpress.cache.tokens.view import DenseView, PackedView
from quantpress.errors import InvalidInputError


@dataclass(frozen=True)
class LayerSnapshot:
    """A state of a `PackedLayer`; made by `PackedLayer.snapshot`, used by `PackedLayer.restore`."""

    tokens: PackedTokens | None
    tokens_seen: int


class PackedLayer(DynamicLayer):
    """A cache layer that keeps most of its tokens packed.

    It replaces a `DynamicLayer` in any transformers cache (`cache.layers[i] = ...`). `update` returns
    `PackedStates`, which attention reads in packed form. For this, transformers' attention functions are
    wrapped as long as a layer exists (see `quantpress.cache.attention.functions`).

    Args:
        settings: how the tokens are stored.

    Attributes:
        tokens_seen: number of positions used so far; larger than the number of tokens kept after an eviction.
        stepping: a single token that arrives now belongs to a step at fixed addresses; see `fix`.

    Example:
        >>> import torch
        >>> from quantpress.quantization.spec import CodecSpec
        >>> from quantpress.codecs.scalar import ScalarPages
        >>> codecs = [ScalarPages(CodecSpec(head_dim=64, bits=4, role=role)) for role in ("key", "value")]
        >>> layer = PackedLayer(LayerSettings(*codecs))
        >>> keys, values = layer.update(torch.randn(1, 2, 1000, 64), torch.randn(1, 2, 1000, 64))
        >>> layer.get_seq_length(), layer.packed_tokens
        (1000, 768)
    """

    stepping = False
    device: torch.device
    dtype: torch.dtype

    def __new__(cls, *args: Any, **kwargs: Any) -> "PackedLayer":
        layer = super().__new__(cls)
        PACKED_ATTENTION.in_place_while_alive(layer)  # copies and unpickled layers come by here too
        return layer

    def __init__(self, settings: LayerSettings) -> None:
        self.settings = settings
        self.tokens_seen = 0
        self._tokens: PackedTokens | FixedTokens | None = None
        self._gathered: tuple[str, torch.Tensor] | None = None  # side and slots of a first assignment
        super().__init__()

    @classmethod
    def from_states(
        cls,
        keys: torch.Tensor,
        values: torch.Tensor,
        settings: LayerSettings,
        *,
        query_moment: torch.Tensor | None = None,
        tokens_seen: int | None = None,
        hidden: torch.Tensor | None = None,
        demotion: Demotion | None = None,
    ) -> "PackedLayer":
        """Pack the keys and values of a prefill.

        Args:
            keys: [B, Hkv, T, D] any float dtype, post-RoPE, in token order.
            values: [B, Hkv, T, Dv].
            settings: how the tokens are stored.
            query_moment: [B, Hkv, D] mean square of the queries that will read these keys, to balance
                channels; None: no balance.
            tokens_seen: number of positions used so far, more than T after an eviction; None: T.
            hidden: [B, Hkv, T] bool, True for tokens that single heads do not keep. The layer still counts T
                tokens, but stores none of these. None: every head keeps all tokens.
            demotion: tokens to pack in fewer bits; not together with `hidden`. None: no token.

        Returns:
            A layer that shares no storage with `keys` and `values`.

        Raises:
            NonFiniteError: keys or values contain NaN or infinity.
            InvalidInputError: `hidden`, or the scores of `demotion`, have the wrong shape or dtype.
        """
        layer = cls(settings)
        layer._take_kind(keys)
        if hidden is not None:
            layer._tokens = pack_by_head(settings, keys, values, hidden, query_moment)
        else:
            layer._tokens = PackedTokens.from_prefill(settings, keys, values, query_moment, demotion)
        layer.tokens_seen = keys.shape[2] if tokens_seen is None else tokens_seen
        return layer

    def take_over(self, layer: Any) -> None:
        """Keep what the layer whose place this one takes holds beside its tokens: nothing here."""

    # What transformers calls

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._take_kind(key_states)
        self._tokens = PackedTokens(self.settings, key_states[:, :, :0], value_states[:, :, :0])

    def _take_kind(self, keys: torch.Tensor) -> None:
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens and return all keys and values. New tokens are packed after they are returned.

        Args:
            key_states: [B, Hkv, N, D].
            value_states: [B, Hkv, N, Dv].
            *args: ignored.
            **kwargs: ignored.

        Returns:
            Keys and values of every token: plain tensors while no token is packed, then `PackedStates`.
        """
        if self.stepping and is_compiled_step():
            return key_states, value_states  # `step_attention` appends them
        self._gathered = None
        if self._tokens is None:
            self.lazy_initialization(key_states, value_states)
        in_step = self.stepping and key_states.shape[2] == 1
        tokens = self._filled() if in_step else self._growing()
        tokens.append(key_states, value_states)
        self.tokens_seen += key_states.shape[2]
        states = _states(tokens)
        if not in_step:
            tokens.flush()
        return states

    def get_seq_length(self) -> int:
        """Number of tokens kept."""
        return 0 if self._tokens is None else len(self._tokens)

    def get_mask_sizes(self, query: Any) -> tuple[int, int]:
        """(tokens kept and arriving, offset 0); `query` is what the version of transformers gives."""
        return self.get_seq_length() + host.query_count(query), 0

    def get_max_cache_shape(self) -> int:
        """-1: there is no largest length."""
        return -1

    get_max_length = get_max_cache_shape

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` tokens; a negative value drops that many from the end.

        Raises:
            InvalidInputError: `max_length` drops more tokens than the layer has, or cuts among tokens that
                single heads have evicted or that are packed in fewer bits.
        """
        length = self.get_seq_length()
        keep = length + max_length if max_length < 0 or (host.CROP_REMOVES and not max_length) else max_length
        if keep < 0:
            raise InvalidInputError(
                f"crop({max_length}) of a layer with {length} tokens; drop at most {length}"
            )
        self._cut(keep)

    def _cut(self, keep: int) -> None:
        length = self.get_seq_length()
        if keep < length:
            self._growing().crop(keep)
            self.tokens_seen -= length - keep

    def reset(self) -> None:
        """Forget every token."""
        self._tokens, self.tokens_seen, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Select batch entries `beam_idx` [B] (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch entry `repeats` times."""
        if self._tokens is not None:
            keys = self._growing().sinks.keys
            self.batch_select_indices(torch.arange(len(keys), device=keys.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep batch entries `indices` (int64 indices or a bool mask)."""
        if self._tokens is not None:
            tokens = self._growing()
            device = tokens.sinks.keys.device
            entries = torch.arange(len(tokens.sinks.keys), device=device)
            tokens.select(entries[indices.to(device)])

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything back to the layer's device."""
        if self._tokens is not None and self._tokens.recent.keys.device != self.device:
            self._map(lambda tensor: tensor.to(self.device, non_blocking=True))

    @property
    def keys(self) -> torch.Tensor | None:
        """All keys [B, Hkv, T, D], as `PackedStates`.

        Assigning a slice of the first tokens, as presses do to trim an answer, crops the layer. Assigning a
        gather of whole tokens, and the same gather of `values`, keeps these tokens; see `keep`. Other numbers
        are refused with an `InvalidInputError`, because they would be quantized a second time.
        """
        return None if self._tokens is None else _readable(self._lasting(), "keys")

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        self._assign(value, "keys")

    @property
    def values(self) -> torch.Tensor | None:
        """All values [B, Hkv, T, Dv]; see `keys`."""
        return None if self._tokens is None else _readable(self._lasting(), "values")

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        self._assign(value, "values")

    # Ours

    @property
    def tokens(self) -> PackedTokens | None:
        """The storage; None before the first token. A copy of what is at fixed addresses."""
        return None if self._tokens is None else self._lasting()

    @property
    def packed_tokens(self) -> int:
        """Number of packed tokens, of the head that has most."""
        return 0 if self._tokens is None else self._tokens.packed_tokens

    def view(self) -> PackedView:
        """The tokens as they are now; see `PackedTokens.view`.

        Raises:
            InvalidInputError: the layer has no tokens, or none is packed yet.
        """
        self._filled()
        return self._lasting().view()

    def keep(self, kept: torch.Tensor) -> None:
        """Keep selected tokens and forget the others. Codes stay as they are, and so does `tokens_seen`.

        Args:
            kept: [B, Hkv, K] int64, slots to keep; see `quantpress.cache.tokens.eviction.keep`.

        Raises:
            InvalidInputError: `kept` has another dtype or shape, names a slot twice or one that does not
                exist; or some tokens are packed in fewer bits.
        """
        keep(self._growing(), kept)

    def evict(self, hidden: torch.Tensor) -> None:
        """Evict tokens from single heads and free their memory. Codes stay as they are.

        The layer still counts as many tokens as before.

        Args:
            hidden: [B, Hkv, T] bool, T = `get_seq_length()`, True where a head is to lose a token.

        Raises:
            InvalidInputError: `hidden` has another shape or dtype, or some tokens are packed in fewer bits.
        """
        tokens = self._growing()
        check_hidden(hidden, (*tokens.sinks.keys.shape[:2], len(tokens)))
        evict(tokens, hidden)

    def reserve(self, tokens: int) -> None:
        """Allocate capacity for the pages of `tokens` more tokens, so that appending does not move pages."""
        if self._tokens is not None:
            self._growing().reserve(tokens)

    def fix(self, window: Window) -> FixedTokens:
        """Move to fixed addresses, for steps under `stepping`. Any other use of the layer moves back.

        Args:
            window: memory for the recent tokens; overwritten.

        Raises:
            InvalidInputError: no token is packed yet.
        """
        tokens = FixedTokens(self._growing(), window)
        self._tokens = tokens
        return tokens

    @property
    def fixed(self) -> FixedTokens | None:
        """The tokens at fixed addresses; None if they are not there."""
        return self._tokens if isinstance(self._tokens, FixedTokens) else None

    def release(self) -> None:
        """Move back from fixed addresses."""
        if isinstance(self._tokens, FixedTokens):
            self._tokens = self._tokens.release()

    def snapshot(self) -> LayerSnapshot:
        """The present state, for `restore`. Nothing is copied."""
        tokens = self.tokens
        return LayerSnapshot(None if tokens is None else tokens.share(), self.tokens_seen)

    def restore(self, snapshot: LayerSnapshot) -> None:
        """Go back to a snapshot of this layer, any number of times. Later tokens are lost."""
        self._tokens = snapshot.tokens.share() if snapshot.tokens is not None else None
        self.tokens_seen, self._gathered = snapshot.tokens_seen, None
        self.is_initialized = self._tokens is not None

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedLayer":
        other = copy.copy(self)
        memo[id(self)] = other
        if self._tokens is not None:
            tokens = self._lasting().share()
            tokens.map(torch.clone)
            other._tokens = tokens
        return other

    def _filled(self) -> PackedTokens | FixedTokens:
        if self._tokens is None:
            raise InvalidInputError("this layer has seen no token yet; run the model on a context first")
        return self._tokens

    def _growing(self) -> PackedTokens:
        self.release()
        return self._lasting()

    def _lasting(self) -> PackedTokens:
        """The tokens in a form whose views no later step writes to."""
        tokens = self._filled()
        return tokens.release() if isinstance(tokens, FixedTokens) else tokens

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self._tokens is not None:
            self._growing().map(change)

    def _assign(self, value: torch.Tensor | None, side: str) -> None:
        """Trim the layer, or keep some tokens: the only assignments that quantize nothing again."""
        if value is None and self._tokens is None:
            return
        length = self.get_seq_length()
        kept = value.kept if isinstance(value, PackedStates) else None
        if isinstance(value, PackedStates) and kept is not None and self._assign_kept(value, kept, side):
            return
        trims = value is not None and value.shape[2] <= length
        if isinstance(value, PackedStates):
            trims = trims and value.leading
        elif trims and value is not None:
            trims = not self.packed_tokens and _starts(_readable(self._lasting(), side).dense(), value)
        if not trims or value is None:
            shape = None if value is None else tuple(value.shape)
            raise InvalidInputError(
                f"a packed layer of {length} tokens was assigned keys or values of shape {shape}; it can "
                "only be cut short (`keys[:, :, :n]`, `crop(n)`) or keep some tokens (the same `gather` of "
                "keys and values, `keep`). A press that changes keys or values must come before TurboQuant "
                "in Compose"
            )
        self._cut(value.shape[2])

    def _assign_kept(self, value: PackedStates, kept: torch.Tensor, side: str) -> bool:
        """Keep the tokens that a press has gathered, at its first assignment (keys or values).

        Returns:
            Whether the assignment is valid; the second must gather the same tokens as the first.
        """
        if self._gathered is not None and self._gathered[0] != side:
            (_, done), self._gathered = self._gathered, None
            return torch.equal(done, kept)
        if value.view_of_layer.tokens != self.get_seq_length():
            return False
        self.keep(kept)
        self._gathered = side, kept
        return True


def _states(tokens: PackedTokens | FixedTokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values for attention."""
    if isinstance(tokens, FixedTokens) or tokens.readable:
        view = replace(tokens.view(), for_attention=True)
        return PackedStates(view, "keys"), PackedStates(view, "values")
    both = join(tokens.sinks, tokens.recent)
    return both.keys, both.values


def _starts(states: torch.Tensor, part: torch.Tensor) -> bool:
    """Whether a plain tensor equals the first tokens of `states`."""
    return states.dtype == part.dtype and torch.equal(states[:, :, : part.shape[2]], part)


def _readable(tokens: PackedTokens, side: str) -> PackedStates:
    """Keys or values for all other readers, who may assign a part of them back."""
    if tokens.readable:
        return PackedStates(tokens.view(), side)
    return PackedStates(DenseView(join(tokens.sinks, tokens.recent), len(tokens), tokens.dtype), side)
