"""Chunked prefill: the same result, smaller intermediate tensors, and an unchanged model afterwards."""

import functools
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)

from quantpress.errors import InvalidInputError
from quantpress.pipelines.reading.chunk_sizes import DEFAULT_CHUNK_TOKENS, chunk_length
from quantpress.pipelines.reading.chunked_prefill import (
    backbone,
    chunked_prefill,
    decoder_layers,
)
from quantpress.pipelines.reading.read_context import read_context
from quantpress.presses import Compose, SnapKV, TurboQuant
from tests.pipelines.words import ours, text
from tests.tiny_models import FAMILIES, prompt, tiny_model

TOKENS = 257
SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "gpt2": GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=2, n_positions=512),
    "olmoe": OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
}


@functools.cache
def _model(name):
    if name in FAMILIES:
        return tiny_model(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="sdpa").eval()


@torch.no_grad()
def _read(model, ids, chunk_tokens=None, **options):
    cache = DynamicCache()
    if chunk_tokens is None:
        output = backbone(model)(input_ids=ids, past_key_values=cache, **options)
    else:
        with chunked_prefill(model, chunk_tokens):
            output = backbone(model)(input_ids=ids, past_key_values=cache, **options)
    return output, cache


@pytest.mark.parametrize("chunk_tokens", [1, 100, 256, 257, 1000])
@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", *CONFIGS])
def test_chunks_compute_what_the_whole_computes(name, chunk_tokens):
    model, ids = _model(name), prompt(TOKENS)
    whole, whole_cache = _read(model, ids)
    parts, parts_cache = _read(model, ids, chunk_tokens)
    torch.testing.assert_close(parts.last_hidden_state, whole.last_hidden_state, rtol=1e-4, atol=1e-4)
    for layer, expected in zip(parts_cache.layers, whole_cache.layers, strict=True):
        torch.testing.assert_close(layer.keys, expected.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.values, expected.values, rtol=1e-4, atol=1e-4)


class Largest(TorchDispatchMode):
    """The number of elements in the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return output


def test_the_largest_tensor_no_longer_grows_with_the_feed_forward():
    """The feed-forward is 32 times as wide as the model, so its tensors, if whole, are by far the largest."""
    config = type(tiny_model("llama").config)(**SIZES | {"intermediate_size": 1024})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    largest = {}
    for chunk_tokens in (None, 64):
        with Largest() as mode:
            _read(model, prompt(2048), chunk_tokens)
        largest[chunk_tokens] = mode.elements
    assert largest[None] == 2048 * 32 * 32
    # what stays O(T): queries, keys, values and hidden states, T x hidden each
    assert largest[64] <= max(2048 * 32, 64 * 32 * 32)


def test_feed_forwards_and_norms_see_chunks_and_attention_sees_all():
    model, seen = tiny_model("llama"), {}
    layer = model.model.layers[1]
    watched = {"gate": layer.mlp.gate_proj, "attention": layer.self_attn.q_proj, "mlp": layer.mlp}
    hooks = [
        part.register_forward_hook(
            lambda _, args, output, name=name: seen.setdefault(name, []).append(output.shape[1])
        )
        for name, part in watched.items()
    ]
    try:
        _read(model, prompt(TOKENS), 100)
    finally:
        for hook in hooks:
            hook.remove()
    assert seen == {"gate": [100, 100, 57], "attention": [TOKENS], "mlp": [TOKENS]}


def test_a_press_sees_the_whole_prefill_and_layers_are_packed_one_by_one():
    model, ids, alive = tiny_model("llama"), prompt(1000), []
    caches = {}
    for chunk_tokens in (0, 128):
        caches[chunk_tokens] = cache = DynamicCache()

        def count(module, args, output, cache=cache):
            alive.append(sum(layer.keys.shape[2] == 1000 for layer in cache.layers))

        hooks = [layer.register_forward_hook(count) for layer in decoder_layers(model)]
        press = Compose([SnapKV(0.5, window_size=16), TurboQuant(bits=8)])
        with torch.no_grad():
            assert read_context(model, ids, cache, press, chunk_tokens=chunk_tokens) == 1000
        for hook in hooks:
            hook.remove()
    assert alive == [0] * 6  # no layer keeps its 1000 raw keys once it is done
    for layer, expected in zip(caches[128].layers, caches[0].layers, strict=True):
        torch.testing.assert_close(layer.keys.dense(), expected.keys.dense(), rtol=1e-3, atol=2e-2)


def test_answers_are_the_same_in_chunks():
    arguments = {"question": text(5, seed=1), "max_new_tokens": 10, "press": SnapKV(0.5, window_size=16)}
    answers = [ours()(text(300), chunk_tokens=chunk, **arguments) for chunk in (0, 1, 77, None)]
    assert all(answer == answers[0] for answer in answers)


def test_long_contexts_are_read_in_chunks_by_default():
    assert chunk_length(2 * DEFAULT_CHUNK_TOKENS) == 0
    assert chunk_length(2 * DEFAULT_CHUNK_TOKENS + 1) == DEFAULT_CHUNK_TOKENS


@pytest.mark.parametrize("failing", [False, True], ids=["success", "exception"])
def test_the_model_is_as_it_was(failing):
    model = tiny_model("llama")
    patched = model.model.layers[0].mlp
    replaced = functools.partial(type(patched).forward, patched)
    patched.forward = replaced  # as accelerate does
    before = [(name, sorted(vars(part))) for name, part in model.named_modules()]
    try:
        with suppress(ZeroDivisionError), chunked_prefill(model, 10):
            assert "forward" in vars(model.model.layers[1].mlp)
            assert patched.forward is not replaced
            assert not failing or 1 / 0
        assert [(name, sorted(vars(part))) for name, part in model.named_modules()] == before
        assert patched.forward is replaced
    finally:
        del patched.forward


class _Odd(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({name: _Residual(), "norm": nn.LayerNorm(4)})])

    def forward(self, hidden_states):
        for layer in self.layers:
            hidden_states = next(iter(layer.values()))(hidden_states, hidden_states)
        return hidden_states


class _Residual(nn.Module):
    def forward(self, hidden_states, residual):
        return hidden_states.cumsum(1) + residual


@pytest.mark.parametrize(
    ("name", "words"),
    [("channel_mixer", "_Odd has no feed-forward block known by name"), ("mlp", "_Residual takes more than")],
)
def test_an_unknown_structure_runs_whole_and_says_so_once(name, words):
    model, states = _Odd(name), torch.randn(1, 9, 4)
    with pytest.warns(UserWarning, match=words) as caught, chunked_prefill(model, 2):
        found = model(states)
    assert len(caught) == 1
    torch.testing.assert_close(found, model(states))


def test_a_chunk_has_at_least_one_token():
    for wrong in (0, "4"):
        with pytest.raises(InvalidInputError, match=f"chunk_tokens is {wrong!r}"):
            chunked_prefill(tiny_model("llama"), wrong).__enter__()
