"""How much packing the keys, or the values, of each layer changes a model's predictions: an estimate.

A context is read once, and packed at every width. The text that follows is predicted over the *exact*
context, and labels are drawn from these predictions. Let g be the gradient of the log-likelihood of the
labels by a key or value of the context, and e the error of its code. The divergence of the predictions is, to
second order,

    KL = E[(sum g.e)^2] / 2,

the Fisher information along the error. The sum runs over the tokens of a KV head; heads are taken to be
independent, which leaves less noise. So no model runs with packed layers: one pass measures every layer and
every width, with the errors that its codes really have.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import isfinite
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from quantpress.cache import LayerSettings, PackedLayer, host
from quantpress.cache.saved.width_plan import Error
from quantpress.errors import NonFiniteError, UnsupportedModelError
from quantpress.evaluation.divergence.documents import Document
from quantpress.evaluation.divergence.teacher_forcing import float32_logits
from quantpress.pipelines.reading.chunked_prefill import backbone
from quantpress.pipelines.rollback import model_rollback
from quantpress.presses.models.attention import hooked
from quantpress.presses.packing.pack_layers import Packer
from quantpress.presses.packing.prefill_hook import PrefillCall, prefill_call
from quantpress.presses.packing.token_order import Survivors
from quantpress.presses.turboquant import TurboQuant

SAMPLES = 8
"""Labels that are drawn for each token, each of which takes a backward pass over the continuation."""

Sides = tuple[torch.Tensor, torch.Tensor]
LayerErrors = tuple[dict[int, Error], dict[int, Error]]


def one_pass(
    model: PreTrainedModel,
    document: Document,
    press: TurboQuant,
    widths: tuple[int, ...],
    samples: int = SAMPLES,
    step: Callable[[], Any] = lambda: None,
) -> dict[int, LayerErrors]:
    """Estimate the divergence that each layer's keys, and its values, add at each width.

    Args:
        model: decoder-only, in evaluation mode.
        document: a context, which is packed, and a continuation, which is predicted over it.
        press: windows, rotation and all else but the widths.
        widths: the widths to try, each 1, 2, 3, 4 or 8.
        samples: labels that are drawn for each token.
        step: called `steps_of` times, as the work goes on.

    Returns:
        For each packed layer, the mean KL in nats a token when its keys alone have a width, and its values;
        by width, one number for each KV head, whose sum is that of the layer.

    Raises:
        UnsupportedModelError: layers keep states beside tokens, through which no gradient is taken.
        NonFiniteError: the gradients hold NaN or infinity.
    """
    ids = document.ids[None].to(model.device)
    cache, layers = host.empty_cache(model), _EveryWidth(press, widths)
    with torch.no_grad(), model_rollback(model):
        press.prepare(model)
        with hooked(model, layers.measure):
            decoder = backbone(model)
            decoder(input_ids=ids[:, : document.context], **{host.cache_name(decoder): cache})
    step()
    counted = 2 * samples * (ids.shape[1] - document.context - 1)
    found: dict[int, LayerErrors] = {index: ({}, {}) for index in layers.exact}
    gradients = []
    for one in _gradients(model, cache, ids, document.context, layers.exact, samples):
        gradients.append(one)
        step()
    for index, bits, side, error in layers.errors():
        products = [
            (one[index][side].float() * error.float()).sum(dim=(0, 2, 3)) for one in gradients
        ]  # [Hkv]
        heads = (torch.stack(products).square().sum(0) / counted).tolist()
        if not all(map(isfinite, heads)):
            raise NonFiniteError("the gradients are not finite; load the model in bfloat16 or float32")
        found[index][side][bits] = tuple(heads)
    return found


def steps_of(samples: int = SAMPLES) -> int:
    """How often `one_pass` calls `step` for a document."""
    return 1 + samples


class _EveryWidth(Packer):
    """Packs each layer of a prefill at every width, and leaves it in the cache as it was.

    Only the order of its tokens changes, as it does where sinks are detected.

    Args:
        press: says how each layer is stored.
        widths: the widths.

    Attributes:
        exact: keys and values of each layer, whose gradients are taken.
        packed: the same at each width, by layer index.
    """

    def __init__(self, press: TurboQuant, widths: tuple[int, ...]) -> None:
        super().__init__(press)
        self.presses = {bits: replace(press, bits=bits) for bits in widths}
        self.exact: dict[int, Sides] = {}
        self.packed: dict[int, dict[int, PackedLayer]] = {}

    def measure(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook: pack this layer."""
        call = prefill_call(module, args, kwargs)
        if call is not None:
            self._pack(call)

    def _packed(
        self, call: PrefillCall, tokens: Survivors, settings: LayerSettings, moment: torch.Tensor | None
    ) -> Any:
        replaced: Any = call.cache.layers[call.layer_idx]
        if host.linear_states(replaced):
            raise UnsupportedModelError(
                f"layer {call.layer_idx} keeps a state beside its tokens, through which no gradient is "
                "taken; give widths by bits= and layer_bits="
            )
        sides, index = (tokens.keys.detach(), tokens.values.detach()), call.layer_idx
        key_dim, value_dim = (side.shape[-1] for side in sides)
        for bits, press in self.presses.items():
            own = press.layer_settings(call.module, key_dim, value_dim, settings.sink_tokens)
            if own is not None:
                packed = PackedLayer.from_states(*sides, own, query_moment=moment)
                self.packed.setdefault(index, {})[bits] = packed
        replaced.keys, replaced.values = (side.requires_grad_() for side in sides)
        self.exact[index] = (replaced.keys, replaced.values)
        return replaced

    @torch.no_grad()
    def errors(self) -> Iterator[tuple[int, int, int, torch.Tensor]]:
        """Yield layer index, width, side (0: keys, 1: values) and the error of the code [1, Hkv, T, D]."""
        for index, by_width in self.packed.items():
            for bits, layer in by_width.items():
                packed: Any = (layer.keys, layer.values)
                for side, exact in enumerate(self.exact[index]):
                    yield index, bits, side, packed[side].clone() - exact


def _gradients(
    model: PreTrainedModel,
    cache: Cache,
    ids: torch.Tensor,
    context: int,
    leaves: dict[int, Sides],
    samples: int,
) -> Iterator[dict[int, Sides]]:
    """Yield, for each draw of labels, the gradients by the keys and values of each layer."""
    fed = ids[:, context:-1]
    positions = torch.arange(context, ids.shape[1] - 1, device=ids.device)[None]
    generator = torch.Generator(ids.device).manual_seed(0)
    with torch.enable_grad(), float32_logits(model):
        named = {host.cache_name(model): cache}
        logits = model(input_ids=fed, position_ids=positions, **named).logits
        log_probs = logits[0].float().log_softmax(-1)  # [n, V]
        chances = log_probs.detach().exp()
        labels = torch.multinomial(chances, samples, replacement=True, generator=generator)  # [n, samples]
        flat = [side for both in leaves.values() for side in both]
        for sample in range(samples):
            likelihood = log_probs.gather(-1, labels[:, sample : sample + 1]).sum()
            found = torch.autograd.grad(likelihood, flat, retain_graph=sample + 1 < samples)
            yield {index: (found[2 * i], found[2 * i + 1]) for i, index in enumerate(leaves)}
