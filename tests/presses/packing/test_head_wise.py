"""Head-wise presses before TurboQuant: what kvpress hides by fake keys is not there, and nobody can tell."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import kvpress
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantpress.cache import cache_memory, continue_inputs
from quantpress.cache.tokens.evicted_slots import EvictedSlots
from quantpress.errors import InvalidInputError
from quantpress.pipelines.text_generation import TextGenerationPipeline
from quantpress.presses import DMS, AdaKV, Compose, Knorm, SnapKV, TurboQuant
from tests.pipelines.words import text, word_tokenizer
from tests.presses.matrix import CONTEXT, catalogue, make, model_of, ours
from tests.presses.reading import answer, lossless, read
from tests.tiny_models import prompt, tiny_model
from tests.versions import LATENT_CACHE, kvpress_names

TOKENS = 600
IDS = prompt(TOKENS, seed=5)


@dataclass
class Hiding(kvpress.BasePress):
    """Names tokens by chance, sinks and the newest ones too; one head of layer 1 loses all."""

    seed: int = 0

    def compress(
        self, module: Any, hidden_states: Any, keys: torch.Tensor, values: torch.Tensor, *rest: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed + module.layer_idx)
        share = torch.rand(keys.shape[:2], generator=generator).unsqueeze(-1)
        hidden = torch.rand(keys.shape[:3], generator=generator) < share
        if module.layer_idx == 1:
            hidden[:, 0] = True
        module.masked_key_indices = hidden.nonzero(as_tuple=True)
        return keys, values


PRESSES: dict[str, Callable[[], Any]] = {
    "by chance": Hiding,
    "AdaKV": lambda: AdaKV(SnapKV(0.6, window_size=16)),
    "AdaKV, no safeguard": lambda: AdaKV(Knorm(0.9), alpha_safeguard=0),
    "DMS": lambda: DMS(kvpress.RandomPress(seed=3), threshold=0.5, sliding_window_size=100),
}


def go_on(model: PreTrainedModel, cache: DynamicCache, sizes: tuple[int, ...]) -> list[torch.Tensor]:
    """Logits of texts of these sizes, one behind the other."""
    logits, position = [], TOKENS
    with torch.inference_mode():
        for step, new in enumerate(sizes):
            positions = torch.arange(position, position + new).unsqueeze(0)
            ids = prompt(new, seed=step)
            logits.append(model(ids, past_key_values=cache, position_ids=positions).logits)
            position += new
    return logits


def masked_sdpa(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """torch's attention with what is named masked: there are no fake keys for many queries at once."""
    group, queries, tokens = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    seen = torch.ones(query.shape[0], query.shape[1], queries, tokens, dtype=torch.bool).tril(
        tokens - queries
    )
    if attention_mask is not None:
        seen = seen & (attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0)
    named = getattr(module, "masked_key_indices", None)
    if queries == tokens:
        module.masked_key_indices = None
    elif named is not None:
        hidden = torch.zeros(key.shape[:3], dtype=torch.bool)
        hidden[tuple(named)] = True
        seen = seen & ~hidden.repeat_interleave(group, dim=1).unsqueeze(2)
    keys, values = (states.repeat_interleave(group, dim=1) for states in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=seen, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


@contextmanager
def torch_masks() -> Iterator[None]:
    """While inside, models attend by `masked_sdpa`."""
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = masked_sdpa
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = before


def forget(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        vars(layer.self_attn).pop("masked_key_indices", None)


@pytest.mark.parametrize("name", PRESSES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "multi_query", "deepseek_v3"])
def test_logits_are_those_of_masks(family: str, name: str) -> None:
    """A question, a text over several pages, single tokens."""
    model, sizes = tiny_model(family), (7, 290, 1, 1)
    if family == "deepseek_v3" and (name != "by chance" or LATENT_CACHE):
        pytest.skip("caches latents" if LATENT_CACHE else "kvpress's scorers fail there")
    with torch_masks():
        expected = go_on(model, read(model, Compose([PRESSES[name]()]), IDS), sizes)
        forget(model)
        whole = go_on(model, read(model, None, IDS), sizes)
    assert not torch.allclose(whole[0], expected[0], rtol=1e-2, atol=1e-2), "the press changes nothing"
    cache = read(model, Compose([PRESSES[name](), lossless()]), IDS)
    assert cache.layers[-1].tokens.heads is not None and cache.get_seq_length() == TOKENS
    for got, wanted in zip(go_on(model, cache, sizes), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", PRESSES)
def test_logits_are_those_of_kvpress(name: str) -> None:
    """Where it finds its fake keys: one token at a time."""
    model, sizes = tiny_model("llama"), (1,) * 6
    expected = go_on(model, read(model, PRESSES[name](), IDS), sizes)
    forget(model)
    cache = read(model, Compose([PRESSES[name](), lossless()]), IDS)
    for got, wanted in zip(go_on(model, cache, sizes), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-4)


def test_attention_weights() -> None:
    """Those of the first layer: the ones without a press, of what a head keeps, in proportion."""
    model, (ids, query) = tiny_model("llama", "eager"), (IDS, prompt(1))
    model_layer = model.model.layers[0].self_attn
    with torch.inference_mode():
        plain = read(model, Hiding(), ids)
        hidden = torch.zeros(1, 2, TOKENS + 1, dtype=torch.bool)
        hidden[tuple(model_layer.masked_key_indices)] = True
        forget(model)
        whole = model(query, past_key_values=plain, output_attentions=True).attentions[0]
        cache = read(model, Compose([Hiding(), lossless()]), ids)
        found = model(query, past_key_values=cache, output_attentions=True)
    evicted = cache.layers[0].view().evicted()
    assert found.attentions[0].shape == whole.shape
    for head in range(4):
        kept = whole[0, head, 0][~hidden[0, head // 2]]
        got = found.attentions[0][0, head, 0]
        assert not got[evicted[0, head // 2]].any()
        torch.testing.assert_close(got[~evicted[0, head // 2]], kept / kept.sum(), rtol=1e-4, atol=1e-6)
    cache = read(model, Compose([Hiding(), lossless()]), ids)
    with torch.inference_mode():
        fused = model(query, past_key_values=cache).logits
    torch.testing.assert_close(found.logits, fused, rtol=2e-4, atol=2e-4)


def test_the_cache_says_what_is_hidden_not_the_model() -> None:
    """kvpress keeps it on the model, where the next context replaces it."""
    model = tiny_model("llama")
    press = Compose([AdaKV(SnapKV(0.6, window_size=16)), lossless()])
    first = read(model, press, IDS)
    expected = answer(model, copy.deepcopy(first), TOKENS)
    second = read(model, press, prompt(400, seed=8))
    read(model, None, prompt(50))
    copied = copy.deepcopy(first)
    assert answer(model, first, TOKENS) == answer(model, copied, TOKENS) == expected
    assert answer(model, second, 400) != expected


@pytest.mark.parametrize("name", ["AdaKVPress", "DuoAttentionPress", "KVzipPress", "DMSPress"])
@pytest.mark.parametrize(
    "way", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 4, "eos_token_id": 2}], ids=["beams", "lookup"]
)
def test_ways_to_decode(name: str, way: dict[str, Any]) -> None:
    """Beams repeat and reorder the cache, prompt lookup crops it."""
    alone = ours(name, make(name), **way)
    assert ours(name, Compose([make(name), lossless()]), **way) == alone


@pytest.mark.parametrize("name", ["AdaKVPress", "LUKVPress", "KVgradPress"])
def test_every_question_finds_the_whole_context(name: str) -> None:
    asked = [text(5, seed=1), text(140, seed=2), text(5, seed=1)]
    pipe = TextGenerationPipeline(model=model_of(name), tokenizer=word_tokenizer())
    cache, press = DynamicCache(), Compose([make(name), lossless()])
    together = pipe(CONTEXT, press=press, questions=asked, cache=cache, max_new_tokens=6)["answers"]
    one_by_one = [pipe(CONTEXT, press=press, question=one, max_new_tokens=6)["answer"] for one in asked]
    assert together == one_by_one and together[0] == together[2] != together[1]
    untouched = DynamicCache()
    pipe(CONTEXT, press=press, questions=asked[:1], cache=untouched, max_new_tokens=1)
    assert cache_memory(cache) == cache_memory(untouched)


@pytest.mark.parametrize("name", [n for n, e in catalogue.CATALOGUE.items() if e.kind == catalogue.HEAD_WISE])
def test_memory_falls(name: str) -> None:
    """Of the same context, packed with the press and without; half of the tokens hidden or more."""
    model, ids = model_of(name), prompt(2048, seed=4)
    quantizer = TurboQuant(4, recent_tokens=16)
    with torch.no_grad():
        whole, half = DynamicCache(), DynamicCache()
        for cache, press in ((whole, quantizer), (half, Compose([make(name), quantizer]))):
            with press(model):
                model.model(input_ids=ids, past_key_values=cache)
            forget(model)
    ratio = cache_memory(half).total_bytes / cache_memory(whole).total_bytes
    assert ratio < 0.68, ratio
    memory = cache_memory(half)
    assert memory.uncompressed_bytes < 0.68 * cache_memory(whole).uncompressed_bytes
    assert 4 < memory.bits_per_value < 8


def test_real_codes_stay_near_the_hidden_ones() -> None:
    """At 8 bits the logits are nearly those of masks."""
    model, sizes = tiny_model("llama"), (7, 290, 1)
    with torch_masks():
        expected = go_on(model, read(model, Hiding(), IDS), sizes)
    forget(model)
    errors = []
    for bits in (8, 2):
        cache = read(model, Compose([Hiding(), TurboQuant(bits, recent_tokens=16)]), IDS)
        got = go_on(model, cache, sizes)
        errors.append(max(float((g - e).norm() / e.norm()) for g, e in zip(got, expected, strict=True)))
    assert errors[0] < 0.2 and errors[0] < 0.3 * errors[1]


def test_what_was_evicted_is_still_named() -> None:
    """In one bit a token, for those who look; it hides nothing."""
    model = tiny_model("llama")
    plain = read(model, AdaKV(SnapKV(0.6, window_size=16)), IDS)
    modules = [layer.self_attn for layer in model.model.layers]
    theirs = [{*zip(*map(torch.Tensor.tolist, m.masked_key_indices), strict=True)} for m in modules]
    cache = read(model, Compose([AdaKV(SnapKV(0.6, window_size=16)), lossless()]), IDS)
    for module, expected, layer, before in zip(modules, theirs, cache.layers, plain.layers, strict=True):
        named = module.masked_key_indices
        assert isinstance(named, EvictedSlots) and len(named) == 3
        assert {*zip(*map(torch.Tensor.tolist, named), strict=True)} == expected
        assert torch.equal(named[2], [*named][2])
        held = sum(t.numel() for t in vars(named).values() if isinstance(t, torch.Tensor))
        assert held == 2 * TOKENS // 8
        gone = layer.view().evicted().sum(-1)
        assert torch.equal(gone, named.hidden.sum(-1)) and before.get_seq_length() == TOKENS
    answered = answer(model, copy.deepcopy(cache), TOKENS)
    forget(model)
    assert answer(model, cache, TOKENS) == answered


def test_dms_counts_what_it_evicts_while_decoding() -> None:
    """Its ratio is that of kvpress, tokens of the prefill included."""
    model, found = tiny_model("llama"), []
    for quantizers in ([], [lossless()]):
        press = DMS(kvpress.RandomPress(seed=3), threshold=0.5, sliding_window_size=20, decoding=True)
        with torch.inference_mode(), Compose([press, *quantizers])(model):
            cache = DynamicCache()
            model(IDS, past_key_values=cache)
            logits = go_on(model, cache, (1,) * 30)
        found.append((press.compression_ratio, logits))
        forget(model)
    assert found[0][0] == found[1][0] > 0.4
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4)


def test_a_padded_batch_hides_as_before() -> None:
    """Its masks go by slot; the tokens stay, packed and named."""
    model, ids = tiny_model("llama"), prompt(TOKENS, batch=2, seed=6)
    mask = torch.ones(2, TOKENS + 9, dtype=torch.long)
    mask[1, :70] = 0
    logits = []
    for press in (Hiding(), Compose([Hiding(), lossless()])):
        cache = DynamicCache()
        with torch.inference_mode():
            with kvpress_names(model, press), press(model):
                model.model(ids, attention_mask=mask[:, :TOKENS], past_key_values=cache)
            assert model.model.layers[0].self_attn.masked_key_indices is not None
            positions = torch.arange(TOKENS, TOKENS + 9).expand(2, -1)
            more = prompt(9, batch=2, seed=1)
            logits.append(
                model(more, attention_mask=mask, past_key_values=cache, position_ids=positions).logits
            )
        forget(model)
    torch.testing.assert_close(logits[1], logits[0], rtol=2e-4, atol=2e-4)


def test_a_batch_of_contexts() -> None:
    model, ids = tiny_model("llama"), prompt(TOKENS, batch=3, seed=6)
    cache, plain = (read(model, press, ids) for press in (Compose([Hiding(), lossless()]), Hiding()))
    inputs = continue_inputs(cache, prompt(4, batch=3, seed=2))
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**inputs, past_key_values=plain, **options)
    forget(model)
    assert torch.equal(model.generate(**inputs, past_key_values=cache, **options), expected)


def test_a_cache_filled_before() -> None:
    """`pack_cache` after kvpress's own press."""
    model = tiny_model("llama")
    cache = read(model, AdaKV(SnapKV(0.6, window_size=16)), IDS)
    expected = answer(model, copy.deepcopy(cache), TOKENS)
    with torch.inference_mode():
        lossless().pack_cache(model, cache)
    assert cache.layers[0].tokens.heads is not None
    assert answer(model, cache, TOKENS) == expected
    read(model, AdaKV(SnapKV(0.6, window_size=16)), IDS)
    short = DynamicCache()
    short.update(torch.randn(1, 2, 300, 32), torch.randn(1, 2, 300, 32), 0)
    with pytest.raises(InvalidInputError, match="it was left by another context"):
        lossless().pack_cache(model, short)
    forget(model)
