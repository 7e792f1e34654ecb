"""Processes that share a model (`tp_plan`) must take the same decisions, since each runs the whole program.

Their logits are the same. What else decides is compared, taken from the first process, or refused.
"""

import re

import torch
from torch import nn
from transformers import GenerationConfig

from quantpress.cache.ranks import ranks_of
from quantpress.errors import InvalidInputError

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of an object whose repr says no more


def check_same(model: nn.Module, **given: object) -> None:
    """Refuse, in all processes that share a model, what is not the same in all of them.

    Args:
        model: the model.
        given: values whose `repr` says what they are, by the names of the arguments.

    Raises:
        InvalidInputError: another process was given something else.
    """
    ranks = ranks_of(model)
    if ranks is None:
        return
    said = ranks.each({name: _ADDRESS.sub("", repr(value)) for name, value in given.items()})
    differing = [name for name in given if len({one[name] for one in said}) > 1]
    if differing:
        raise InvalidInputError(
            f"{', '.join(differing)}: different in the {ranks.count} processes that share the model; give "
            "every process the same"
        )


def check_clocks(model: nn.Module, config: GenerationConfig) -> None:
    """Refuse a limit of time for answers of several processes, which would end at different tokens.

    Raises:
        InvalidInputError: max_time is set.
    """
    ranks = ranks_of(model)
    if ranks is not None and config.max_time is not None:
        raise InvalidInputError(
            f"max_time is {config.max_time}, and the clocks of {ranks.count} processes that share the model "
            "would end their answers at different tokens; use max_new_tokens"
        )


def share_chance(model: nn.Module, config: GenerationConfig) -> None:
    """Let processes that share a model draw the random numbers of the first, if answers need any."""
    ranks = ranks_of(model)
    if ranks is None or not config.do_sample:
        return
    device = next(model.parameters()).device
    on_cuda = device.type == "cuda"
    state = torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_cuda else None
    host, cuda = ranks.each(state if ranks.first else None)[0]
    torch.set_rng_state(host)
    if on_cuda:
        torch.cuda.set_rng_state(cuda, device)
