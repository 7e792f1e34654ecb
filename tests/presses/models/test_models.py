"""Right results or a clear refusal: sliding windows, other heads, other attention, other caches, padding."""

from typing import Any

import kvpress
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.models.nemotron import modeling_nemotron

from quantpress import enable
from quantpress.cache import PackedLayer, continue_inputs, host
from quantpress.errors import CompositionError, UnsupportedModelError
from quantpress.pipelines.text_generation import TextGenerationPipeline
from quantpress.presses import AdaKV, Compose, Knorm, KVCompose, SnapKV, StreamingLLM, TurboQuant
from tests.hybrid_models import HYBRID, SHARING
from tests.pipelines.words import text, word_tokenizer
from tests.presses.reading import answer, lossless, read
from tests.tiny_models import prompt, tiny_model
from tests.versions import LATENT_CACHE, kvpress_names

TOKENS = 420
IDS = prompt(TOKENS)
HALF_SLIDING = ["gemma2", "gpt_oss", "qwen2_sliding", "qwen3_sliding"]
OTHER_HEADS = ["multi_query", "multi_head"]
LATENT = ["deepseek_v2", "deepseek_v3"]
OTHER_CACHE = [name for name in HYBRID if name == "minimax" or not (name in SHARING or host.HOLDS_STATES)]
LATENTS = "caches one latent vector for each token" if LATENT_CACHE else ""
UNKNOWN_QUERIES = pytest.mark.filterwarnings("ignore:the queries of .* are not known")


def attention_of(family: str) -> str:
    return "eager" if family == "gpt_oss" else "sdpa"


def packed(cache: Any) -> list[bool]:
    return [isinstance(layer, PackedLayer) and layer.packed_tokens > 0 for layer in cache.layers]


@pytest.mark.parametrize(
    ("family", "evictor"),
    [
        *((family, SnapKV(0.5, window_size=16)) for family in (*HALF_SLIDING, *OTHER_HEADS)),
        (HALF_SLIDING[0], StreamingLLM(0.5)),
        (OTHER_HEADS[0], StreamingLLM(0.5)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_evicted_and_packed(family: str, evictor: Any) -> None:
    """Full-attention layers are evicted from and packed, sliding ones are the model's own."""
    model = tiny_model(family, attention_of(family))
    full = [family not in HALF_SLIDING, True, True]
    plain, evicted = read(model, None, IDS), read(model, Compose([evictor]), IDS)
    cache = read(model, Compose([evictor, lossless()]), IDS)
    assert packed(cache) == full
    assert [layer.get_seq_length() for layer in cache.layers] == [
        TOKENS // 2 if is_full else plain.layers[0].get_seq_length() for is_full in full
    ]
    tokens = answer(model, evicted, TOKENS)
    assert tokens != answer(model, plain, TOKENS), "nothing evicted: the comparison would prove nothing"
    assert answer(model, cache, TOKENS) == tokens


@UNKNOWN_QUERIES
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*HALF_SLIDING, *OTHER_HEADS, *LATENT, "phi", "gpt2", "gpt_neox"])
def test_generate_from_packed_layers(family: str, attention: str) -> None:
    if family == "gpt_oss" and attention == "sdpa":
        pytest.skip("transformers has no sdpa attention for gpt-oss")
    model = tiny_model(family, attention)
    if family in LATENT and LATENT_CACHE:
        with pytest.raises(UnsupportedModelError, match=LATENTS), lossless()(model):
            pytest.fail("entered")
        return
    ids = IDS[:, :300]
    options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(ids, **options).sequences
    with lossless()(model):
        got = model.generate(ids, **options)
    assert torch.equal(got.sequences, expected)
    assert packed(got.past_key_values) == [family not in HALF_SLIDING, True, True]
    with TurboQuant(8, recent_tokens=16)(model):
        coded = model.generate(ids, **options)
    assert packed(coded.past_key_values) == [family not in HALF_SLIDING, True, True]
    assert coded.sequences[0, 300] == expected[0, 300]  # the prefill itself is exact


@pytest.mark.skipif(LATENT_CACHE, reason="this transformers caches latents")
@pytest.mark.parametrize("family", LATENT)
def test_latent_attention_has_keys_and_values_of_different_head_dim(family: str) -> None:
    model, cache = tiny_model(family), DynamicCache()
    with torch.inference_mode(), TurboQuant(4, balance=False, recent_tokens=16)(model):
        model.model(input_ids=IDS, past_key_values=cache)
    plain = read(model, None, IDS)
    for layer, before in zip(cache.layers, plain.layers, strict=True):
        assert (layer.keys.shape[-1], layer.values.shape[-1]) == (32, 16)
        for side in ("keys", "values"):
            exact, coded = getattr(before, side), getattr(layer, side).dense()
            assert (coded - exact).square().sum() < 0.03 * exact.square().sum()


@pytest.mark.parametrize(
    ("family", "press", "reason"),
    [
        (
            "deepseek_v2",
            Knorm(0.5),
            LATENTS or "Knorm does not work with DeepseekV2Attention: it cut the channels",
        ),
        (
            "deepseek_v3",
            Knorm(0.5),
            LATENTS or "Knorm does not work with DeepseekV3Attention: .* no attribute 'head_dim'",
        ),
        ("phi", SnapKV(0.5), "SnapKV does not work with PhiAttention: .*kvpress supports Gemma3ForCond"),
        ("gpt2", Knorm(0.5), "kvpress finds no model.model.layers"),
        ("gpt_neox", Knorm(0.5), "kvpress finds no model.model.layers"),
        ("mistral_sliding", SnapKV(0.5), "every layer of Mistral.* nothing would be evicted"),
    ],
)
@pytest.mark.parametrize("quantized", [False, True])
def test_eviction_that_kvpress_cannot_do_is_refused(
    family: str, press: Any, reason: str, quantized: bool
) -> None:
    model = tiny_model(family)
    composed = Compose([press, lossless()]) if quantized else Compose([press])
    if quantized and family == "mistral_sliding":
        reason = "every layer of Mistral.* stay unpacked"
    with pytest.raises(UnsupportedModelError, match=reason), composed(model):
        model.generate(IDS, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("family", OTHER_CACHE)
def test_a_cache_of_another_kind_is_refused(family: str) -> None:
    """At the start, by contexts and by the pipeline, which cannot do without its own cache."""
    model, refused = (
        tiny_model(family),
        r"in a .*[cC]ache.*, not in layers of a.*"
        + ("without presses$" if host.HOLDS_STATES else r"need transformers 5\.17 or later"),
    )
    for press in (TurboQuant(), Knorm(0.5), Compose([Knorm(0.5)])):
        with pytest.raises(UnsupportedModelError, match=refused), press(model):
            pytest.fail("entered")
    pipe = TextGenerationPipeline(model=model, tokenizer=word_tokenizer())
    for press in (None, TurboQuant(), Knorm(0.5), kvpress.KnormPress(0.5)):
        for call in (pipe, pipe.read):
            with pytest.raises(UnsupportedModelError, match=refused):
                call(text(30), press=press)
    assert model.generate(IDS[:, :40], max_new_tokens=2, do_sample=False).shape[1] == 42


@pytest.mark.parametrize("family", ["bloom", "nemotron"])
def test_attention_that_is_not_patched_is_refused(family: str) -> None:
    if family == "nemotron" and hasattr(modeling_nemotron, "ALL_ATTENTION_FUNCTIONS"):
        pytest.skip("this transformers calls Nemotron's attention through its table")
    with (
        pytest.raises(UnsupportedModelError, match="does not call attention through"),
        TurboQuant()(tiny_model(family, "eager")),
    ):
        pytest.fail("entered")


# Windows that never slide


def greedy(model: PreTrainedModel, cache: Any, ids: torch.Tensor, seen: int, tokens: int = 6) -> torch.Tensor:
    """[1, tokens] after `ids`, which stand at position `seen` of the text; the last one is not fed."""
    answered = []
    with torch.inference_mode():
        for _ in range(tokens):
            places = torch.arange(seen, seen + ids.shape[1])[None]
            ids = model(ids, past_key_values=cache, position_ids=places).logits[:, -1:].argmax(-1)
            seen += places.shape[1]
            answered.append(ids)
    return torch.cat(answered, dim=1)


def test_a_window_wider_than_all_positions_is_evicted_from() -> None:
    """Against kvpress and a plain DynamicCache in the same model without a window."""
    wide, plain, second = tiny_model("mistral_wide"), tiny_model("mistral"), prompt(7, seed=5)
    reference = DynamicCache()
    knorm = kvpress.KnormPress(0.5)
    with kvpress_names(plain, knorm), knorm(plain):
        first = greedy(plain, reference, IDS, 0, 1)
    first = torch.cat([first, greedy(plain, reference, first, TOKENS, 5)], 1)
    more = torch.cat([first[:, -1:], second], 1)
    then = greedy(plain, reference, more, TOKENS + 5)

    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    with enable(wide, Compose([Knorm(0.5)])):
        one = wide.generate(IDS, return_dict_in_generate=True, **options)
        assert torch.equal(one.sequences[:, TOKENS:], first)
        ids = torch.cat([one.sequences, second], 1)
        two = wide.generate(ids, past_key_values=one.past_key_values, **options)
    assert torch.equal(two[:, ids.shape[1] :], then)

    cache = DynamicCache(config=wide.config)
    with Compose([Knorm(0.5)])(wide):
        assert torch.equal(greedy(wide, cache, IDS, 0, 1), first[:, :1])
    inputs = continue_inputs(cache, first[:, :1], tokens_seen=TOKENS)
    got = wide.generate(**inputs, past_key_values=cache, **{**options, "max_new_tokens": 5})
    assert torch.equal(got[:, 1:], first[:, 1:])


# Batches

PADDING = 37


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two contexts, the second one shorter and padded on the left: ids and mask, [2, T] each."""
    ids, mask = prompt(TOKENS, batch=2, seed=3), torch.ones(2, TOKENS, dtype=torch.int64)
    ids[1, :PADDING], mask[1, :PADDING] = 0, 0
    return ids, mask


def generated(model: PreTrainedModel, press: Any, ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    with press(model):
        got = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    for layer in model.model.layers:
        vars(layer.self_attn).pop("masked_key_indices", None)
    return got[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_batch_without_eviction(attention: str) -> None:
    """Each row answers as it does alone."""
    model, (ids, mask) = tiny_model("llama", attention), padded_batch()
    got = generated(model, lossless(), ids, mask)
    alone = ids[1:, PADDING:]
    assert got[1:] == generated(model, lossless(), alone, torch.ones_like(alone))
    assert got[:1] == generated(model, lossless(), ids[:1], mask[:1])


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "press", [SnapKV(0.5), Knorm(0.5), StreamingLLM(0.5)], ids=lambda press: type(press).__name__
)
def test_eviction_from_a_padded_batch_is_refused(press: Any, attention: str, quantized: bool) -> None:
    model, (ids, mask) = tiny_model("llama", attention), padded_batch()
    composed = Compose([press, lossless()] if quantized else [press])
    with pytest.raises(
        CompositionError, match=f"evicted {TOKENS // 2} of {TOKENS} tokens from a padded batch"
    ):
        generated(model, composed, ids, mask)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_press_that_reads_again_refuses_a_padded_batch(quantized: bool) -> None:
    model, (ids, mask) = tiny_model("llama"), padded_batch()
    composed = Compose([KVCompose(), lossless()] if quantized else [KVCompose()])
    with pytest.raises(CompositionError, match="reads again, without its mask, a padded batch"):
        generated(model, composed, ids, mask)


def test_head_wise_press_on_a_padded_batch() -> None:
    """It hides slots and moves none, so that the mask still fits: as in kvpress."""
    model, (ids, mask) = tiny_model("llama"), padded_batch()
    press = AdaKV(Knorm(0.3))
    expected = generated(model, press, ids, mask)
    assert generated(model, Compose([press, lossless()]), ids, mask) == expected
    assert expected != generated(model, Compose([lossless()]), ids, mask)


@pytest.mark.parametrize("press", [SnapKV(0.5), StreamingLLM(0.5)], ids=["snapkv", "streaming"])
def test_batch_of_equal_lengths(press: Any) -> None:
    """Rows are evicted from on their own: each answers as alone."""
    model, ids = tiny_model("llama"), prompt(TOKENS, batch=3, seed=4)
    got = generated(model, Compose([press, lossless()]), ids, torch.ones_like(ids))
    alone = [generated(model, Compose([press]), row[None], torch.ones_like(row[None]))[0] for row in ids]
    assert got == alone
