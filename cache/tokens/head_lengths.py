"""How many tokens each head keeps, after a head-wise eviction has left a different number in each.

The storage of a layer is rectangular: all heads have the same sinks, pages and recent tokens. A head that
keeps fewer tokens leaves the end of its sinks and the start of its pages unused::

    [ sinks: the first in use, then unused | pages and recent tokens: padding, then in use ]

New tokens are appended behind all heads alike. The layer goes on counting the tokens that it was given,
evicted ones included, because models and presses do so too. A *slot* is the index of a token in this count; a
*storage index* is its index in the picture above. Both are the same when counted from the end.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from quantpress.codecs.parts import Parts, portable
from quantpress.errors import InvalidInputError
from quantpress.kernels.attend import DenseSegment


@portable("head_counts")
@dataclass(frozen=True, eq=False)
class HeadLengths:
    """How many tokens each head of a layer keeps; made by `of`.

    Args:
        sinks: [B, Hkv] int32, sinks in use.
        padding: [B, Hkv] int32, unused storage indices in front of the pages and recent tokens.
        sink_capacity: sinks that each head has storage for.
        evicted: slots minus storage indices: how many more tokens the layer counts than it has storage for.
        whole_from: the slot from which on every head keeps every token, none of them a sink.
        fewest_sinks: the least number in `sinks`, known on the host.
        least_padding: the least number in `padding`, known on the host.
        most_padding: the largest number in `padding`, known on the host.
    """

    sinks: torch.Tensor
    padding: torch.Tensor
    sink_capacity: int
    evicted: int
    whole_from: int
    fewest_sinks: int
    least_padding: int
    most_padding: int

    @classmethod
    def of(
        cls, sinks: torch.Tensor, padding: torch.Tensor, sink_capacity: int, evicted: int, whole_from: int
    ) -> "HeadLengths":
        """Lengths from `sinks` and `padding`, [B, Hkv] of any int dtype. Waits for the device."""
        bounds = int(sinks.amin()), int(padding.amin()), int(padding.amax())
        return cls(sinks.int(), padding.int(), sink_capacity, evicted, whole_from, *bounds)

    def span(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens in use among `start` to `stop` of the pages and recent tokens.

        Returns:
            Lengths and starts, [B, Hkv] int32 each; starts are counted from `start`.
        """
        starts = (self.padding - start).clamp(0, stop - start)
        return stop - start - starts, starts

    def in_use(self, start: int, stop: int) -> torch.Tensor:
        """[B, Hkv, stop - start] bool: which of the pages' and recent tokens' indices hold a token."""
        return torch.arange(start, stop, device=self.padding.device) >= self.padding.unsqueeze(-1)

    def sinks_in_use(self, count: int) -> torch.Tensor:
        """[B, Hkv, count] bool: which of the first `count` sinks are in use."""
        return torch.arange(count, device=self.sinks.device) < self.sinks.unsqueeze(-1)

    def counted_sinks(self, sinks: DenseSegment) -> DenseSegment:
        """The given sinks, all or the first of the layer, with the number in use of each head."""
        if self.fewest_sinks >= sinks.tokens:
            return sinks
        return replace(sinks, lengths=self.sinks.clamp(max=sinks.tokens))

    def check_whole(self, slots: int) -> None:
        """Check that every head keeps all tokens from slot `slots` on, so that they can be removed.

        Raises:
            InvalidInputError: single heads have evicted some of these tokens.
        """
        if slots < self.whole_from:
            raise InvalidInputError(
                f"the first {slots} tokens cannot be told from later ones: single heads have evicted tokens "
                f"before {self.whole_from}; cut such a layer to {self.whole_from} tokens or more, or to none"
            )

    def check_named(self, named: torch.Tensor) -> None:
        """Check that no more tokens before `whole_from` are named than were evicted. Waits for the device.

        Args:
            named: [B, Hkv, slots] bool, the tokens that kvpress wants hidden. `DMSPress` names the tokens
                that it evicted at the prefill again.

        Raises:
            InvalidInputError: more tokens are named.
        """
        gone = self.evicted + self.sink_capacity - self.sinks + self.padding
        if bool((named[..., : self.whole_from].sum(-1) > gone).any()):
            raise InvalidInputError(
                f"a press hides tokens before slot {self.whole_from}, where single heads have evicted tokens "
                "already; use one head-wise press at the prefill, and only DMSPress while decoding"
            )

    def parts(self) -> Parts:
        """The lengths in the form in which they are saved; the names are those of the file format."""
        about = {
            "sink_places": self.sink_capacity,
            "evicted": self.evicted,
            "whole_from": self.whole_from,
        }
        return Parts("head_counts", about, {"sinks": self.sinks, "absent": self.padding})

    @classmethod
    def from_parts(cls, parts: Parts) -> "HeadLengths":
        """The lengths that `parts` describes."""
        numbers = (int(parts.about[name]) for name in ("sink_places", "evicted", "whole_from"))
        return cls.of(parts.tensors["sinks"], parts.tensors["absent"], *numbers)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor held."""
        return [self.sinks, self.padding]

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "HeadLengths":
        """The same lengths with `change` (move, copy, index the batch) applied to both tensors."""
        return replace(self, sinks=change(self.sinks), padding=change(self.padding))
