"""Head-wise eviction: each head keeps tokens of its own choice, and the memory of the others is freed.

The tokens that a head keeps stay in the order of the text: the first are its sinks, the last its recent ones
in 16 bits, those between are packed. Evicting from packed tokens moves codes; nothing is quantized twice.
"""

from dataclasses import dataclass

import torch

from quantpress.cache.settings import LayerSettings
from quantpress.cache.tokens.head_counts import HeadCounts
from quantpress.cache.tokens.packed_tokens import PackedTokens
from quantpress.cache.tokens.ragged_pages import RaggedPages
from quantpress.cache.tokens.segments import after, first, join, take
from quantpress.cache.tokens.view import decode_segment
from quantpress.codecs.page_codec import Planes
from quantpress.errors import InvalidInputError
from quantpress.kernels.attend import DenseSegment
from quantpress.kernels.layout import PAGE_TOKENS


@dataclass(frozen=True)
class Layout:
    """Where the tokens that heads keep go; sources are places among the T tokens of before.

    Args:
        sinks: [B, Hkv, S] int64, sources of the sinks; those a head has too few for may be any.
        rest: [B, Hkv, W + R] int64, sources of pages and recent tokens; those in front may be any.
        packed: W, a whole number of pages.
        in_use: [B, Hkv] int64, sinks in use.
        absent: [B, Hkv] int64, how many of `rest` in front are none.
    """

    sinks: torch.Tensor
    rest: torch.Tensor
    packed: int
    in_use: torch.Tensor
    absent: torch.Tensor

    @classmethod
    def of(cls, kept: torch.Tensor, sinks: int, sinks_from: torch.Tensor, recent: int) -> "Layout":
        """Plan for some tokens.

        Args:
            kept: [B, Hkv, T] bool, which ones.
            sinks: how many of the first ones are sinks, at most.
            sinks_from: [B, Hkv, T] bool, the tokens in front that may be.
            recent: how many of the last ones stay in 16 bits, as far as there are.
        """
        tokens, count = kept.shape[2], kept.sum(-1)
        in_use = (kept & sinks_from).sum(-1).clamp(max=sinks)
        sinks = int(in_use.amax())
        others = count - in_use
        most = int(others.amax())
        recent = min(recent, most)
        packed = -(-(most - recent) // PAGE_TOKENS) * PAGE_TOKENS
        order = kept.byte().argsort(dim=-1, stable=True)  # what is not kept, then what is
        ends = torch.arange(-packed - recent, 0, device=kept.device) + tokens
        starts = (tokens - count).unsqueeze(-1) + torch.arange(sinks, device=kept.device)
        return cls(
            sinks=order.gather(2, starts.clamp(max=tokens - 1)),
            rest=order[:, :, ends.clamp(min=0)],
            packed=packed,
            in_use=in_use,
            absent=packed + recent - others,
        )

    @property
    def held(self) -> torch.Tensor:
        """[B, Hkv, P] bool, pages with a token in them."""
        page = torch.arange(self.packed // PAGE_TOKENS, device=self.absent.device)
        return (page + 1) * PAGE_TOKENS > self.absent.unsqueeze(-1)

    def counts(self, slots: int, whole_from: int) -> HeadCounts:
        """The counts of a layer of so many slots, from `whole_from` on all kept."""
        sinks, rest = self.sinks.shape[2], self.rest.shape[2]
        fewest = int((rest - self.absent).amin())
        evicted, whole_from = slots - sinks - rest, max(whole_from, slots - fewest)
        return HeadCounts.of(self.in_use, self.absent, sinks, evicted, whole_from)


def prefill_layout(settings: LayerSettings, hidden: torch.Tensor) -> Layout:
    """Where `pack_by_head` puts the tokens that `hidden` [B, Hkv, T] bool leaves."""
    slot = torch.arange(hidden.shape[2], device=hidden.device)
    sinks_from = (slot < settings.sink_tokens) | (slot < last_hidden(hidden).unsqueeze(-1))
    return Layout.of(~hidden, settings.sink_tokens, sinks_from, settings.recent_tokens)


def pack_by_head(
    settings: LayerSettings,
    keys: torch.Tensor,
    values: torch.Tensor,
    hidden: torch.Tensor,
    query_moment: torch.Tensor | None = None,
) -> PackedTokens:
    """Pack what heads keep of a prefill.

    The channel transform is taken from all tokens that a head keeps but its sinks.

    Args:
        settings: codecs and windows.
        keys: [B, Hkv, T, D].
        values: [B, Hkv, T, Dv].
        hidden: [B, Hkv, T] bool, True where a head does not keep a token.
        query_moment: as for `PackedLayer.from_states`.

    Raises:
        InvalidInputError: `hidden` has another shape or dtype.
        NonFiniteError: keys or values hold NaN or infinity.
    """
    if hidden.dtype != torch.bool or hidden.shape != keys.shape[:3]:
        wanted = f"bool {tuple(keys.shape[:3])}"
        raise InvalidInputError(f"hidden must be {wanted}, got {hidden.dtype} {tuple(hidden.shape)}")
    slots, last = hidden.shape[2], last_hidden(hidden)
    layout = prefill_layout(settings, hidden)
    tokens = PackedTokens(settings, keys[:, :, :0], values[:, :, :0])
    tokens.query_moment = query_moment
    heads = layout.counts(slots, int(last.amax()) + 1)
    rest = DenseSegment(take(keys, layout.rest), take(values, layout.rest))
    planes: tuple[Planes, Planes] = ({}, {})
    if layout.packed:
        in_use = heads.in_use(0, rest.tokens)
        planes = tokens.encode(first(rest, layout.packed), rest, in_use)
    tokens.pages, tokens.heads = RaggedPages(*planes, layout.held), heads
    sinks = DenseSegment(take(keys, layout.sinks), take(values, layout.sinks))
    tokens.replace_dense(sinks, after(rest, layout.packed))
    return tokens


def evict(tokens: PackedTokens, hidden: torch.Tensor, slots: int | None = None) -> None:
    """Evict tokens from single heads of a layer that is packed already.

    Args:
        tokens: changed in place; its slots stay as many as they are.
        hidden: [B, Hkv, slots] bool, True where a head is to lose its token; where it has none, nothing
            happens.
        slots: count so many from now on, the hidden ones no more.

    Raises:
        InvalidInputError: some tokens are in pages of fewer bits.
    """
    check_one_width(tokens)
    kept = _in_use(tokens) & ~_by_place(tokens, hidden)
    sinks, packed = tokens.sinks.tokens, tokens.packed
    backs = int(kept[..., sinks + packed :].sum(-1).amax())
    layout = Layout.of(kept, sinks, torch.arange(kept.shape[2], device=kept.device) < sinks, backs)
    before = 0 if tokens.heads is None else tokens.heads.whole_from
    whole_from = max(before, int(last_hidden(hidden).amax()) + 1) if slots is None else 0
    heads = layout.counts(len(tokens) if slots is None else slots, whole_from)
    front, back = taken(tokens, layout.sinks), taken(tokens, layout.rest[..., layout.packed :])
    planes: tuple[Planes, Planes] = ({}, {})
    if layout.packed:
        inside = layout.rest[..., : layout.packed] - sinks
        pages = tokens.view().gather(inside.clamp(0, packed - 1))
        planes = pages.keys.planes, pages.values.planes
    tokens.pages, tokens.heads = RaggedPages(*planes, layout.held), heads
    tokens.replace_dense(front, back)


def taken(tokens: PackedTokens, places: torch.Tensor) -> DenseSegment:
    """The tokens at places [B, Hkv, N] int64 in 16 bits; packed ones are decoded."""
    sinks, packed, count = tokens.sinks.tokens, tokens.packed, places.shape[2]
    is_packed = (places >= sinks) & (places < sinks + packed)
    inside = (places - sinks).clamp(0, max(0, packed - 1))
    dense, place = join(tokens.sinks, tokens.recent), torch.where(places < sinks, places, places - packed)
    found = dense
    if dense.tokens:
        place = place.clamp(0, dense.tokens - 1)
        found = DenseSegment(take(dense.keys, place), take(dense.values, place))
    if not count or not bool(is_packed.any()):
        return first(found, count)
    inside = torch.nn.functional.pad(inside, (0, -count % PAGE_TOKENS))
    decoded = first(decode_segment(tokens.view().gather(inside), tokens.dtype), count)
    if not dense.tokens:
        return decoded
    mask = is_packed.unsqueeze(-1)
    return DenseSegment(
        torch.where(mask, decoded.keys, found.keys), torch.where(mask, decoded.values, found.values)
    )


def check_one_width(tokens: PackedTokens) -> None:
    """Refuse to evict from tokens in pages of two widths.

    Raises:
        InvalidInputError: some are in pages of fewer bits.
    """
    if tokens.coarse is not None:
        raise InvalidInputError(
            f"{tokens.coarse_tokens} tokens of this layer are packed in fewer bits, and such a layer cannot "
            "evict: use Demote, or a press that evicts while decoding, not both"
        )


def last_hidden(hidden: torch.Tensor) -> torch.Tensor:
    """[B, Hkv] int64, the last slot that is True in [B, Hkv, slots] bool; -1 where none is."""
    slot = torch.arange(hidden.shape[2], device=hidden.device)
    return torch.where(hidden, slot, -1).amax(-1) if hidden.shape[2] else hidden.sum(-1) - 1


def _in_use(tokens: PackedTokens) -> torch.Tensor:
    """[B, Hkv, places] bool: which places hold a token."""
    sinks, rest = tokens.sinks.tokens, tokens.places - tokens.sinks.tokens
    if tokens.heads is None:
        shape = (*tokens.sinks.keys.shape[:2], tokens.places)
        return torch.ones(shape, dtype=torch.bool, device=tokens.sinks.keys.device)
    return torch.cat([tokens.heads.sinks_in_use(sinks), tokens.heads.in_use(0, rest)], dim=-1)


def _by_place(tokens: PackedTokens, hidden: torch.Tensor) -> torch.Tensor:
    """Slots [B, Hkv, slots] in the order of places, as a dense tensor of the layer has them."""
    if tokens.heads is None:
        return hidden
    sinks, rest = tokens.sinks.tokens, tokens.places - tokens.sinks.tokens
    missing = max(0, rest - hidden.shape[2])
    padded = torch.nn.functional.pad(hidden, (missing, 0), value=True)
    return torch.cat([hidden[..., :sinks], padded[..., padded.shape[2] - rest :]], dim=-1)
