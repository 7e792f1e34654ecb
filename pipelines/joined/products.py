"""Linear layers over few rows, by kernels that add in an order of their own.

Such a result need not equal PyTorch's to the last bit. So the proof is another one: measured against float64,
on the weights of a layer, its error is no larger than that of PyTorch's product.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantpress.kernels.joined.linear_launches import MOST_ROWS, Weights, linear
from quantpress.pipelines.joined.piece import (
    PROVEN,
    Choice,
    JoinedPiece,
    forward_of,
    plain,
    trial_inputs,
    unchanged,
)
from quantpress.pipelines.joined.residual_sums import ResidualSums

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
CHANNELS = 1024
"""Outputs of a layer that a proof computes in float64, evenly spread, if the layer has more."""

EQUAL_ERROR = 1.1
"""Mean squared errors whose ratio is below this count as equal. Nearly all of an error is the rounding to 16
bits, which both share but where a sum lies between two numbers."""


def weights_of(module: Any) -> Weights:
    """Weight and bias of a linear layer."""
    return module.weight, module.bias


def checked_channels(like: Tensor) -> Tensor:
    """The outputs of [..., N] that are compared with float64, as indices."""
    count = like.shape[-1]
    spread = torch.linspace(0, count - 1, min(count, CHANNELS), dtype=torch.float64, device=like.device)
    return spread.to(torch.int64)


def exact_linear(x: Tensor, layer: Weights, channels: Tensor) -> Tensor:
    """Some outputs of a linear layer in float64."""
    weight, bias = layer
    found = x.double() @ weight[channels].double().T
    return found if bias is None else found + bias[channels].double()


def no_less_exact(ours: Tensor, own: Tensor, exact: Tensor, channels: Tensor) -> bool:
    """Whether the error of `ours` is at most that of `own`, and no output lies far from that of `own`.

    Args:
        ours: [..., N], by a kernel.
        own: [..., N], by PyTorch.
        exact: `own` in float64 at `channels`.
        channels: from `checked_channels`.
    """
    error, limit = (
        (one[..., channels].double() - exact).square().mean() * scale
        for one, scale in ((ours, 1.0), (own, EQUAL_ERROR))
    )
    apart = (ours.float() - own.float()).square().mean()
    return bool((error <= limit) & (apart <= 4 * limit))


class Product(JoinedPiece):
    """A linear layer of PyTorch's own class.

    Args:
        module: the layer.
        shared: the layers that get the same input, this one among them.
        sums: takes products that the model adds to something at once.
    """

    kind = "products"

    def __init__(self, module: nn.Module, shared: "SharedInput | None", sums: ResidualSums) -> None:
        super().__init__(forward_of(module), module)
        self._module, self._shared, self._sums = module, shared, sums

    @staticmethod
    def fits(module: nn.Module | None) -> bool:
        """Whether a module may be one. Quantized layers and the like are subclasses or wrappers."""
        if type(module) is not nn.Linear or not unchanged(module):
            return False
        weight, bias = module.weight, module.bias
        read = plain(weight) and weight.dtype in SIXTEEN_BITS and weight.is_contiguous()
        if bias is not None:
            read = read and plain(bias) and bias.dtype == weight.dtype and bias.is_contiguous()
        return read and weight.data_ptr() % 16 == 0 and weight.shape[1] % 8 == 0

    def kind_of_call(self, *args: Any) -> Hashable:
        return call_of(args, [weights_of(self._module)])

    def prove(self, own: Callable[..., Any], output: Any, *args: Any) -> Choice:
        known, call = PROVEN.setdefault(nn.Linear, {}), self.kind_of_call(*args)
        if call not in known:
            trials = [(args[0], output), *((x, own(x)) for x in trial_inputs(args[0], count=2))]
            known[call] = all(self._is_right(x, expected) for x, expected in trials) or None
        return known[call]

    def _is_right(self, x: Tensor, expected: Tensor) -> bool:
        channels, layer = checked_channels(expected), weights_of(self._module)
        return no_less_exact(linear(x, [layer])[0], expected, exact_linear(x, layer, channels), channels)

    def watch(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = super().watch(own, *args, **kwargs)
        if self._shared is not None and len(args) == 1 and not kwargs:
            self._shared.watch(self._module, args[0], output)
        self._sums.follow(self._module, output)
        return output

    def join(self, choice: Choice, *args: Any) -> Any:
        if self._shared is not None and self._shared.proven(args[0]):
            return self._shared.output(self._module, args[0])
        return self._sums.product(self._module, args[0], weights_of(self._module))


class SharedInput:
    """Layers that are called one after the other with the same tensor: one launch computes all of them.

    Args:
        owner: the module that calls them, with which the proof is kept.
        modules: up to three layers for which `Product.fits`, with as many columns, all with a bias or none.
    """

    def __init__(self, owner: nn.Module, modules: Sequence[nn.Module]) -> None:
        self._modules = tuple(modules)
        self._proven = PROVEN.setdefault(owner, {})
        self._x: Tensor | None = None
        self._outputs: dict[nn.Module, Tensor] = {}

    def watch(self, module: nn.Module, x: Tensor, output: Tensor) -> None:
        """Note a call of a layer; after the last one, prove the launch, unless their inputs differed."""
        if x is not self._x:
            self._x, self._outputs = x, {}
        self._outputs[module] = output
        if len(self._outputs) == len(self._modules):
            call = self._call(x)
            if call is not None and call not in self._proven:
                try:
                    self._proven[call] = self._is_right(x)
                except Exception:  # a kernel that does not compile
                    self._proven[call] = None
            self._x, self._outputs = None, {}

    def _is_right(self, x: Tensor) -> bool:
        layers = [weights_of(one) for one in self._modules]
        for ours, layer, module in zip(linear(x, layers), layers, self._modules, strict=True):
            own = self._outputs[module]
            channels = checked_channels(own)
            if not no_less_exact(ours, own, exact_linear(x, layer, channels), channels):
                return False
        return True

    def proven(self, x: Tensor) -> bool:
        """Whether the launch stands in for the layers at such an input."""
        return bool(self._proven.get(self._call(x)))

    def output(self, module: nn.Module, x: Tensor) -> Tensor:
        """What one layer gives: the first that asks has all of them computed."""
        if x is not self._x or module not in self._outputs:
            outputs = linear(x, [weights_of(one) for one in self._modules])
            self._x, self._outputs = x, dict(zip(self._modules, outputs, strict=True))
        found = self._outputs.pop(module)
        if not self._outputs:
            self._x = None
        return found

    def _call(self, x: Tensor) -> Hashable:
        return call_of((x,), [weights_of(one) for one in self._modules])


def call_of(args: Sequence[Any], layers: Sequence[Weights]) -> Hashable:
    """What a proof for a launch holds for: all but the numbers; None if it is not for the kernels."""
    x = args[0]
    if len(args) != 1 or not plain(x) or not x.is_contiguous() or x.data_ptr() % 16 or not x.numel():
        return None
    weights = [weight for weight, _ in layers]
    fits = all(
        x.dtype == one.dtype and x.device == one.device and x.shape[-1] == one.shape[1] for one in weights
    )
    if not fits or x.numel() > MOST_ROWS * x.shape[-1]:
        return None
    shapes = tuple((weight.shape, bias is not None) for weight, bias in layers)
    return x.device, x.shape, x.dtype, shapes, nn.Linear.forward  # which others may replace for all layers
