"""Products whose result a model adds to another tensor at once: one launch gives the sum.

The addition is in the model's own code. So a product that is not computed yet is returned as a tensor without
values, and the next function of PyTorch that this thread calls decides: if it adds that tensor, the kernel
computes the sum; whatever else it is, the values are computed before it runs.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quantpress.kernels.joined.linear_launches import Weights, linear

ADDITIONS = (torch.Tensor.add, torch.add)


class ResidualSums(TorchFunctionMode):
    """While inside, the products of layers that a model adds at once wait for that addition."""

    def __init__(self) -> None:
        super().__init__()
        self._layers: WeakSet[nn.Module] = WeakSet()
        self._followed: tuple[Tensor, nn.Module] | None = None
        self._waiting: tuple[Tensor, Tensor, Weights] | None = None

    def follow(self, layer: nn.Module, output: Tensor) -> None:
        """See whether the next function adds the output of a layer; then `product` may wait."""
        self._followed = output, layer

    def product(self, layer: nn.Module, x: Tensor, weights: Weights) -> Tensor:
        """What a layer gives; without values until the next function, if it was added at once before."""
        if layer not in self._layers:
            return linear(x, [weights])[0]
        output = torch.empty(*x.shape[:-1], weights[0].shape[0], dtype=x.dtype, device=x.device)
        self._waiting = output, x, weights
        return output

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if self._followed is not None:
            (output, layer), self._followed = self._followed, None
            if _added_to(output, func, args, kwargs) is not None:
                self._layers.add(layer)
        if self._waiting is not None:
            (output, x, weights), self._waiting = self._waiting, None
            addend = _added_to(output, func, args, kwargs)
            if addend is not None:
                return linear(x, [weights], addend)[0]
            linear(x, [weights], out=output)
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        if self._waiting is not None:
            (output, x, weights), self._waiting = self._waiting, None
            linear(x, [weights], out=output)
        self._followed = None
        super().__exit__(*error)


def _added_to(output: Tensor, func: Callable[..., Any], args: Any, kwargs: Any) -> Tensor | None:
    """What is added to a tensor, if a call adds one of its shape and dtype, and does nothing else."""
    if func not in ADDITIONS or kwargs or len(args) != 2 or (args[0] is output) == (args[1] is output):
        return None
    other = args[1] if args[0] is output else args[0]
    alike = type(other) is Tensor and other.shape == output.shape and other.dtype == output.dtype
    return other if alike and other.device == output.device and other.is_contiguous() else None
