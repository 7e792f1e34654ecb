"""A piece of a model that one kernel of ours can stand in for, and the proof that it may.

A piece is proven for one kind of call (shapes, dtypes) at a time, on the tensors of a real step and on random
ones; while a context is read, once for any number of tokens. What is not proven stays as it is.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from quantpress.pipelines.joined.seams import Named, Seam, function_in

Choice = Any
"""What `prove` has found out about a kind of call: which variant of the kernel is right; None: none is."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TRIALS = 4
"""Random inputs of each proof."""

MANY_ROWS = 512
"""Tokens from which on one proof holds for any number: PyTorch adds up each row in the same order, however
many there are (`adding_orders`), and the other pieces treat each number by itself."""

PROVEN: WeakKeyDictionary[Any, dict[Hashable, Choice]] = WeakKeyDictionary()
"""By module, class of norms or function, what was found out about its calls; for the life of the process."""


@dataclass(frozen=True)
class Many:
    """A kind of call over `MANY_ROWS` tokens or more, however many they are."""

    call: Hashable


class JoinedPiece(ABC):
    """A function of a model, and the kernel that gives the same.

    Args:
        named: the function.
        owner: what the proof is kept with: a module, or the function.

    Attributes:
        code: the function as its class has it. Proofs hold for it alone: it may be replaced in the class.
    """

    kind: ClassVar[str]

    def __init__(self, named: Named, owner: Any) -> None:
        self.named = named
        self.code = code_of(named.function)
        self._proven = PROVEN.setdefault(owner, {})

    def watch(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the model's own function, and prove the kernel on this call if it is the first of its kind."""
        output = own(*args, **kwargs)
        call = None if kwargs else self.kind_of_call(*args)
        if call is not None and call not in self._proven:
            try:
                self._proven[call] = self.prove(own, output, *args)
            except Exception:  # a kernel that does not compile, a module that refuses the trial
                self._proven[call] = None
        return output

    def run(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the kernel where it is proven, else the model's own function."""
        call = None if kwargs else self.kind_of_call(*args)
        choice = None if call is None else self._proven.get(call)
        return own(*args, **kwargs) if choice is None else self.join(choice, *args)

    def read(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Over many tokens run the kernel; at the first call of its kind prove it, in place of that."""
        call = None if kwargs or torch.is_grad_enabled() else self.kind_of_many(*args)
        if call is None:
            return own(*args, **kwargs)
        call = Many(call)
        if call not in self._proven:
            output = own(*args)
            try:
                self._proven[call] = self.prove_many(own, output, *args)
            except torch.OutOfMemoryError:  # another time there may be room
                pass
            except Exception:  # as in `watch`
                self._proven[call] = None
            return output
        choice = self._proven[call]
        return own(*args) if choice is None else self.join(choice, *args)

    @property
    def proven(self) -> bool:
        """Whether the kernel stands in for some kind of call in a step."""
        found = self._proven.items()
        return any(choice is not None and not isinstance(call, Many) for call, choice in found)

    @abstractmethod
    def kind_of_call(self, *args: Any) -> Hashable:
        """What the proof of a call holds for; None for a call that the kernel does not take."""

    @abstractmethod
    def prove(self, own: Callable[..., Any], output: Any, *args: Any) -> Choice:
        """Find the variant of the kernel that gives `output` and whatever else `own` gives."""

    def kind_of_many(self, *args: Any) -> Hashable:
        """As `kind_of_call`, for `MANY_ROWS` tokens or more and the same for any number of them."""
        return None

    def prove_many(self, own: Callable[..., Any], output: Any, *args: Any) -> Choice:
        """As `prove`, for a call of which `kind_of_many` tells the kind."""
        return None

    @abstractmethod
    def join(self, choice: Choice, *args: Any) -> Any:
        """The function by the kernel."""


def code_of(function: Callable[..., Any]) -> Any:
    """What a bound method calls; another function itself."""
    return getattr(function, "__func__", function)


def forward_of(module: nn.Module) -> Named:
    """The `forward` of a module, behind a `Seam` too."""
    return Named(vars(module), "forward", function_in(vars(module), "forward") or module.forward)


def unchanged(module: nn.Module) -> bool:
    """Whether a module has no hook, and a `forward` that nothing but a `Seam` has replaced."""
    own = isinstance(vars(module).get("forward"), Seam | None)
    return own and not module._forward_hooks and not module._forward_pre_hooks


def plain(tensor: Any) -> bool:
    """Whether a kernel can read this: a tensor, no subclass such as a shard, of a dtype that it knows."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in DTYPES


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to the last bit."""
    whole = torch.int32 if one.dtype == torch.float32 else torch.int16
    return one.dtype == other.dtype and torch.equal(one.view(whole), other.view(whole))


def own_generator(like: Tensor, seed: int = 0) -> torch.Generator:
    """Of its own, so that sampling draws what it would have drawn."""
    return torch.Generator(like.device).manual_seed(seed)


def trial_inputs(like: Tensor, seed: int = 0, count: int = TRIALS) -> list[Tensor]:
    """Random tensors of the same shape, strides, dtype and device; large ones reach what clamps, if any."""
    draws = own_generator(like, seed)
    noises = (
        torch.randn(like.shape, dtype=torch.float32, device=like.device, generator=draws)
        for _ in range(count)
    )
    return [torch.empty_like(like).copy_(noise * 8.0 ** (n % TRIALS - 1)) for n, noise in enumerate(noises)]
