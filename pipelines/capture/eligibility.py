"""Which decode steps can be captured as a CUDA graph: every rule, and the reasons they give against a step.

Rules are data: `why_not` goes through them, and the table in docs/limits.md is written from them.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Literal

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from quantpress.cache.attention.causal import left_padding
from quantpress.cache.fixed.fixable import CACHE_RULES
from quantpress.cache.layer import PackedLayer
from quantpress.cache.ranks import ranks_of
from quantpress.cache.tokens.evicted_slots import named_to_hide
from quantpress.errors import InvalidInputError
from quantpress.presses.base_press import BasePress
from quantpress.presses.models.attention import attention_modules, in_chunks
from quantpress.presses.models.eligibility import unreadable
from quantpress.presses.traits import decode_time_presses, renumbers_positions
from quantpress.rule import Found, Rule

JoinKernels = bool | Literal["exact"]
"""Which kernels of ours a graph has in place of PyTorch's: all, those equal to the last bit, or none; see
`captured_decoding`."""

TOKEN_BY_TOKEN = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
"""Ways of decoding in which each step adds one token to the last."""

OUTPUTS_OF_LAYERS = ("output_attentions", "output_hidden_states", "output_router_logits")
"""Options of a model's configuration by which its forward returns tensors of every layer."""

_KNOWN_HOOKS = ("transformers.integrations.tensor_parallel", "transformers.utils.output_capturing")

MOST_CHANGES = 3
"""Steps in a row that may find the cache changed since the step before."""


def _off_cuda(device: torch.device) -> Found:
    return device.type != "cuda" and {"device": device}


def _decode_time_press(press: BasePress) -> Found:
    acting = decode_time_presses(press)
    return {"press": type(acting[0]).__name__} if acting else None


def _is_beam_search(mode: GenerationMode) -> bool:
    return "beam" in mode.value


def _other_mode(mode: GenerationMode) -> Found:
    known = mode in (*TOKEN_BY_TOKEN, GenerationMode.ASSISTED_GENERATION) or _is_beam_search(mode)
    return None if known else {"mode": mode.value}


def _is_spread(model: PreTrainedModel) -> bool:
    devices = {tensor.device for tensor in chain(model.parameters(), model.buffers())}
    return len(devices) > 1 or len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1


def _shared_without_nccl(model: PreTrainedModel) -> Found:
    ranks = ranks_of(model)
    return None if ranks is None or ranks.backend == "nccl" else {"backend": ranks.backend}


def _uneven_heads(shared: tuple[PreTrainedModel, Cache]) -> bool:
    """Whether heads of processes grow at different steps: all have to capture the same ones."""
    ranks, layers = ranks_of(shared[0]), getattr(shared[1], "layers", ())
    uneven = (isinstance(one, PackedLayer) and one.tokens and one.tokens.heads is not None for one in layers)
    return ranks is not None and ranks.split_heads and any(uneven)


def _unreadable(model: PreTrainedModel) -> Found:
    reason = unreadable(model)
    return None if reason is None else {"what keeps attention from reading packed layers": reason}


def _hooked(model: PreTrainedModel) -> Found:
    """The first module inside the model with a hook that would do something to a single token."""
    for name, module in model.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        owners = (getattr(hook, "func", hook) for hook in hooks)
        if module is not model and not all(map(_is_idle, owners)):
            return {"module": name}
    return None


def _is_idle(hook: object) -> bool:
    """Our hooks, and those of transformers that a graph holds or that a single token does not need.

    Those of tensor parallelism are collectives. Those of `output_capturing` are left where hidden states of
    all layers were once asked for.
    """
    module = str(getattr(hook, "__module__", ""))
    return module.startswith("quantpress.") or module in _KNOWN_HOOKS


def _outputs_of_layers(model: PreTrainedModel) -> Found:
    asked = [name for name in OUTPUTS_OF_LAYERS if getattr(model.config, name, False)]
    return {"option": asked[0]} if asked else None


def _masks_slots(model: nn.Module) -> bool:
    return any(named_to_hide(module) is not None for module in attention_modules(model))


def _holds_others(padded: tuple[torch.Tensor, Cache]) -> Found:
    """The first layer whose tokens before the newest are not those of the mask, one after the other."""
    tokens = padded[0].shape[1] - 1
    layers = enumerate(getattr(padded[1], "layers", ()))
    index = next((index for index, layer in layers if not _holds_all(layer, tokens)), None)
    return None if index is None else {"layer": index}


def _holds_all(layer: object, tokens: int) -> bool:
    if not isinstance(layer, PackedLayer):
        return False
    if layer.fixed is not None:
        return len(layer.fixed) == tokens and layer.fixed.in_order
    held = layer.tokens
    return held is not None and len(held) == tokens and held.heads is None and held.demoted is None


RULES: dict[str, tuple[Rule, ...]] = {
    "device": (Rule("the model is on {device}", _off_cuda),),
    "press": (Rule("{press} acts during decoding", _decode_time_press),),
    "mode": (
        Rule("beams reorder the cache between tokens", _is_beam_search),
        Rule(
            "assisted decoding checks several tokens at once",
            lambda mode: mode == GenerationMode.ASSISTED_GENERATION,
        ),
        Rule("{mode} does not decode one token after the other", _other_mode),
    ),
    "model": (
        Rule("the model is spread over several devices, or offloaded", _is_spread),
        Rule(
            "processes share the model (tp_plan) over {backend}, and a graph holds collectives of NCCL only",
            _shared_without_nccl,
        ),
        Rule("the model is in training mode", lambda model: model.training),
        Rule("{what keeps attention from reading packed layers}", _unreadable),
        Rule("attention looks back over chunks", lambda model: any(map(in_chunks, attention_modules(model)))),
        Rule("{module} has a forward hook, which a replay would not run", _hooked),
        Rule("config.{option} asks for tensors of every layer", _outputs_of_layers),
        Rule("a head-wise press masks tokens instead of removing them", _masks_slots),
    ),
    "cache": CACHE_RULES,
    "shared": (
        Rule(
            "heads keep different numbers of tokens, and processes that share the model would capture "
            "different steps",
            _uneven_heads,
        ),
    ),
    "changes": (
        Rule(
            "the cache is changed between tokens, as beam search does",
            lambda changes: changes >= MOST_CHANGES,
        ),
    ),
    "compiled_under": (
        Rule(
            "the model is enabled with {press}, which numbers positions anew, and a compiled step would not "
            "see them (call disable(model) and read under the press instead)",
            lambda press: renumbers_positions(press) and {"press": repr(press)},
        ),
    ),
    "mask": (
        Rule(
            "the attention mask hides more than padding on the left",
            lambda mask: mask.dim() != 2 or left_padding(mask, 1, mask.shape[1]) is None,
            lasting=False,
        ),
    ),
    "padded": (
        Rule(
            "the batch is padded, and layer {layer} of the cache is not packed, was evicted from, or holds "
            "demoted tokens",
            _holds_others,
            lasting=False,
        ),
    ),
    "gradients": (Rule("gradients are recorded", bool, lasting=False),),
    "others_sample": (Rule("another thread's call of generate samples", bool, lasting=False),),
}
"""Every rule, by the argument of `why_not` that it looks at."""


def why_not(
    *,
    device: torch.device | None = None,
    press: BasePress | None = None,
    mode: GenerationMode | None = None,
    model: PreTrainedModel | None = None,
    cache: Cache | None = None,
    shared: tuple[PreTrainedModel, Cache] | None = None,
    changes: int = 0,
    compiled_under: BasePress | None = None,
    mask: torch.Tensor | None = None,
    padded: tuple[torch.Tensor, Cache] | None = None,
    gradients: bool = False,
    others_sample: bool = False,
    lasting: bool = False,
) -> list[str]:
    """Every reason why a decode step cannot be captured, as far as is known; what is not given is not judged.

    Args:
        device: the device that the graph would run on.
        press: the press that is on the model while it decodes.
        mode: the way of decoding; see `GenerationConfig.get_generation_mode`.
        model: the model, as it is now: its devices, attention and hooks.
        cache: the cache that the step reads and extends, as it is now.
        shared: the model and the cache: what processes that share the model would do differently.
        changes: how many steps in a row found that the cache was changed since the step before.
        compiled_under: the press of an enabled model whose steps are to be compiled.
        mask: the step's attention mask, [B, T] of 0 and 1. Reading it waits for the device.
        padded: a mask with padding on the left, and the cache, as it is before the step.
        gradients: whether the step records gradients.
        others_sample: whether another call of `generate` on the model may draw random numbers meanwhile.
        lasting: leave out reasons that may go away with a later token.

    Returns:
        The reasons, without full stops; empty if nothing known is against it.

    Example:
        >>> why_not(device=torch.device("cpu"), mode=GenerationMode.BEAM_SEARCH)
        ['the model is on cpu', 'beams reorder the cache between tokens']
    """
    given = {
        "device": device,
        "press": press,
        "mode": mode,
        "model": model,
        "cache": cache,
        "shared": shared,
        "changes": changes,
        "compiled_under": compiled_under,
        "mask": mask,
        "padded": padded,
        "gradients": gradients,
        "others_sample": others_sample,
    }
    rules = (
        (rule, subject)
        for name, subject in given.items()
        if subject is not None
        for rule in RULES[name]
        if rule.lasting or not lasting
    )
    reasons = (rule.reason(subject) for rule, subject in rules)
    return [reason for reason in reasons if reason is not None]


def refuse(reasons: Sequence[str], cuda_graph: bool | None, compile: bool = False) -> None:
    """Refuse an argument that asks for what the reasons of `why_not` rule out.

    Raises:
        InvalidInputError: there is a reason, and cuda_graph or compile is True.
    """
    if reasons and (cuda_graph or compile):
        asked = "cuda_graph" if cuda_graph else "compile"
        raise InvalidInputError(f"{asked}=True, but {', and '.join(reasons)}; leave {asked} out")


def check_choice(cuda_graph: bool | None, compile: bool = False, join_kernels: JoinKernels = True) -> None:
    """Refuse values that are not a choice.

    Raises:
        InvalidInputError: cuda_graph is not True, False or None, compile is not a bool, or join_kernels is
            neither a bool nor "exact".
    """
    if cuda_graph is not None and not isinstance(cuda_graph, bool):
        raise InvalidInputError(f"cuda_graph is {cuda_graph!r}; give True, False or None")
    if not isinstance(compile, bool):
        raise InvalidInputError(f"compile is {compile!r}; give True or False")
    if not isinstance(join_kernels, bool) and join_kernels != "exact":
        raise InvalidInputError(f'join_kernels is {join_kernels!r}; give True, "exact" or False')
