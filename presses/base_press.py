"""What a press is. kvpress's presses count as subclasses of the classes here.

    class Mine(ScorerPress):
        def score(self, module, hidden_states, keys, values, attentions, kwargs):
            return keys.norm(dim=-1)

`isinstance(press, BasePress)` knows kvpress's classes by their names, so that kvpress need not be imported,
or installed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantpress.errors import InvalidInputError
from quantpress.presses.models.attention import given_rotary_embedding, hooked
from quantpress.presses.packing.prefill_hook import plain_states, prefill_call

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel


def is_of_kvpress(press_class: type, *names: str) -> bool:
    """Whether this is one of kvpress's classes of these names; any of kvpress's, if none is named."""
    home = press_class.__module__.partition(".")[0]
    return home == "kvpress" and (not names or press_class.__name__ in names)


class _AlsoOfKvpress(type):
    """Makes each class of this file a base of what has kvpress's class of the same name as a base."""

    def __subclasscheck__(cls, other: type) -> bool:
        if super().__subclasscheck__(other):
            return True
        bases = other.__mro__ if cls.__module__ == __name__ and isinstance(other, type) else ()
        return any(is_of_kvpress(base, cls.__name__) for base in bases)

    def __instancecheck__(cls, press: Any) -> bool:
        return cls.__subclasscheck__(type(press))

    def __ror__(cls, other: Any) -> Any:
        """`kvpress.SnapKVPress(0.5) | TurboQuant`; of two classes Python makes a union, as of any."""
        composition = getattr(cls, "composition", None)
        if composition is not None and isinstance(other, BasePress):
            return composition([other, cls])
        return super().__ror__(other)


def check_ratio(owner: object, name: str, ratio: object) -> None:
    """Refuse a fraction to evict that is not a number with 0 <= ratio < 1.

    Raises:
        InvalidInputError: names the press, the argument and the value.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
        raise InvalidInputError(
            f"{type(owner).__name__}: {name} is {ratio!r}; give the fraction to evict, 0 <= {name} < 1"
        )


@dataclass
class BasePress(metaclass=_AlsoOfKvpress):
    """A press: used as a context, it compresses every prefill inside."""

    if TYPE_CHECKING:  # what else presses have: compression_ratio, press, presses, ...

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    def post_init_from_model(self, model: "PreTrainedModel") -> None:
        """Look at the model, before the first prefill."""

    def compress(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose what one layer keeps.

        Args:
            module: the attention module of the layer.
            hidden_states: [B, T, hidden], its input.
            keys: [B, Hkv, T, D], after RoPE.
            values: [B, Hkv, T, Dv].
            attentions: [B, Hq, T, T] attention weights; None where the model does not return them.
            kwargs: the keyword arguments of the module.

        Returns:
            Keys [B, Hkv, K, D] and values [B, Hkv, K, Dv] to keep.
        """
        raise NotImplementedError(f"{type(self).__name__} has no compress of its own")

    def forward_hook(
        self, module: nn.Module, input: list[torch.Tensor], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Compress a layer at the prefill; decode steps pass.

        Args:
            module: the attention module.
            input: its positional arguments.
            kwargs: its keyword arguments.
            output: what it returned.

        Returns:
            `output`.
        """
        call = prefill_call(module, input, kwargs)
        if call is not None:
            keys, values = plain_states(call.cache, call.layer_idx)
            kept = self.compress(module, call.hidden_states, keys, values, output[1], kwargs)
            layer: Any = call.cache.layers[call.layer_idx]
            layer.keys, layer.values = kept
        return output

    @contextmanager
    def __call__(self, model: "PreTrainedModel") -> Iterator[None]:
        """Compress every prefill inside the context."""
        self.post_init_from_model(model)
        with given_rotary_embedding(model), hooked(model, self.forward_hook):
            yield


@dataclass
class ScorerPress(BasePress):
    """A press that scores tokens and drops those with the lowest scores, in each head its own.

    Args:
        compression_ratio: fraction of the tokens to drop, 0 <= compression_ratio < 1.

    Raises:
        InvalidInputError: compression_ratio is anything else.
    """

    compression_ratio: float = 0.0

    def __post_init__(self) -> None:
        check_ratio(self, "compression_ratio", self.compression_ratio)

    def score(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Scores [B, Hkv, T] of one layer's tokens, higher for those to keep; arguments as in `compress`."""
        raise NotImplementedError(f"{type(self).__name__} has no score of its own")

    def compress(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.compression_ratio == 0:
            return keys, values
        scores = self.score(module, hidden_states, keys, values, attentions, kwargs)
        kept = max(1, int(keys.shape[2] * (1 - self.compression_ratio)))
        slots = scores.topk(kept, dim=-1).indices.sort().values.unsqueeze(-1)  # [B, Hkv, K, 1]
        return keys.take_along_dim(slots, dim=2), values.take_along_dim(slots, dim=2)


def is_base(press_class: type) -> bool:
    """Whether this is `BasePress` or `ScorerPress`, ours or kvpress's, which evict nothing themselves."""
    return press_class in (BasePress, ScorerPress) or is_of_kvpress(press_class, "BasePress", "ScorerPress")
