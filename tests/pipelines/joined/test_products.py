"""Which linear layers of a step are joined, and what kernels are held to. The kernels are references."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from quantpress.kernels.joined import reference
from quantpress.kernels.joined.linear_launches import MOST_ROWS
from quantpress.pipelines.joined import pieces, products
from quantpress.pipelines.joined.products import SharedInput, no_less_exact, weights_of
from quantpress.pipelines.joined.residual_sums import ResidualSums
from quantpress.pipelines.joined.step import JoinedStep
from tests.pipelines.joined.steps import LAYERS, joined, step
from tests.tiny_models import prompt, tiny_model

OF_LAYER = 7


def sixteen_bits(family: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A tiny model of its own."""
    return copy.deepcopy(tiny_model(family)).to(dtype)


@pytest.mark.parametrize(
    ("family", "layers", "launches"),
    [
        ("llama", OF_LAYER * LAYERS + 1, (LAYERS + 1, 2 * LAYERS, LAYERS)),
        ("qwen2", OF_LAYER * LAYERS + 1, (LAYERS + 1, 2 * LAYERS, LAYERS)),  # biases
        ("phi3", 4 * LAYERS + 1, (3 * LAYERS + 1, 0, LAYERS)),  # a dropout before each addition
        ("gemma3", OF_LAYER * LAYERS + 1, (5 * LAYERS + 1, 0, 0)),  # norms there, and no SiLU
        ("gpt2", 1, (1, 0, 0)),  # layers of a class of its own
    ],
)
def test_what_is_joined(
    family: str, layers: int, launches: tuple[int, int, int], launched: list[str]
) -> None:
    """launches: of products alone, of those with a residual, and of gated ones."""
    model = sixteen_bits(family)
    logits, found = joined(model, launched=launched)
    assert tuple(map(launched.count, ("linear", "residual", "gated_linear"))) == launches
    assert torch.equal(logits, step(model)) and found["products"] == layers


def test_exact_leaves_products_alone(launched: list[str]) -> None:
    model = sixteen_bits("llama")
    joined(model)  # what was proven with products does not count without
    launched.clear()
    assert set(joined(model, products=False)[1]) == {"norms", "activations", "rotary positions"}
    assert "silu_product" in launched and not {"linear", "residual", "gated_linear"} & {*launched}


def test_proofs_end_with_the_forward_of_linear_layers(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, own = sixteen_bits("llama"), nn.Linear.forward
    joins = JoinedStep(model, model.forward)
    step(model, joins.watching())
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: own(self, x) * 2)
    launched.clear()
    assert torch.equal(step(model, joins.joining()), step(model))
    assert not {"linear", "residual", "gated_linear"} & {*launched} and "rms_norm" in launched


@pytest.mark.parametrize("batch", [MOST_ROWS, MOST_ROWS + 1])
def test_few_rows(batch: int, launched: list[str]) -> None:
    model = sixteen_bits("llama", torch.float16)
    joins = JoinedStep(model, model.forward)
    with torch.no_grad(), joins.watching():
        model(prompt(1, batch=batch))
    with torch.no_grad(), joins.joining():
        model(prompt(1, batch=batch))
    assert ("products" in joins.joined) == ("gated_linear" in launched) == (batch == MOST_ROWS)


@pytest.mark.parametrize("name", ["linear", "gated_linear"])
def test_a_product_with_a_larger_error_is_not_used(
    name: str, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = products if name == "linear" else pieces
    kernel: Callable[..., Any] = getattr(place, name)

    def less_exact(*args: Any) -> Any:
        outputs = kernel(*args)
        for one in outputs if name == "linear" else [outputs]:
            one.mul_(1.003)  # a bfloat16 has 8 bits
        return outputs

    monkeypatch.setattr(place, name, less_exact)
    model = sixteen_bits("llama")
    logits, found = joined(model)
    assert ("products" in found) == (name != "linear") and torch.equal(logits, step(model))


def test_one_wrong_output_is_far_apart() -> None:
    exact = torch.randn(1, 4096, dtype=torch.float64)
    own = exact.bfloat16()
    wrong = own.clone()
    wrong[0, 1] += 1
    channels = products.checked_channels(own)
    assert len(channels) == 1024 and 1 not in channels
    assert no_less_exact(own, own, exact[:, channels], channels)
    assert not no_less_exact(wrong, own, exact[:, channels], channels)


def test_layers_that_are_changed_stay_as_they_are(launched: list[str]) -> None:
    class Quantized(nn.Linear): ...

    model = sixteen_bits("llama")
    first = model.model.layers[0]
    first.self_attn.q_proj.__class__ = Quantized
    first.mlp.up_proj.register_forward_hook(lambda *args: None)
    assert joined(model, launched=launched)[1]["products"] == OF_LAYER * LAYERS + 1 - 2
    assert launched.count("gated_linear") == LAYERS - 1 and launched.count("residual") == 2 * LAYERS
    assert launched.count("linear") == 3 + (LAYERS - 1) + 1  # keys, values and the gate in the first layer


def test_layers_with_inputs_of_their_own_are_not_one_launch(launched: list[str]) -> None:
    owner, layers = nn.Module(), [nn.Linear(16, 8, dtype=torch.bfloat16) for _ in range(2)]
    shared, x = SharedInput(owner, layers), torch.randn(1, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        for layer, own in zip(layers, (x, x.clone()), strict=True):
            shared.watch(layer, own, layer(own))
        assert not shared.proven(x)
        for layer in layers:
            shared.watch(layer, x, layer(x))
        assert shared.proven(x) and not shared.proven(torch.cat([x, x]))
        launched.clear()
        expected = reference.linear_reference(x, [(one.weight, one.bias) for one in layers])
        assert all(map(torch.equal, [shared.output(one, x) for one in layers], expected))
    assert launched == ["linear"]


def test_a_product_waits_for_an_addition_only(launched: list[str]) -> None:
    layer, x = nn.Linear(16, 8, dtype=torch.bfloat16), torch.randn(1, 16, dtype=torch.bfloat16)
    weights, residual = weights_of(layer), torch.randn(1, 8, dtype=torch.bfloat16)
    sums = ResidualSums()
    with torch.no_grad(), sums:
        own = layer(x)
        sums.follow(layer, own)
        expected = residual + own
        assert torch.equal(sums.product(layer, x, weights) + residual, expected)
        assert launched == ["residual"]
        for other in (residual.float(), residual[0], torch.cat([residual] * 2)):
            assert torch.equal(sums.product(layer, x, weights) + other, own + other)
        got = sums.product(layer, x, weights)
        assert torch.equal(got + got, own + own)
        last = sums.product(layer, x, weights)
    assert torch.equal(last, own) and launched == ["residual", *["linear"] * 5]
