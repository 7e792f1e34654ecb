"""Operations on segments: runs of tokens that are kept in 16 bits (dense) or in pages (packed)."""

import torch

from quantpress.kernels.attend import DenseSegment, PackedSegment, PackedSide, Segment
from quantpress.kernels.layout import PAGE_TOKENS


def first(segment: DenseSegment, tokens: int) -> DenseSegment:
    """The first `tokens` tokens, as views."""
    if tokens >= segment.tokens:
        return segment
    return DenseSegment(segment.keys.narrow(2, 0, tokens), segment.values.narrow(2, 0, tokens))


def after(segment: DenseSegment, tokens: int) -> DenseSegment:
    """The tokens that follow the first `tokens` tokens, as views."""
    if tokens <= 0:
        return segment
    start = min(tokens, segment.tokens)
    count = segment.tokens - start
    return DenseSegment(segment.keys.narrow(2, start, count), segment.values.narrow(2, start, count))


def join(segment: DenseSegment, more: DenseSegment) -> DenseSegment:
    """Both segments, one after the other. If one is empty, the other is returned as it is."""
    if not segment.tokens or not more.tokens:
        return more if not segment.tokens else segment
    return DenseSegment(
        torch.cat([segment.keys, more.keys], dim=2), torch.cat([segment.values, more.values], dim=2)
    )


def gather_tokens(states: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The tokens of [B, Hkv, T, D] at indices [B, Hkv, N]: [B, Hkv, N, D]."""
    return states.gather(2, indices.unsqueeze(-1).expand(-1, -1, -1, states.shape[-1]))


def compact(segment: DenseSegment) -> DenseSegment:
    """The same tokens in storage that holds nothing else; copied only if needed."""
    return DenseSegment(_compact(segment.keys), _compact(segment.values))


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    needed = tensor.numel() * tensor.element_size()
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == needed:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def select_dense(segment: DenseSegment, entries: torch.Tensor) -> DenseSegment:
    """Batch entries [B'] int64 of dense tokens."""
    return DenseSegment(segment.keys.index_select(0, entries), segment.values.index_select(0, entries))


def select_packed(segment: PackedSegment, entries: torch.Tensor) -> PackedSegment:
    """Batch entries [B'] int64 of packed pages. With a page table, only the table is indexed."""

    def select(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.index_select(0, entries)

    def side(packed: PackedSide) -> PackedSide:
        own = segment.table is None
        planes = {name: select(plane) if own else plane for name, plane in packed.planes.items()}
        return PackedSide(packed.codec, planes, packed.transform.map(select))

    lengths, table, starts = (
        None if tensor is None else select(tensor)
        for tensor in (segment.lengths, segment.table, segment.starts)
    )
    return PackedSegment(side(segment.keys), side(segment.values), lengths, table, starts)


def first_packed(pages: PackedSegment, tokens: int, dtype: torch.dtype) -> list[Segment]:
    """The first `tokens` tokens of pages that are all in use; a page that is cut is decoded."""
    whole, rest = divmod(min(tokens, pages.tokens), PAGE_TOKENS)
    segments: list[Segment] = [PackedSegment(*pages.narrow(0, whole))] if whole else []
    if rest:
        cut = decode_segment(PackedSegment(*pages.narrow(whole, whole + 1)), dtype)
        segments.append(first(cut, rest))
    return segments


def decode_segment(segment: Segment, dtype: torch.dtype) -> DenseSegment:
    """The tokens of a segment: packed ones decoded to `dtype`, dense ones unchanged."""
    if isinstance(segment, DenseSegment):
        return segment
    return DenseSegment(decode_keys(segment, dtype), decode_values(segment, dtype))


def decode_keys(segment: Segment, dtype: torch.dtype) -> torch.Tensor:
    """The keys [B, Hkv, T, D] of a segment; see `decode_segment`."""
    return segment.keys if isinstance(segment, DenseSegment) else _decode(segment.whole_keys(), dtype)


def decode_values(segment: Segment, dtype: torch.dtype) -> torch.Tensor:
    """The values [B, Hkv, T, Dv] of a segment; see `decode_segment`."""
    return segment.values if isinstance(segment, DenseSegment) else _decode(segment.whole_values(), dtype)


def _decode(side: PackedSide, dtype: torch.dtype) -> torch.Tensor:
    return side.codec.decode(side.planes, side.transform, dtype)
