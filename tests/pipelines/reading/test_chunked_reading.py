"""A context read in chunks, including attention and layers, is compared with the context read whole."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

from quantpress.cache import PackedLayer, host
from quantpress.pipelines import patch_attention
from quantpress.pipelines.reading.chunk_sizes import QUERY_CHUNKS
from quantpress.pipelines.reading.chunked_prefill import backbone, chunked_prefill
from quantpress.pipelines.reading.embeddings import Watcher
from quantpress.pipelines.reading.read_context import read_context
from quantpress.presses import Compose, ExpectedAttention, Knorm, SnapKV, TurboQuant
from quantpress.presses.models.attention import attention_modules
from tests.pipelines.reading.test_chunked_prefill import Largest
from tests.presses import matrix
from tests.tiny_models import FAMILIES, prompt, tiny_model

TOKENS = 700
CHUNK = 50
QUERIES = QUERY_CHUNKS * CHUNK
IN_CHUNKS = [200, 200, 200, 100]  # of queries
OTHERS = (
    "gemma2",
    "qwen3_sliding",
    "mistral_sliding",
    "multi_query",
    "multi_head",
    "phi",
    "gpt2",
    "gpt_neox",
)
PADDING = 37


@contextmanager
def lengths(model: PreTrainedModel) -> Iterator[list[int]]:
    """How many tokens each call of the second layer's first projection sees."""
    seen: list[int] = []
    attention = attention_modules(model)[1]
    projection = next(part for part in attention.modules() if type(part).__name__ in ("Linear", "Conv1D"))
    handle = projection.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    try:
        yield seen
    finally:
        handle.remove()


def forward(
    model: PreTrainedModel, chunk: int, cache: Any = None, tokens: int = TOKENS, **options: Any
) -> tuple[Any, Any, list[int]]:
    """Return the output, the cache and the chunks that attention saw."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    reading = chunked_prefill(model, chunk) if chunk else nullcontext()
    with torch.no_grad(), reading, lengths(model) as seen:
        output = backbone(model)(input_ids=prompt(tokens), past_key_values=cache, **options)
    return output, cache, seen


def same_states(found: Any, expected: Any) -> None:
    assert len(found.layers) == len(expected.layers) > 0
    for layer, other in zip(found.layers, expected.layers, strict=True):
        assert type(layer) is type(other)
        assert layer.get_seq_length() == other.get_seq_length()
        for name in ("keys", "values"):
            states, whole = getattr(layer, name), getattr(other, name)
            assert states.dtype == whole.dtype
            torch.testing.assert_close(states, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "padded"),
    [
        *((name, False) for name in (*FAMILIES, *OTHERS)),
        *((name, True) for name in ("llama", "gemma3", "gpt2")),
    ],
    ids=lambda value: ("", "padded")[value] if isinstance(value, bool) else value,
)
def test_states_and_caches_are_those_of_the_whole(family: str, padded: bool) -> None:
    model, mask = tiny_model(family), torch.ones(1, TOKENS, dtype=torch.int64)
    mask[0, : PADDING if padded else 0] = 0
    whole, cache, unchunked = forward(model, 0, attention_mask=mask)
    parts, parts_cache, chunked = forward(model, CHUNK, attention_mask=mask)
    in_chunks = IN_CHUNKS if model.config._attn_implementation == "sdpa" else [TOKENS]
    assert (unchunked, chunked) == ([TOKENS], in_chunks)
    seen = slice(PADDING if padded else 0, None)
    torch.testing.assert_close(
        parts.last_hidden_state[:, seen], whole.last_hidden_state[:, seen], rtol=1e-4, atol=1e-4
    )
    same_states(parts_cache, cache)


@pytest.mark.parametrize("tokens", [QUERIES, QUERIES + 1, 2 * QUERIES - 1])
def test_odd_lengths(tokens: int) -> None:
    model = tiny_model("qwen3")
    whole, cache, _ = forward(model, 0, tokens=tokens)
    parts, parts_cache, chunked = forward(model, CHUNK, tokens=tokens)
    assert sum(chunked) == tokens
    torch.testing.assert_close(parts.last_hidden_state, whole.last_hidden_state, rtol=1e-4, atol=1e-4)
    same_states(parts_cache, cache)


def test_a_batch() -> None:
    model, ids = tiny_model("llama"), prompt(TOKENS, batch=3)
    outputs = []
    for reading in (nullcontext(), chunked_prefill(model, CHUNK)):
        with torch.no_grad(), reading:
            outputs.append(backbone(model)(input_ids=ids, past_key_values=DynamicCache()).last_hidden_state)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


class _OwnUpdate(DynamicCache):
    def update(self, *args: Any, **kwargs: Any) -> Any:
        return super().update(*args, **kwargs)


def left_whole() -> dict[str, Callable[[], tuple[PreTrainedModel, dict[str, Any]]]]:
    llama = tiny_model("llama")

    def filled() -> DynamicCache:
        return forward(llama, 0, tokens=5)[1]

    return {
        "eager": lambda: (tiny_model("llama", "eager"), {}),
        "static": lambda: (llama, {"cache": StaticCache(config=llama.config, max_cache_len=TOKENS)}),
        "filled": lambda: (llama, {"cache": filled()}),
        "own update": lambda: (llama, {"cache": _OwnUpdate()}),
        "no cache": lambda: (llama, {"cache": False}),
        "latent": lambda: (tiny_model("deepseek_v3"), {}),
    }


@pytest.mark.parametrize("name", left_whole())
def test_attention_that_cannot_be_cut_is_computed_whole(name: str) -> None:
    found = []
    for chunk in (0, CHUNK):
        model, options = left_whole()[name]()
        if options.get("cache") is False:
            options = {"use_cache": False}
            with torch.no_grad(), chunked_prefill(model, chunk or TOKENS), lengths(model) as seen:
                output = backbone(model)(input_ids=prompt(TOKENS), **options)
        else:
            output, _, seen = forward(model, chunk, **options)
        found.append(output.last_hidden_state)
    assert seen[-1] == TOKENS  # whole, after an attempt in chunks
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_attention_is_whole_under_gradients_and_under_a_live_patch() -> None:
    model, ids = tiny_model("llama"), prompt(TOKENS)
    with chunked_prefill(model, CHUNK), lengths(model) as seen:
        loss = backbone(model)(input_ids=ids, past_key_values=DynamicCache()).last_hidden_state.sum()
        loss.backward()
    assert seen == [TOKENS]
    assert model.model.embed_tokens.weight.grad is not None
    model.zero_grad(set_to_none=True)
    outputs = []
    patched = copy.deepcopy(model)
    with patch_attention(patched, bits=4):
        for reading in (nullcontext(), chunked_prefill(patched, CHUNK)):
            with torch.no_grad(), reading, lengths(patched) as seen:
                outputs.append(patched(input_ids=ids, past_key_values=DynamicCache()).logits)
            assert seen == [TOKENS]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_hooks_on_attention_see_what_they_always_see() -> None:
    model, seen = tiny_model("llama"), []

    def watch(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        cache = host.cache_in(args, kwargs)
        layer = cache.layers[module.layer_idx]
        tensors = {"keys": layer.keys, "values": layer.values, "output": output[0], **kwargs}
        tensors |= dict(zip(("cos", "sin"), kwargs["position_embeddings"], strict=True))
        del tensors["position_embeddings"]
        seen.append(
            ({name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}, len(output))
        )

    handle = model.model.layers[1].self_attn.register_forward_hook(watch, with_kwargs=True)
    try:
        for chunk in (0, CHUNK):
            forward(model, chunk)
    finally:
        handle.remove()
    (whole, count), (parts, parts_count) = seen  # once each
    assert (whole.keys(), count) == (parts.keys(), parts_count)
    places = {host.PLACES} if host.CALLS_TAKE_PLACES else set()
    assert {"hidden_states", "keys", "cos", *places} <= whole.keys()
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-4)
        assert name != "keys" or parts[name].is_contiguous()


def test_a_hook_on_a_norm_runs_once() -> None:
    """The layer then runs whole, and its parts run in chunks one by one."""
    model, seen = tiny_model("llama"), []
    norm = model.model.layers[1].post_attention_layernorm
    handle = norm.register_forward_hook(lambda _, args, output: seen.append(output.shape[1]))
    try:
        parts, _, _ = forward(model, CHUNK)
    finally:
        handle.remove()
    assert seen == [TOKENS]
    torch.testing.assert_close(
        parts.last_hidden_state, forward(model, 0)[0].last_hidden_state, rtol=1e-4, atol=1e-4
    )


def test_hidden_states_of_all_layers_can_still_be_asked_for() -> None:
    model = tiny_model("gemma3")
    whole, parts = (forward(model, chunk, output_hidden_states=True)[0].hidden_states for chunk in (0, CHUNK))
    assert len(whole) == len(parts) == 4
    for part, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-4)


def test_no_tensor_is_as_wide_as_the_query_heads_or_the_feed_forward() -> None:
    """Both are 16 times as wide as the model; the 2 KV heads together are as wide as the model."""
    sizes = {"hidden_size": 32, "intermediate_size": 512, "num_attention_heads": 32, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=2, head_dim=16, **sizes)).eval()
    tokens = 2048
    with Largest() as mode:
        forward(model, 16, tokens=tokens)
    assert mode.elements == tokens * 32
    with Largest() as mode:
        forward(model, 0, tokens=tokens)
    assert mode.elements >= 16 * tokens * 32


WORKING = [name for name in matrix.catalogue.CATALOGUE if not matrix.refused(name)]


@pytest.mark.parametrize("name", WORKING)
def test_a_press_answers_the_same(name: str) -> None:
    """For every kind of score and moment of action."""
    answers = [
        matrix.ours(
            name,
            Compose([matrix.make(name), TurboQuant(8, recent_tokens=16)]),
            chunk_tokens=chunk,
            max_new_tokens=3,
        )
        for chunk in (0, 60)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("press", [SnapKV(0.5, window_size=16), ExpectedAttention(0.5), Knorm(0.5)], ids=repr)
def test_survivors_and_codes_are_those_of_the_whole(press: Any) -> None:
    """All but those whose score or coordinate is within rounding of the next."""
    model, caches = tiny_model("llama"), []
    for chunk in (0, CHUNK):
        caches.append(DynamicCache())
        with torch.no_grad():
            chain = Compose([copy.deepcopy(press), TurboQuant(4, recent_tokens=16)])
            read_context(model, prompt(TOKENS), caches[-1], chain, chunk_tokens=chunk)
    for layer, expected in zip(*(cache.layers for cache in caches), strict=True):
        assert isinstance(layer, PackedLayer) and layer.packed_tokens
        for side in ("key_pages", "value_pages"):
            planes, whole = (getattr(one.tokens, side).planes for one in (layer, expected))
            assert planes.keys() == whole.keys()
            for name in planes:
                assert (planes[name] == whole[name]).float().mean() > 0.99


# The embeddings


def embeddings_after(model: PreTrainedModel, *, chunk: int = CHUNK) -> torch.Tensor:
    """The output of the embedding, inspected after the last layer."""
    found: list[torch.Tensor] = []
    embedding, whole = model.model.embed_tokens, model.model.embed_tokens.forward

    def keep(ids: torch.Tensor) -> torch.Tensor:
        found.append(whole(ids))
        return found[-1]

    embedding.forward = keep
    try:
        with torch.no_grad():
            read_context(model, prompt(TOKENS), DynamicCache(), chunk_tokens=chunk)
    finally:
        del embedding.forward
    return found[0]


def test_embeddings_take_no_memory_behind_the_first_layer() -> None:
    model = tiny_model("llama")
    assert embeddings_after(model, chunk=0).isfinite().all()
    left = embeddings_after(model)
    assert left.shape == (1, TOKENS, 128)
    assert left.isnan().all()
    assert left.untyped_storage().nbytes() == left.element_size()


@pytest.mark.parametrize("place", ["embedding", "layer", "layer before"])
def test_embeddings_that_a_hook_may_have_kept_stay(place: str) -> None:
    model, kept = tiny_model("llama"), []
    layer = model.model.layers[0]
    register = {
        "embedding": lambda: model.model.embed_tokens.register_forward_hook(
            lambda _, __, output: kept.append(output)
        ),
        "layer": lambda: layer.register_forward_hook(lambda _, args, __: kept.append(args[0])),
        "layer before": lambda: layer.register_forward_pre_hook(lambda _, args: kept.append(args[0])),
    }[place]
    handle = register()
    try:
        assert embeddings_after(model).isfinite().all()
    finally:
        handle.remove()
    assert kept[0].isfinite().all()


def test_a_watcher_keeps_nothing() -> None:
    model, calls = tiny_model("llama"), []
    handle = model.model.layers[0].register_forward_hook(Watcher(lambda: calls.append(1)))
    try:
        assert embeddings_after(model).isnan().all()
    finally:
        handle.remove()
    assert calls == [1]


def test_embeddings_of_the_caller_are_the_callers() -> None:
    model = tiny_model("llama")
    with torch.no_grad(), chunked_prefill(model, CHUNK):
        mine = model.model.embed_tokens(prompt(TOKENS))
        backbone(model)(inputs_embeds=mine, past_key_values=DynamicCache())
    assert mine.isfinite().all()
