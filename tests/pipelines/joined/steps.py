"""What the tests of joined steps share: a step of a tiny model, and one through kernels."""

from contextlib import AbstractContextManager, nullcontext

import torch
from transformers import DynamicCache, PreTrainedModel

from quantpress.pipelines.joined.step import JoinedStep
from tests.tiny_models import prompt

LAYERS = 3


def step(model: PreTrainedModel, inside: AbstractContextManager[None] | None = None) -> torch.Tensor:
    """One token after ten, which are read before."""
    cache = DynamicCache()
    with torch.no_grad():
        model(prompt(10), past_key_values=cache)
        with inside or nullcontext():
            logits: torch.Tensor = model(prompt(1, seed=1), past_key_values=cache).logits
    return logits


def joined(
    model: PreTrainedModel, products: bool = True, launched: list[str] | None = None
) -> tuple[torch.Tensor, dict[str, int]]:
    """A step through what was proven in the one before, whose launches are not left in `launched`."""
    joins = JoinedStep(model, model.forward, products)
    step(model, joins.watching())
    if launched is not None:
        launched.clear()
    logits = step(model, joins.joining())
    assert not [module for module in model.modules() if "forward" in vars(module)]
    return logits, joins.joined
