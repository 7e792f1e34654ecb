"""Which tokens each head keeps, where head-wise eviction has left a different number in each.

Every head has the same places, and its tokens stand in them in the order of the text, as near to the end of
each part as they can::

    [ sinks: the first in use | pages and recent tokens: the last in use ]

What comes later stands behind all heads alike. A layer goes on to count the slots of the text it was given,
evicted ones included, as models and presses do; slots and places are the same counted from the end.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from quantpress.cache.parts import Parts, portable
from quantpress.errors import InvalidInputError
from quantpress.kernels.attend import DenseSegment


@portable("head_counts")
@dataclass(frozen=True, eq=False)
class HeadCounts:
    """What the heads of a layer keep; see `of`.

    Args:
        sinks: [B, Hkv] int32, sinks in use.
        absent: [B, Hkv] int32, places in front of pages and recent tokens that hold nothing.
        sink_places: places for sinks.
        evicted: slots less places: how many more tokens the layer counts than it has places for.
        whole_from: the slot from which on every head has every token, none of them a sink.
        fewest_sinks, least_absent, most_absent: bounds of the above, known without asking the device.
    """

    sinks: torch.Tensor
    absent: torch.Tensor
    sink_places: int
    evicted: int
    whole_from: int
    fewest_sinks: int
    least_absent: int
    most_absent: int

    @classmethod
    def of(
        cls, sinks: torch.Tensor, absent: torch.Tensor, sink_places: int, evicted: int, whole_from: int
    ) -> "HeadCounts":
        """Counts of [B, Hkv] sinks and absent places, any int dtype. Waits for the device."""
        bounds = int(sinks.amin()), int(absent.amin()), int(absent.amax())
        return cls(sinks.int(), absent.int(), sink_places, evicted, whole_from, *bounds)

    def span(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Lengths and starts of the tokens in use from place `start` to `stop` of pages and recent tokens."""
        starts = (self.absent - start).clamp(0, stop - start)
        return stop - start - starts, starts

    def in_use(self, start: int, stop: int) -> torch.Tensor:
        """[B, Hkv, stop - start] bool: which places of pages and recent tokens hold a token."""
        return torch.arange(start, stop, device=self.absent.device) >= self.absent.unsqueeze(-1)

    def sinks_in_use(self, places: int) -> torch.Tensor:
        """[B, Hkv, places] bool: which of the sinks' places hold a token."""
        return torch.arange(places, device=self.sinks.device) < self.sinks.unsqueeze(-1)

    def counted_sinks(self, sinks: DenseSegment) -> DenseSegment:
        """The sinks, or the first of them, with how many of each head are in use."""
        if self.fewest_sinks >= sinks.tokens:
            return sinks
        return replace(sinks, lengths=self.sinks.clamp(max=sinks.tokens))

    def check_whole(self, slots: int) -> None:
        """Check that every head has the slots from `slots` on, so that these can be taken away.

        Raises:
            InvalidInputError: some have been evicted from single heads.
        """
        if slots < self.whole_from:
            raise InvalidInputError(
                f"the first {slots} tokens cannot be told from later ones: single heads have evicted tokens "
                f"before {self.whole_from}; cut such a layer to {self.whole_from} tokens or more, or to none"
            )

    def check_named(self, named: torch.Tensor) -> None:
        """Check that before `whole_from` no more tokens are named than were evicted. Asks the device.

        Args:
            named: [B, Hkv, slots] bool, what kvpress wants hidden. `DMSPress` names what it evicted at the
                prefill again.

        Raises:
            InvalidInputError: more are named.
        """
        gone = self.evicted + self.sink_places - self.sinks + self.absent
        if bool((named[..., : self.whole_from].sum(-1) > gone).any()):
            raise InvalidInputError(
                f"tokens before {self.whole_from} are to be hidden, of which single heads have evicted some; "
                "use one head-wise press at the prefill, and no other than DMSPress while decoding"
            )

    def parts(self) -> Parts:
        """What it is made of, to be saved."""
        about = {name: getattr(self, name) for name in ("sink_places", "evicted", "whole_from")}
        return Parts("head_counts", about, {"sinks": self.sinks, "absent": self.absent})

    @classmethod
    def from_parts(cls, parts: Parts) -> "HeadCounts":
        """The counts that `parts` took apart."""
        numbers = (int(parts.about[name]) for name in ("sink_places", "evicted", "whole_from"))
        return cls.of(parts.tensors["sinks"], parts.tensors["absent"], *numbers)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor held."""
        return [self.sinks, self.absent]

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "HeadCounts":
        """The same with both tensors moved, copied or indexed in the batch."""
        return replace(self, sinks=change(self.sinks), absent=change(self.absent))
