"""`PackedStates`: a tensor that stands for a packed layer's keys or values and decodes only when it must.

`PackedLayer.update` returns two of these. Models pass them untouched to the attention function, where
`quantpress.cache.attention.dispatch` reads the packed view behind them. To any other operation (a stock
attention, a press, a user's own code) this is an ordinary tensor: the first operation that needs numbers
decodes them. Slices of the first tokens and selections in the batch stay packed. After a write in place the
tensor is dense.

A gather of whole tokens, which presses use for the tokens they keep, is remembered (`kept`): a layer that is
assigned the result moves codes instead of quantizing again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from quantpress.cache.tokens.segments import gather_tokens
from quantpress.cache.tokens.view import DenseView, PackedView

_aten = torch.ops.aten
_SAME = {_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default}


class PackedStates(torch.Tensor):
    """Keys [B, Hkv, T, D] or values [B, Hkv, T, Dv] of a packed view.

    Attributes:
        view_of_layer: the view that it was made of.
        side: "keys" or "values".
        kept: [B, Hkv, K] int64, the only tokens of the view that it stands for; None: all of them.
    """

    view_of_layer: PackedView | DenseView
    side: str
    _kept: torch.Tensor | None
    _dense: torch.Tensor | None

    @staticmethod
    def __new__(
        cls, view: PackedView | DenseView, side: str, kept: torch.Tensor | None = None
    ) -> "PackedStates":
        like = getattr(view.sinks, side)
        size = (*(view.shape if kept is None else kept.shape), like.shape[-1])
        self: PackedStates = torch.Tensor._make_wrapper_subclass(
            cls, size, dtype=view.dtype, device=like.device
        )
        self.view_of_layer, self.side, self._kept, self._dense = view, side, kept, None
        return self

    @property
    def packed(self) -> PackedView | None:
        """The packed view, if this stands for all of it and was not written to; else None."""
        view = self.view_of_layer
        return view if self.leading and isinstance(view, PackedView) else None

    @property
    def kept(self) -> torch.Tensor | None:
        """[B, Hkv, K] tokens of the view that this stands for; None for all, and after a write."""
        return self._kept if self._dense is None else None

    @property
    def leading(self) -> bool:
        """Whether it still stands for the first tokens of a layer, unchanged."""
        return self._dense is None and self._kept is None

    def dense(self) -> torch.Tensor:
        """The decoded tensor."""
        if self._dense is not None:
            return self._dense
        view = self.view_of_layer
        dense = view.dense_keys() if self.side == "keys" else view.dense_values()
        return dense if self._kept is None else gather_tokens(dense, self._kept)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"PackedStates({self.side}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.dense().clone()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(args[0], PackedStates) and args[0]._dense is None:
            kept = _stays_packed(func, args[0], args, kwargs)
            if kept is not None:
                return kept
        if func._schema.is_mutable:
            for value in (*args, *kwargs.values()):
                if isinstance(value, PackedStates):
                    value._dense = value.dense()
        result = func(*tree_map(_to_dense, args), **tree_map(_to_dense, dict(kwargs)))
        if func._schema.is_mutable and isinstance(args[0], PackedStates) and result is args[0]._dense:
            return args[0]
        return result


def _to_dense(value: Any) -> Any:
    return value.dense() if isinstance(value, PackedStates) else value


def _stays_packed(func: Any, states: PackedStates, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The packed result of an operation that needs no numbers, or None."""
    view, side = states.view_of_layer, states.side
    if func in _SAME or func is _aten.clone.default:
        return PackedStates(view, side, states.kept)
    if (
        func is _aten._to_copy.default
        and kwargs.get("dtype", view.dtype) == view.dtype
        and not kwargs.get("device")
    ):
        return PackedStates(view, side, states.kept)
    if states.kept is not None:
        return None
    if func is _aten.gather.default and args[1] % 4 == 2 and _whole_tokens(states, args[2]):
        return PackedStates(view, side, args[2][..., 0])
    if func is _aten.slice.Tensor:
        given = [*args[1:], *[None, None, None, 1][len(args) - 1 :]]
        dim, start, end, step = given
        dim = (dim or 0) % 4
        size = states.shape[dim]
        end = size if end is None else min(end if end >= 0 else max(end + size, 0), size)
        if start in (None, 0) and step == 1 and (dim == 2 or end == size):
            return PackedStates(view.narrow(end) if dim == 2 else view, side)
        if dim == 2 and end == size and step == 1:
            newest = view.newest(size - (start + size if start < 0 else start))
            return None if newest is None else getattr(newest, side)
    if func is _aten.index_select.default and args[1] % 4 == 0:
        return PackedStates(view.select(args[2]), side)
    if func is _aten.index.Tensor and len(args[1]) == 1:
        entries = torch.arange(states.shape[0], device=states.device)
        return PackedStates(view.select(entries[args[1][0]]), side) if args[1][0].dim() == 1 else None
    return None


def _whole_tokens(states: PackedStates, index: torch.Tensor) -> bool:
    """Whether an index of `gather` names tokens: one number for all channels, in every head."""
    wide = index.shape[-1] == states.shape[-1] and (index.stride(-1) == 0 or index.shape[-1] == 1)
    return index.shape[:2] == states.shape[:2] and wide
