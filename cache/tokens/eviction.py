"""Forgetting tokens of a layer: `keep` some in every head, or `evict` others from single heads.

The tokens that a head keeps stay in the order of the text: the first are its sinks, the last its recent
tokens in 16 bits, and those between are packed. Evicting packed tokens moves their codes; nothing is
quantized twice.
"""

from dataclasses import dataclass

import torch

from quantpress.cache.settings import LayerSettings
from quantpress.cache.tokens.head_lengths import HeadLengths
from quantpress.cache.tokens.packed_tokens import PackedTokens
from quantpress.cache.tokens.pages import RectangularPages
from quantpress.cache.tokens.ragged_pages import RaggedPages
from quantpress.cache.tokens.segments import after, decode_segment, first, gather_tokens, join
from quantpress.codecs.protocol import Planes
from quantpress.deferred import checked_at_once
from quantpress.errors import InvalidInputError
from quantpress.kernels.attend import DenseSegment
from quantpress.kernels.layout import PAGE_TOKENS

UNEVEN = "evicting different numbers of tokens from the heads of a layer"


@dataclass(frozen=True)
class EvictionPlan:
    """Where the tokens that heads keep come from. Sources are storage indices before the eviction.

    Args:
        sinks: [B, Hkv, S] int64, sources of the sinks; arbitrary behind the last sink of a head.
        rest: [B, Hkv, W + R] int64, sources of pages and recent tokens; arbitrary in the padding.
        packed: W, tokens of the pages, a multiple of 128.
        sinks_in_use: [B, Hkv] int64, sinks of each head.
        padding: [B, Hkv] int64, how many entries at the start of `rest` are unused.
    """

    sinks: torch.Tensor
    rest: torch.Tensor
    packed: int
    sinks_in_use: torch.Tensor
    padding: torch.Tensor

    @classmethod
    def keeping(
        cls, kept: torch.Tensor, most_sinks: int, may_be_sink: torch.Tensor, recent: int
    ) -> "EvictionPlan":
        """Plan to keep some of T tokens.

        Args:
            kept: [B, Hkv, T] bool, the tokens to keep.
            most_sinks: the largest number of sinks of a head.
            may_be_sink: [B, Hkv, T] bool, the tokens that may become sinks: some of the first ones.
            recent: how many of the last tokens stay in 16 bits, if there are so many.
        """
        tokens, count = kept.shape[2], kept.sum(-1)
        sinks_in_use = (kept & may_be_sink).sum(-1).clamp(max=most_sinks)
        sinks = int(sinks_in_use.amax())
        others = count - sinks_in_use
        most = int(others.amax())
        recent = min(recent, most)
        packed = -(-(most - recent) // PAGE_TOKENS) * PAGE_TOKENS
        order = kept.byte().argsort(dim=-1, stable=True)  # evicted tokens, then those kept
        ends = torch.arange(-packed - recent, 0, device=kept.device) + tokens
        starts = (tokens - count).unsqueeze(-1) + torch.arange(sinks, device=kept.device)
        return cls(
            sinks=order.gather(2, starts.clamp(max=tokens - 1)),
            rest=order[:, :, ends.clamp(min=0)],
            packed=packed,
            sinks_in_use=sinks_in_use,
            padding=packed + recent - others,
        )

    @classmethod
    def of_prefill(cls, settings: LayerSettings, hidden: torch.Tensor) -> "EvictionPlan":
        """Plan for a prefill from which `hidden` [B, Hkv, T] bool is evicted."""
        slot = torch.arange(hidden.shape[2], device=hidden.device)
        may_be_sink = (slot < settings.sink_tokens) | (slot < _last(hidden).unsqueeze(-1))
        return cls.keeping(~hidden, settings.sink_tokens, may_be_sink, settings.recent_tokens)

    @property
    def pages_in_use(self) -> torch.Tensor:
        """[B, Hkv, P] bool, the pages with at least one token."""
        page = torch.arange(self.packed // PAGE_TOKENS, device=self.padding.device)
        return (page + 1) * PAGE_TOKENS > self.padding.unsqueeze(-1)

    def head_lengths(self, slots: int, whole_from: int) -> HeadLengths:
        """The lengths of a layer of `slots` slots, in which every head keeps those from `whole_from` on."""
        sinks, rest = self.sinks.shape[2], self.rest.shape[2]
        fewest = int((rest - self.padding).amin())
        evicted, whole_from = slots - sinks - rest, max(whole_from, slots - fewest)
        return HeadLengths.of(self.sinks_in_use, self.padding, sinks, evicted, whole_from)


@checked_at_once()  # pages are moved right after they are made, so that their scales need their last dtype
def pack_by_head(
    settings: LayerSettings,
    keys: torch.Tensor,
    values: torch.Tensor,
    hidden: torch.Tensor,
    query_moment: torch.Tensor | None = None,
) -> PackedTokens:
    """Pack the tokens of a prefill that each head keeps.

    The channel transforms are computed from all tokens that a head keeps except its sinks.

    Args:
        settings: how the tokens are stored.
        keys: [B, Hkv, T, D].
        values: [B, Hkv, T, Dv].
        hidden: [B, Hkv, T] bool, True where a head does not keep a token.
        query_moment: as for `PackedLayer.from_states`.

    Raises:
        InvalidInputError: `hidden` has another shape or dtype, or heads have widths of their own.
        NonFiniteError: keys or values contain NaN or infinity.
    """
    settings.check_heads_alike(UNEVEN)
    check_hidden(hidden, tuple(keys.shape[:3]))
    plan = EvictionPlan.of_prefill(settings, hidden)
    tokens = PackedTokens(settings, keys[:, :, :0], values[:, :, :0])
    tokens.query_moment = query_moment
    heads = plan.head_lengths(hidden.shape[2], int(_last(hidden).amax()) + 1)
    rest = DenseSegment(gather_tokens(keys, plan.rest), gather_tokens(values, plan.rest))
    planes: tuple[Planes, Planes] = ({}, {})
    if plan.packed:
        planes = tokens.encode(first(rest, plan.packed), rest, heads.in_use(0, rest.tokens))
    tokens.pages, tokens.heads = RaggedPages(*planes, plan.pages_in_use), heads
    sinks = DenseSegment(gather_tokens(keys, plan.sinks), gather_tokens(values, plan.sinks))
    tokens.replace_dense(sinks, after(rest, plan.packed))
    return tokens


def check_hidden(hidden: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Check that `hidden` is a bool tensor of this shape.

    Raises:
        InvalidInputError: it has another shape or dtype.
    """
    if hidden.dtype != torch.bool or tuple(hidden.shape) != shape:
        raise InvalidInputError(f"hidden must be bool {shape}, got {hidden.dtype} {tuple(hidden.shape)}")


def evict(tokens: PackedTokens, hidden: torch.Tensor, slots: int | None = None) -> None:
    """Evict tokens from single heads of a layer that is already packed.

    Args:
        tokens: changed in place.
        hidden: [B, Hkv, len(tokens)] bool, True where a head is to lose the token of a slot; no effect where
            it has none.
        slots: number of slots that the layer counts from now on; None: as many as before.

    Raises:
        InvalidInputError: some tokens are in pages of fewer bits, or heads have widths of their own.
    """
    _check_one_width(tokens)
    tokens.settings.check_heads_alike(UNEVEN)
    kept = _in_use(tokens) & ~_by_storage_index(tokens, hidden)
    sinks, packed = tokens.sinks.tokens, tokens.packed
    recent = int(kept[..., sinks + packed :].sum(-1).amax())
    plan = EvictionPlan.keeping(kept, sinks, torch.arange(kept.shape[2], device=kept.device) < sinks, recent)
    before = 0 if tokens.heads is None else tokens.heads.whole_from
    whole_from = max(before, int(_last(hidden).amax()) + 1) if slots is None else 0
    heads = plan.head_lengths(len(tokens) if slots is None else slots, whole_from)
    front, back = _gather_dense(tokens, plan.sinks), _gather_dense(tokens, plan.rest[..., plan.packed :])
    planes: tuple[Planes, Planes] = ({}, {})
    if plan.packed:
        inside = plan.rest[..., : plan.packed] - sinks
        pages = tokens.view().gather(inside.clamp(0, packed - 1))
        planes = pages.keys.planes, pages.values.planes
    tokens.pages, tokens.heads = RaggedPages(*planes, plan.pages_in_use), heads
    tokens.replace_dense(front, back)


def keep(tokens: PackedTokens, kept: torch.Tensor) -> None:
    """Keep selected tokens, in the order in which they are stored.

    Each head may keep different numbers of sinks, packed and recent tokens. Pages then hold the whole pages
    that all heads can fill with packed tokens. Other packed tokens are decoded; packed again, almost all of
    them give the same codes, as after a crop.

    Args:
        tokens: tokens of a layer, changed in place.
        kept: [B, Hkv, K] int64, slots, distinct within a head, in any order. A slot whose token the head has
            already evicted stays evicted.

    Raises:
        InvalidInputError: `kept` has another dtype or shape, names a slot twice or one that does not exist;
            or some tokens are in pages of fewer bits.
    """
    _check_one_width(tokens)
    kept = _sorted_slots(tokens, kept)
    if not isinstance(tokens.pages, RectangularPages):
        hidden = torch.ones(*kept.shape[:2], len(tokens), dtype=torch.bool, device=kept.device)
        evict(tokens, hidden.scatter_(2, kept, False), slots=kept.shape[2])
        return
    sinks, dense_from = tokens.sinks.tokens, tokens.sinks.tokens + tokens.packed
    start = int((kept < sinks).sum(-1).amax()) if kept.numel() else 0
    stop = int((kept < dense_from).sum(-1).amin()) if kept.numel() else 0
    end = start + max(0, stop - start) // PAGE_TOKENS * PAGE_TOKENS
    front, back = _gather_dense(tokens, kept[..., :start]), _gather_dense(tokens, kept[..., end:])
    codecs = tokens.settings.key_codec, tokens.settings.value_codec
    tokens.pages = tokens.pages.gather(codecs, kept[..., start:end] - sinks)
    tokens.replace_dense(front, back)


def _sorted_slots(tokens: PackedTokens, kept: torch.Tensor) -> torch.Tensor:
    """Slots [B, Hkv, K], checked and in ascending order."""
    heads = tokens.sinks.keys.shape[:2]
    if kept.dtype != torch.int64 or kept.dim() != 3 or kept.shape[:2] != heads:
        wanted = f"int64 [{heads[0]}, {heads[1]}, K]"
        raise InvalidInputError(f"tokens to keep must be {wanted}, got {kept.dtype} {tuple(kept.shape)}")
    ordered = kept.sort(dim=-1).values
    inside = bool(((ordered >= 0) & (ordered < len(tokens))).all())
    if not inside or not bool((ordered.diff(dim=-1) > 0).all()):
        raise InvalidInputError(f"tokens to keep must be distinct slots from 0 to {len(tokens) - 1}")
    return ordered


def _gather_dense(tokens: PackedTokens, indices: torch.Tensor) -> DenseSegment:
    """The tokens at storage indices [B, Hkv, N] int64, in 16 bits; packed ones are decoded."""
    sinks, packed, count = tokens.sinks.tokens, tokens.packed, indices.shape[2]
    is_packed = (indices >= sinks) & (indices < sinks + packed)
    dense, inside = join(tokens.sinks, tokens.recent), torch.where(indices < sinks, indices, indices - packed)
    found = dense
    if dense.tokens:
        inside = inside.clamp(0, dense.tokens - 1)
        found = DenseSegment(gather_tokens(dense.keys, inside), gather_tokens(dense.values, inside))
    if not count or not bool(is_packed.any()):
        return first(found, count)
    in_pages = (indices - sinks).clamp(0, max(0, packed - 1))
    in_pages = torch.nn.functional.pad(in_pages, (0, -count % PAGE_TOKENS))
    decoded = first(decode_segment(tokens.view().gather(in_pages), tokens.dtype), count)
    if not dense.tokens:
        return decoded
    mask = is_packed.unsqueeze(-1)
    return DenseSegment(
        torch.where(mask, decoded.keys, found.keys), torch.where(mask, decoded.values, found.values)
    )


def _check_one_width(tokens: PackedTokens) -> None:
    if tokens.demoted is not None:
        raise InvalidInputError(
            f"{tokens.demoted_tokens} tokens of this layer are packed in fewer bits, and such a layer cannot "
            "evict: use Demote, or a press that evicts while decoding, not both"
        )


def _last(hidden: torch.Tensor) -> torch.Tensor:
    """[B, Hkv] int64, the last slot that is True in [B, Hkv, slots] bool; -1 if none is."""
    slot = torch.arange(hidden.shape[2], device=hidden.device)
    return torch.where(hidden, slot, -1).amax(-1) if hidden.shape[2] else hidden.sum(-1) - 1


def _in_use(tokens: PackedTokens) -> torch.Tensor:
    """[B, Hkv, stored_length] bool, the storage indices that hold a token."""
    sinks, rest = tokens.sinks.tokens, tokens.stored_length - tokens.sinks.tokens
    if tokens.heads is None:
        shape = (*tokens.sinks.keys.shape[:2], tokens.stored_length)
        return torch.ones(shape, dtype=torch.bool, device=tokens.sinks.keys.device)
    return torch.cat([tokens.heads.sinks_in_use(sinks), tokens.heads.in_use(0, rest)], dim=-1)


def _by_storage_index(tokens: PackedTokens, hidden: torch.Tensor) -> torch.Tensor:
    """Slots [B, Hkv, slots], laid out as in a dense tensor of the layer, by storage index."""
    if tokens.heads is None:
        return hidden
    sinks, rest = tokens.sinks.tokens, tokens.stored_length - tokens.sinks.tokens
    missing = max(0, rest - hidden.shape[2])
    padded = torch.nn.functional.pad(hidden, (missing, 0), value=True)
    return torch.cat([hidden[..., :sinks], padded[..., padded.shape[2] - rest :]], dim=-1)
