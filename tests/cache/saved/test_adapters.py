"""A context belongs to the adapters that it was read under: the identity changes exactly when the keys do."""

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from quantpress.cache.saved.fingerprint import difference, model_fingerprint
from quantpress.cache.saved.weight_samples import SAMPLE
from quantpress.errors import CacheFileError, InvalidInputError
from quantpress.pipelines.contexts.cached_context import CachedContext
from quantpress.pipelines.text_generation import TextGenerationPipeline
from quantpress.presses import TurboQuant
from tests.pipelines.words import text, word_tokenizer
from tests.tiny_models import prompt, tiny_model
from tests.versions import NO_ADAPTERS


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=["k_proj", "v_proj"], init_lora_weights=False)


def adapted() -> tuple[PreTrainedModel, Any]:
    """A model with the adapters "one", which is active, and "two"; and the same as a `PeftModel`."""
    model = copy.deepcopy(tiny_model("llama"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrapped = get_peft_model(model, lora(), adapter_name="one")
        wrapped.add_adapter("two", lora())
    return model, wrapped.eval()


def keys(model: PreTrainedModel) -> torch.Tensor:
    cache = DynamicCache()
    with torch.no_grad():
        model(prompt(20), past_key_values=cache)
    return torch.stack([layer.keys for layer in cache.layers])


def _scaled(model: PreTrainedModel, scaling: float) -> None:
    for layer in model.model.layers:
        layer.self_attn.k_proj.scaling["one"] = scaling


@contextmanager
def other_state(name: str, model: PreTrainedModel, wrapped: Any) -> Iterator[None]:
    """The adapted model in another state, and back."""
    if name == "disabled":
        with wrapped.disable_adapter():
            yield
        return
    do: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "the same": (lambda: wrapped.set_adapter("one"), lambda: None),
        "switched": (lambda: wrapped.set_adapter("two"), lambda: wrapped.set_adapter("one")),
        "both": (lambda: wrapped.base_model.set_adapter(["one", "two"]), lambda: wrapped.set_adapter("one")),
        "scaled": (lambda: _scaled(model, 0.5), lambda: _scaled(model, 2.0)),
        "merged": (wrapped.merge_adapter, wrapped.unmerge_adapter),
        "another loaded": (
            lambda: wrapped.add_adapter("three", lora()),
            lambda: wrapped.delete_adapter("three"),
        ),
    }
    do[name][0]()
    try:
        yield
    finally:
        do[name][1]()


STATES = {
    "the same": None,
    "another loaded": None,
    "switched": '"one" then, "two" now',
    "both": '"one" then, "one", "two" now',
    "disabled": '"one" then, none now',
    "scaled": "scaling .* was 2.0, is 0.5, 2.0",
    "merged": r'"one" then, "one" \(merged\) now',
}


@pytest.mark.parametrize("state", STATES)
def test_a_context_belongs_to_its_adapters(state: str, tmp_path: Path) -> None:
    model, wrapped = adapted()
    pipe = TextGenerationPipeline(model=model, tokenizer=word_tokenizer())
    context, before, reason = pipe.read(text(200), press=TurboQuant(4)), keys(model), STATES[state]
    context.save(file := tmp_path / "context.safetensors")
    expected = pipe(context, question="w1", max_new_tokens=4)
    with other_state(state, model, wrapped):
        assert torch.equal(keys(model), before) == (reason is None)
        if reason is None:
            assert pipe(context, question="w1", max_new_tokens=4) == expected
            assert pipe(CachedContext.load(file, wrapped), question="w1", max_new_tokens=4) == expected
        else:
            with pytest.raises(InvalidInputError, match=reason):
                pipe(context, question="w1", max_new_tokens=4)
            with pytest.raises(CacheFileError, match=reason):
                CachedContext.load(file, model)


@pytest.mark.skipif(bool(NO_ADAPTERS), reason=NO_ADAPTERS)
def test_an_adapter_that_does_nothing_is_none() -> None:
    """A disabled adapter leaves the plain model, also one added by transformers, whatever its name."""
    plain = model_fingerprint(tiny_model("llama"))
    model, wrapped = adapted()
    with wrapped.disable_adapter():
        assert difference(plain, model_fingerprint(wrapped)) is None
    other = copy.deepcopy(tiny_model("llama"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        other.add_adapter(lora(), "another name")
    assert torch.equal(keys(other), keys(model))
    assert difference(model_fingerprint(model), model_fingerprint(other)) is None
    other.disable_adapters()
    assert difference(plain, model_fingerprint(other)) is None


# Beside adapters


class PackedLinear(nn.Module):
    """A quantized layer that keeps its weight in buffers, as GPTQ and AWQ do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scales", scale)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states @ (self.codes * self.scales).T


def _quantized(scaled: float) -> Callable[[PreTrainedModel], None]:
    def change(model: PreTrainedModel) -> None:
        attention = model.model.layers[1].self_attn
        attention.k_proj = PackedLinear(attention.k_proj)
        attention.k_proj.scales.mul_(scaled)

    return change


def _tied(index: int) -> Callable[[PreTrainedModel], None]:
    def change(model: PreTrainedModel) -> None:
        layers = model.model.layers
        layers[2].self_attn.k_proj = layers[index].self_attn.k_proj

    return change


def _swapped(model: PreTrainedModel) -> None:
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


def _rotated(model: PreTrainedModel) -> None:
    model.model.rotary_emb.to(torch.bfloat16)


@pytest.mark.parametrize(
    ("one", "other", "reason"),
    [
        (_quantized(1.0), _quantized(1.01), "other buffers"),
        (_tied(0), _tied(1), "tied"),
        (lambda model: None, _swapped, "other weights"),
        (lambda model: None, _rotated, "other frequencies"),
    ],
    ids=["quantized", "tied", "swapped", "rotary"],
)
def test_what_changes_keys_changes_the_identity(one: Any, other: Any, reason: str) -> None:
    models = [copy.deepcopy(tiny_model("llama")) for _ in range(2)]
    one(models[0])
    other(models[1])
    assert not torch.equal(keys(models[0]), keys(models[1]))
    found = [model_fingerprint(model) for model in models]
    assert reason in str(difference(*found)) and difference(found[0], found[0]) is None


def test_files_of_before_still_load() -> None:
    """Older fingerprints have the documented digest, and no adapters, buffers, ties and frequencies."""
    model, digest = tiny_model("qwen3"), hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().flatten()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        digest.update(flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE].contiguous().numpy().tobytes())
    here = model_fingerprint(model)
    before = {name: here[name] for name in ("config", "name", "dtype")} | {"weights": digest.hexdigest()}
    assert difference(before, here) is None
