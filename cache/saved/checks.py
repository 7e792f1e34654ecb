"""Checks that parts read from a file fit together, because kernels access memory by these shapes.

Checksums detect a damaged file; these checks are for one that was written with wrong contents.
"""

import torch
from torch import Tensor

from quantpress.cache.tokens.demotion import DemotedPages
from quantpress.cache.tokens.packed_tokens import PackedTokens
from quantpress.cache.tokens.ragged_pages import RaggedPages
from quantpress.codecs.protocol import PageCodec, one_page
from quantpress.errors import InvalidInputError
from quantpress.quantization.transform import ChannelTransform


def check_tokens(tokens: PackedTokens) -> None:
    """Check that the tensors of packed tokens fit each other and their codecs.

    Raises:
        InvalidInputError: some part does not fit; the message names it.
    """
    keys, values = tokens.sinks.keys, tokens.sinks.values
    heads = keys.shape[:2]
    uneven = isinstance(tokens.pages, RaggedPages)
    _check(not (uneven and tokens.settings.key_codec.heads), "the pages of heads with widths of their own")
    for side, dense, recent in (
        ("keys", keys, tokens.recent.keys),
        ("values", values, tokens.recent.values),
    ):
        codec = tokens.settings.key_codec if side == "keys" else tokens.settings.value_codec
        for one in (dense, recent):
            _check(
                one.dim() == 4
                and one.shape[:2] == heads
                and one.shape[-1] == codec.head_dim
                and one.dtype == keys.dtype
                and one.is_floating_point(),
                f"the {side} kept in 16 bits",
            )
        store = tokens.key_pages if side == "keys" else tokens.value_pages
        transform = tokens.key_transform if side == "keys" else tokens.value_transform
        _check(transform is not None or not store.pages, f"the transform of the {side}")
        if transform is not None:
            _check_transform(transform, (*heads, codec.head_dim), side)
        if store.pages:
            leading = (1, 1) if uneven else tuple(heads)
            check_planes(codec, store.planes, keys.dtype, (*leading, store.pages))
    _check(tokens.key_pages.pages == tokens.value_pages.pages, "the number of pages of keys and values")
    _check(tokens.sinks.tokens == values.shape[2], "the number of sinks")
    _check(tokens.recent.keys.shape[2] == tokens.recent.values.shape[2], "the number of recent tokens")
    _check_heads(tokens, tuple(heads))
    if tokens.demoted is not None:
        _check_demoted(tokens.demoted, tuple(heads), keys)


def _check_demoted(demoted: DemotedPages, heads: tuple[int, ...], like: Tensor) -> None:
    sides = (
        ("demoted keys", demoted.key_codec, demoted.key_transform, demoted.pages.keys),
        ("demoted values", demoted.value_codec, demoted.value_transform, demoted.pages.values),
    )
    for side, codec, transform, store in sides:
        _check_transform(transform, (*heads, codec.head_dim), side)
        check_planes(codec, store.planes, like.dtype, (*heads, demoted.pages.pages))


def _check_heads(tokens: PackedTokens, heads: tuple[int, ...]) -> None:
    """Check that the page table names existing rows, and that the lengths of heads fit the storage."""
    pages, lengths = tokens.pages, tokens.heads
    if isinstance(pages, RaggedPages):
        table = pages.table
        right = table.dtype == torch.int32 and table.dim() == 3 and tuple(table.shape[:2]) == heads
        _check(right and lengths is not None, "the page table")
        _check(not table.numel() or _within(table, 0, pages.keys.pages - 1), "the rows of the page table")
    if lengths is not None:
        both = (lengths.sinks, lengths.padding)
        right = all(one.dtype == torch.int32 and one.shape == heads for one in both)
        _check(right and lengths.sink_capacity == tokens.sinks.tokens, "the lengths of the heads")
        _check(_within(lengths.sinks, 0, tokens.sinks.tokens), "the sinks of the heads")
        _check(_within(lengths.padding, 0, tokens.packed + tokens.recent.tokens), "the tokens of the heads")


def _within(numbers: Tensor, least: int, most: int) -> bool:
    return bool(((numbers >= least) & (numbers <= most)).all())


def check_planes(
    codec: PageCodec, planes: dict[str, Tensor], dtype: torch.dtype, leading: tuple[int, ...]
) -> None:
    """Refuse planes that are not those of a codec.

    Args:
        codec: whose pages they should be.
        planes: by name.
        dtype: of the vectors that were packed.
        leading: their leading dimensions, such as (B, Hkv, P), all heads included.

    Raises:
        InvalidInputError: names, dtypes or shapes are wrong.
    """
    page = one_page(codec, dtype)
    _check(codec.kv_heads in (None, leading[1]), f"{leading[1]} heads and {codec}")

    def shape(plane: Tensor) -> tuple[int, ...]:
        heads = leading[1] if codec.kv_heads is None else plane.shape[1]
        return (leading[0], heads, *leading[2:], *plane.shape[3:])

    wanted = {name: (plane.dtype, shape(plane)) for name, plane in page.items()}
    found = {name: (plane.dtype, tuple(plane.shape)) for name, plane in planes.items()}
    if codec.in_one_dtype != codec:  # scales may have become wider, those of each group of heads for itself
        wide = {torch.float16: torch.float32}
        wider = {name: (wide.get(dtype, dtype), shape) for name, (dtype, shape) in wanted.items()}
        wanted = {name: wider[name] if found.get(name) == wider[name] else wanted[name] for name in wanted}
    _check(found == wanted, f"the pages {found} of {codec}")


def _check_transform(transform: ChannelTransform, shape: tuple[int, ...], side: str) -> None:
    for name, tensor in transform.tensors().items():
        dtype = torch.int16 if name == "order" else torch.float32
        _check(tensor.shape == shape and tensor.dtype == dtype, f"the {name} of the {side}")
    if transform.order is not None:
        channels = torch.arange(shape[-1], dtype=torch.int16, device=transform.order.device)
        _check(
            bool((transform.order.sort(dim=-1).values == channels).all()), f"the channel order of the {side}"
        )


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise InvalidInputError(f"parts do not fit together: {what}")
