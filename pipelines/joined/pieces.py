"""Norms, feed-forwards and rotary positions of a model, and all of its pieces.

Kernels for these give what the model's own code gives, to the last bit. Only products of weights, and so a
feed-forward that has them in its kernel, are held to another rule; see `products`.
"""

import inspect
from collections.abc import Callable, Hashable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from quantpress.kernels.joined.launches import TOKENS, rms_norm, rotary, silu_product
from quantpress.kernels.joined.linear_launches import Weights, gated_linear
from quantpress.kernels.joined.order import adding_orders
from quantpress.kernels.joined.reference import NORM_FORMS
from quantpress.pipelines.joined.piece import (
    MANY_ROWS,
    PROVEN,
    TRIALS,
    Choice,
    JoinedPiece,
    Many,
    code_of,
    forward_of,
    own_generator,
    plain,
    same_bits,
    trial_inputs,
    unchanged,
)
from quantpress.pipelines.joined.products import (
    Product,
    SharedInput,
    call_of,
    checked_channels,
    exact_linear,
    no_less_exact,
    weights_of,
)
from quantpress.pipelines.joined.residual_sums import ResidualSums
from quantpress.pipelines.joined.seams import Named, function_in
from quantpress.presses.models.attention import attention_modules

ORDER_ROWS = 256
"""Random rows in float32 on which the order is proven in which a class of norms adds. Of the orders of
`adding_orders`, a wrong one shows in a tenth of them."""

MOST_ROWS_AT_ONCE = 65535
"""Rows of one launch of `silu_product`."""

MOST_TOKENS = 65535 * TOKENS
"""Tokens of one launch of `rotary`."""

ROTARY = "apply_rotary_pos_emb"
"""The name by which attention of transformers calls rotary positions."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
"""Layers of attention with the same input."""

ACTIVATION, WITH_PRODUCTS = "activation", "with products"
"""Which part of a feed-forward one kernel computes: all but its products of weights, or all but the last."""


class Norm(JoinedPiece):
    """An RMSNorm: a module with one weight and an epsilon."""

    kind = "norms"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(forward_of(module), module)
        self._module: Any = module
        self._eps = _eps_of(module)

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether a module may be one."""
        if not _eps_of(module) or any(module.children()):
            return False
        weights = dict(module.named_parameters())
        alone = set(weights) == {"weight"} and not [*module.buffers()] and plain(weights["weight"])
        return alone and weights["weight"].dim() == 1

    def kind_of_call(self, *args: Any) -> tuple[Any, ...] | None:
        x, weight = args[0], self._module.weight
        if len(args) != 1 or not plain(x) or not x.is_contiguous() or x.data_ptr() % 16 or not x.numel():
            return None
        fits = x.shape[-1] == weight.shape[0] and weight.is_contiguous() and x.shape[-1] % 4 == 0
        aligned = weight.data_ptr() % 16 == 0
        kinds = x.dtype, weight.dtype, aligned, self._eps, self.code
        return (x.device, x.shape, *kinds) if fits else None

    def prove(self, own: Callable[..., Any], output: Any, *args: Any) -> Choice:
        x, of_class = args[0], PROVEN.setdefault(type(self._module), {})
        call, rows = self.kind_of_call(*args), x.numel() // x.shape[-1]
        known = of_class.get(call)
        count = TRIALS if known else max(TRIALS, -(-ORDER_ROWS // rows))
        noises = [*trial_inputs(x.float(), count=count), *trial_inputs(x)]
        trials = [(x, output), *((noise, own(noise)) for noise in noises)]
        for choice in [known] if known else product(NORM_FORMS, adding_orders(rows, x.shape[-1])):
            if all(same_bits(self.join(choice, one), expected) for one, expected in trials):
                of_class[call] = choice
                return choice
        return None

    def kind_of_many(self, *args: Any) -> Hashable:
        call = self.kind_of_call(*args)
        if call is None or args[0].numel() < MANY_ROWS * args[0].shape[-1]:
            return None
        device, shape, *others = call
        return (device, shape[-1], *others)

    def prove_many(self, own: Callable[..., Any], output: Any, *args: Any) -> Choice:
        x, of_class = args[0], PROVEN.setdefault(type(self._module), {})
        call = Many(self.kind_of_many(x))
        if call not in of_class:
            some = x.reshape(1, -1, x.shape[-1])[:, :MANY_ROWS]
            of_class[call] = self.prove(own, own(some), some)
        choice = of_class[call]
        return choice if choice and same_bits(self.join(choice, x), output) else None

    def join(self, choice: Choice, *args: Any) -> Any:
        form, order = choice
        return rms_norm(args[0], self._module.weight, self._eps, form, order)


class GatedProduct(JoinedPiece):
    """A feed-forward in which SiLU of one projection gates another; both may be halves of one projection.

    Args:
        module: the feed-forward.
        sums: as for `Product`; None: no kernel computes the projections.
    """

    kind = "activations"

    def __init__(self, module: nn.Module, sums: ResidualSums | None) -> None:
        super().__init__(forward_of(module), module)
        self._module: Any = module
        parts = dict(module.named_children())
        self._act: Any = parts.get("act_fn") or parts["activation_fn"]
        self._layers = () if sums is None else _gate_and_up(parts)
        self._sums = sums

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether a module may be one."""
        parts = dict(module.named_children())
        apart = parts.keys() >= {"gate_proj", "up_proj", "down_proj", "act_fn"}
        together = parts.keys() >= {"gate_up_proj", "down_proj", "activation_fn"}
        return (apart or together) and unchanged(parts["act_fn" if apart else "activation_fn"])

    def watch(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = super().watch(own, *args, **kwargs)
        if self._sums is not None:
            self._sums.follow(self._module.down_proj, output)
        return output

    def kind_of_call(self, *args: Any) -> Hashable:
        x = args[0]
        fits = len(args) == 1 and plain(x) and x.numel()
        products = call_of(args, self._layers) if fits and self._layers else None
        return (x.device, x.shape, x.dtype, products, *self._codes()) if fits else None

    def prove(self, own: Callable[..., Any], output: Any, *args: Any) -> Choice:
        if not self._gates_every_number(args[0]):
            return None
        trials = [(args[0], output), *((noise, own(noise)) for noise in trial_inputs(args[0]))]
        if not all(same_bits(self.join(ACTIVATION, x), expected) for x, expected in trials):
            return None
        together = self._layers and call_of(args, self._layers) is not None
        inputs = [args[0], *trial_inputs(args[0], count=2)]
        return WITH_PRODUCTS if together and all(map(self._products_are_right, inputs)) else ACTIVATION

    def kind_of_many(self, *args: Any) -> Hashable:
        x = args[0]
        fits = len(args) == 1 and plain(x) and MANY_ROWS <= x.numel() // x.shape[-1] <= MOST_ROWS_AT_ONCE
        return (x.device, x.shape[-1], x.dtype, *self._codes()) if fits else None

    def prove_many(self, own: Callable[..., Any], output: Any, *args: Any) -> Choice:
        x = args[0]
        noises = trial_inputs(x.reshape(1, -1, x.shape[-1])[:, :MANY_ROWS])
        right = self._gates_every_number(x) and same_bits(self.join(ACTIVATION, x), output)
        right = right and all(same_bits(self.join(ACTIVATION, one), own(one)) for one in noises)
        return ACTIVATION if right else None

    def _codes(self) -> tuple[Any, ...]:
        """What may be replaced behind the same module, and whether it drops channels out."""
        return self.code, type(self._act), code_of(self._act.forward), self._module.training

    def _gates_every_number(self, like: Tensor) -> bool:
        gate = _every_number(like)
        up = torch.randn(gate.shape, dtype=torch.float32, device=gate.device, generator=own_generator(gate))
        up = up.to(gate.dtype)
        return same_bits(silu_product(gate, up), self._act(gate) * up)

    def _products_are_right(self, x: Tensor) -> bool:
        gate, up = self._gate_and_up(x)
        channels = checked_channels(gate)
        exact_gate, exact_up = (exact_linear(x, layer, channels) for layer in self._layers)
        ours = gated_linear(x, self._layers)
        return no_less_exact(ours, self._act(gate) * up, silu(exact_gate) * exact_up, channels)

    def join(self, choice: Choice, *args: Any) -> Any:
        if choice == WITH_PRODUCTS:
            return self._module.down_proj(gated_linear(args[0], self._layers))
        return self._module.down_proj(silu_product(*self._gate_and_up(args[0])))

    def _gate_and_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        module = self._module
        if hasattr(module, "gate_up_proj"):
            gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
            return gate, up
        return module.gate_proj(x).contiguous(), module.up_proj(x).contiguous()


class Rotary(JoinedPiece):
    """Rotary positions of queries and keys, a function of a Python module."""

    kind = "rotary positions"

    def __init__(self, named: Named) -> None:
        super().__init__(named, named.function)

    def kind_of_call(self, *args: Any) -> Hashable:
        return (args[0].device, *(one.shape for one in args), args[0].dtype) if _turns(args, 1) else None

    def prove(self, own: Callable[..., Any], output: Any, *args: Any) -> Choice:
        trials = [(args, output)]
        for noises in zip(*map(trial_inputs, args, range(4)), strict=True):
            trials.append((noises, own(*noises)))
        for inputs, expected in trials:
            if not all(map(same_bits, self.join(True, *inputs), expected)):
                return None
        return True

    def kind_of_many(self, *args: Any) -> Hashable:
        tokens = args[0].shape[2] if len(args) == 4 and args[0].dim() == 4 else 0
        if not MANY_ROWS <= tokens <= MOST_TOKENS or not _turns(args, tokens):
            return None
        orders = (sorted(range(4), key=one.stride().__getitem__) for one in args[:2])
        return (args[0].device, args[0].shape[-1], args[0].dtype, *map(tuple, orders))

    def prove_many(self, own: Callable[..., Any], output: Any, *args: Any) -> Choice:
        found = self.join(True, *args)
        alike = all(one.stride() == other.stride() for one, other in zip(found, output, strict=True))
        some = [one[..., :MANY_ROWS, :] for one in args]
        right = alike and all(map(same_bits, found, output))
        return True if right and self.prove(own, own(*some), *some) else None

    def join(self, choice: Choice, *args: Any) -> Any:
        q, k, cos, sin = args
        return rotary(q, k, cos, sin)


def _turns(args: tuple[Any, ...], tokens: int) -> bool:
    """Whether the kernel takes queries, keys, cosines and sines of so many tokens."""
    if len(args) != 4 or not all(map(plain, args)):
        return False
    q, k, cos, sin = args
    dim = q.shape[-1]
    if (q.dim(), k.dim(), cos.dim()) != (4, 4, 3) or dim % 2 or cos.shape[0] not in (1, q.shape[0]):
        return False
    fits = q.shape[2] == k.shape[2] == tokens and q.shape[0] == k.shape[0] and k.shape[-1] == dim
    fits = fits and cos.shape == sin.shape and cos.shape[1:] == (tokens, dim)
    fits = fits and all(one.stride(-1) == 1 and one.data_ptr() % 16 == 0 for one in args)
    return fits and len({one.dtype for one in args}) == 1


def pieces_of(model: nn.Module, sums: ResidualSums | None) -> Iterator[JoinedPiece]:
    """Every piece of a model that a kernel may stand in for.

    A module with a hook, or whose forward was replaced already, is left alone.

    Args:
        model: the model.
        sums: what linear layers hand their products to; None: they are not among the pieces.
    """
    shared = {} if sums is None else dict(_shared_inputs(model))
    for module in filter(unchanged, model.modules()):
        if Norm.fits(module):
            yield Norm(module)
        elif GatedProduct.fits(module):
            yield GatedProduct(module, sums)
        elif sums is not None and Product.fits(module):
            yield Product(module, shared.get(module), sums)
    yield from map(Rotary, _rotary_functions(model))


def _shared_inputs(model: nn.Module) -> Iterator[tuple[nn.Module, SharedInput]]:
    """The projections of attention that one launch can compute, each with all of its own."""
    for attention in attention_modules(model):
        layers: list[Any] = [getattr(attention, name, None) for name in PROJECTIONS]
        fits = all(map(Product.fits, layers))
        if fits and len({(one.in_features, one.weight.dtype, one.bias is None) for one in layers}) == 1:
            shared = SharedInput(attention, layers)
            yield from ((layer, shared) for layer in layers)


def _gate_and_up(parts: dict[str, Any]) -> tuple[Weights, ...]:
    """Weights and biases of the projections of a feed-forward; none if there is no kernel for them."""
    if "gate_up_proj" in parts:
        one = parts["gate_up_proj"]
        if not Product.fits(one) or one.weight.shape[0] % 2:
            return ()
        halves = [() if part is None else part.chunk(2) for part in weights_of(one)]
        return tuple((halves[0][n], halves[1][n] if halves[1] else None) for n in range(2))
    layers = [parts[name] for name in ("gate_proj", "up_proj")]
    alike = all(map(Product.fits, layers)) and layers[0].weight.shape == layers[1].weight.shape
    return tuple(map(weights_of, layers)) if alike else ()


def _rotary_functions(model: nn.Module) -> list[Named]:
    """The functions that attention calls by the name `ROTARY`, once each."""
    namespaces = {}
    for module in attention_modules(model):
        namespace = getattr(inspect.unwrap(type(module).forward), "__globals__", {})
        namespaces[id(namespace)] = namespace
    found = ((namespace, function_in(namespace, ROTARY)) for namespace in namespaces.values())
    return [Named(namespace, ROTARY, own) for namespace, own in found if inspect.isfunction(own)]


def _eps_of(module: nn.Module) -> float:
    """The epsilon of a norm; 0 for modules without one."""
    named = (vars(module).get(name) for name in ("variance_epsilon", "eps"))
    return next((eps for eps in named if isinstance(eps, float)), 0.0)


def _every_number(like: Tensor) -> Tensor:
    """Every finite number of a dtype of 16 bits; of float32 as many, evenly spread."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int64, device=like.device)
    if like.dtype == torch.float32:
        low = torch.randint(
            1 << 16, bits.shape, dtype=torch.int64, device=like.device, generator=own_generator(like)
        )
        numbers = ((bits << 16) + low).to(torch.int32).view(like.dtype)
    else:
        numbers = bits.to(torch.int16).view(like.dtype)
    return numbers[numbers.isfinite()]
