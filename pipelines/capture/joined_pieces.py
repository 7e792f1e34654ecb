"""Pieces of a model that one kernel of ours can stand in for, and the proof that it may.

A piece is proven for one kind of call (shapes, dtypes) at a time: on the tensors of a real step, and on
random ones, the kernel has to give what the model's own code gives, to the last bit. What is not proven stays
as it is.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from itertools import product
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from quantpress.kernels.joined.launches import rms_norm, rotary, silu_product
from quantpress.kernels.joined.order import adding_orders
from quantpress.kernels.joined.reference import NORM_FORMS
from quantpress.pipelines.capture.seams import Named, Seam, function_in
from quantpress.presses.models.attention import attention_modules

Choice = Any
"""What `prove` has found out about a kind of call: which variant of the kernel is right; None: none is."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TRIALS = 4
"""Random inputs of each proof."""

ORDER_ROWS = 256
"""Random rows in float32 on which the order is proven in which a class of norms adds. Of the orders of
`adding_orders`, a wrong one shows in a tenth of them."""

ROTARY = "apply_rotary_pos_emb"
"""The name by which attention of transformers calls rotary positions."""

_PROVEN: WeakKeyDictionary[Any, dict[Hashable, Choice]] = WeakKeyDictionary()
"""By module, class of norms or function, what was found out about its calls; for the life of the process."""


class JoinedPiece(ABC):
    """A function of a model, and the kernel that gives the same.

    Args:
        named: the function.
        owner: what the proof is kept with: a module, or the function.
    """

    kind: ClassVar[str]

    def __init__(self, named: Named, owner: Any) -> None:
        self.named = named
        self._proven = _PROVEN.setdefault(owner, {})

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

    @property
    def proven(self) -> bool:
        """Whether the kernel stands in for some kind of call."""
        return any(choice is not None for choice in self._proven.values())

    @abstractmethod
    def kind_of_call(self, *args: Any) -> Hashable:
        """What the proof of a call holds for; None for a call that the kernel does not take."""

    @abstractmethod
    def prove(self, own: Callable[..., Any], output: Any, *args: Any) -> Choice:
        """Find the variant of the kernel that gives `output` and whatever else `own` gives."""

    @abstractmethod
    def join(self, choice: Choice, *args: Any) -> Any:
        """The function by the kernel."""


class Norm(JoinedPiece):
    """An RMSNorm: a module with one weight and an epsilon."""

    kind = "norms"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(_forward_of(module), module)
        self._module: Any = module
        self._eps = _eps_of(module)

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether a module may be one."""
        if not _eps_of(module) or any(module.children()):
            return False
        weights = dict(module.named_parameters())
        alone = set(weights) == {"weight"} and not [*module.buffers()] and _plain(weights["weight"])
        return alone and weights["weight"].dim() == 1

    def kind_of_call(self, *args: Any) -> Hashable:
        x, weight = args[0], self._module.weight
        if len(args) != 1 or not _plain(x) or not x.is_contiguous() or x.data_ptr() % 16 or not x.numel():
            return None
        fits = x.shape[-1] == weight.shape[0] and weight.is_contiguous() and x.shape[-1] % 4 == 0
        aligned = weight.data_ptr() % 16 == 0
        return (x.device, x.shape, x.dtype, weight.dtype, aligned, self._eps) if fits else None

    def prove(self, own: Callable[..., Any], output: Any, *args: Any) -> Choice:
        x, of_class = args[0], _PROVEN.setdefault(type(self._module), {})
        call, rows = self.kind_of_call(*args), x.numel() // x.shape[-1]
        known = of_class.get(call)
        count = TRIALS if known else max(TRIALS, -(-ORDER_ROWS // rows))
        noises = [*_noise(x.float(), count=count), *_noise(x)]
        trials = [(x, output), *((noise, own(noise)) for noise in noises)]
        for choice in [known] if known else product(NORM_FORMS, adding_orders(rows, x.shape[-1])):
            if all(_same(self.join(choice, one), expected) for one, expected in trials):
                of_class[call] = choice
                return choice
        return None

    def join(self, choice: Choice, *args: Any) -> Any:
        form, order = choice
        return rms_norm(args[0], self._module.weight, self._eps, form, order)


class GatedProduct(JoinedPiece):
    """A feed-forward in which SiLU of one projection gates another; both may be halves of one projection."""

    kind = "activations"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(_forward_of(module), module)
        self._module: Any = module
        parts = dict(module.named_children())
        self._act: Any = parts.get("act_fn") or parts["activation_fn"]

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether a module may be one."""
        parts = {name for name, _ in module.named_children()}
        apart = {"gate_proj", "up_proj", "down_proj", "act_fn"}
        return parts >= apart or parts >= {"gate_up_proj", "down_proj", "activation_fn"}

    def kind_of_call(self, *args: Any) -> Hashable:
        x = args[0]
        fits = len(args) == 1 and _plain(x) and x.numel()
        return (x.device, x.shape, x.dtype, type(self._act)) if fits else None

    def prove(self, own: Callable[..., Any], output: Any, *args: Any) -> Choice:
        gate = _every_number(args[0])
        up = torch.randn(gate.shape, dtype=torch.float32, device=gate.device, generator=_generator(gate)).to(
            gate.dtype
        )
        if not _same(silu_product(gate, up), self._act(gate) * up):
            return None
        trials = [(args[0], output), *((noise, own(noise)) for noise in _noise(args[0]))]
        return True if all(_same(self.join(True, x), expected) for x, expected in trials) else None

    def join(self, choice: Choice, *args: Any) -> Any:
        module, x = self._module, args[0]
        if hasattr(module, "gate_up_proj"):
            gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = module.gate_proj(x).contiguous(), module.up_proj(x).contiguous()
        return module.down_proj(silu_product(gate, up))


class Rotary(JoinedPiece):
    """Rotary positions of the queries and keys of one token, a function of a Python module."""

    kind = "rotary positions"

    def __init__(self, named: Named) -> None:
        super().__init__(named, named.function)

    def kind_of_call(self, *args: Any) -> Hashable:
        if len(args) != 4 or not all(map(_plain, args)):
            return None
        q, k, cos, sin = args
        shapes, dim = tuple(one.shape for one in args), q.shape[-1]
        if (q.dim(), k.dim(), cos.dim()) != (4, 4, 3) or dim % 2 or cos.shape[0] not in (1, q.shape[0]):
            return None
        fits = q.shape[2] == k.shape[2] == 1 and q.shape[0] == k.shape[0] and k.shape[-1] == dim
        fits = fits and cos.shape == sin.shape and cos.shape[1:] == (1, dim)
        fits = fits and all(one.stride(-1) == 1 and one.data_ptr() % 16 == 0 for one in args)
        return (q.device, shapes, q.dtype) if fits and len({one.dtype for one in args}) == 1 else None

    def prove(self, own: Callable[..., Any], output: Any, *args: Any) -> Choice:
        trials = [(args, output)]
        for noises in zip(*map(_noise, args, range(4)), strict=True):
            trials.append((noises, own(*noises)))
        for inputs, expected in trials:
            if not all(map(_same, self.join(True, *inputs), expected)):
                return None
        return True

    def join(self, choice: Choice, *args: Any) -> Any:
        q, k, cos, sin = args
        return rotary(q, k, cos, sin)


def pieces_of(model: nn.Module) -> Iterator[JoinedPiece]:
    """Every piece of a model that a kernel may stand in for.

    A module with a hook, or whose forward was replaced already, is left alone.
    """
    for module in model.modules():
        if isinstance(vars(module).get("forward"), Seam | None) and not _hooked(module):
            if Norm.fits(module):
                yield Norm(module)
            elif GatedProduct.fits(module):
                yield GatedProduct(module)
    yield from map(Rotary, _rotary_functions(model))


def _rotary_functions(model: nn.Module) -> list[Named]:
    """The functions that attention calls by the name `ROTARY`, once each."""
    namespaces = {}
    for module in attention_modules(model):
        namespace = getattr(inspect.unwrap(type(module).forward), "__globals__", {})
        namespaces[id(namespace)] = namespace
    found = ((namespace, function_in(namespace, ROTARY)) for namespace in namespaces.values())
    return [Named(namespace, ROTARY, own) for namespace, own in found if inspect.isfunction(own)]


def _forward_of(module: nn.Module) -> Named:
    return Named(vars(module), "forward", function_in(vars(module), "forward") or module.forward)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _eps_of(module: nn.Module) -> float:
    """The epsilon of a norm; 0 for modules without one."""
    named = (vars(module).get(name) for name in ("variance_epsilon", "eps"))
    return next((eps for eps in named if isinstance(eps, float)), 0.0)


def _plain(tensor: Any) -> bool:
    """Whether a kernel can read this: a tensor, no subclass such as a shard, of a dtype that it knows."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in DTYPES


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to the last bit."""
    whole = torch.int32 if one.dtype == torch.float32 else torch.int16
    return one.dtype == other.dtype and torch.equal(one.view(whole), other.view(whole))


def _generator(like: Tensor, seed: int = 0) -> torch.Generator:
    """Of its own, so that sampling draws what it would have drawn."""
    return torch.Generator(like.device).manual_seed(seed)


def _noise(like: Tensor, seed: int = 0, count: int = TRIALS) -> list[Tensor]:
    """Random tensors of the same shape, strides, dtype and device; large ones reach what clamps, if any."""
    draws = _generator(like, seed)
    noises = (
        torch.randn(like.shape, dtype=torch.float32, device=like.device, generator=draws)
        for _ in range(count)
    )
    return [torch.empty_like(like).copy_(noise * 8.0 ** (n % TRIALS - 1)) for n, noise in enumerate(noises)]


def _every_number(like: Tensor) -> Tensor:
    """Every finite number of a dtype of 16 bits; of float32 as many, evenly spread."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int64, device=like.device)
    if like.dtype == torch.float32:
        low = torch.randint(
            1 << 16, bits.shape, dtype=torch.int64, device=like.device, generator=_generator(like)
        )
        numbers = ((bits << 16) + low).to(torch.int32).view(like.dtype)
    else:
        numbers = bits.to(torch.int16).view(like.dtype)
    return numbers[numbers.isfinite()]
