"""Models that mix attention with state spaces, linear attention or convolutions, packed without loss.

So are models whose last layers attend to the keys of others. Tokens are those of the model with a cache of
transformers' own. Layers of full attention are packed, and states pass through.
"""

from pathlib import Path
from typing import Any

import kvpress
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from quantpress import enable
from quantpress.cache import PackedLayer, cache_memory, host
from quantpress.errors import InvalidInputError, UnsupportedModelError
from quantpress.pipelines.capture.captured import captured_decoding
from quantpress.pipelines.contexts.cached_context import CachedContext
from quantpress.pipelines.text_generation import TextGenerationPipeline
from quantpress.presses import (
    TOVA,
    AdaKV,
    ChunkKV,
    Compose,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    KVzip,
    LagKV,
    Random,
    SnapKV,
    StreamingLLM,
    TurboQuant,
)
from quantpress.presses.base import NamedPress
from quantpress.presses.models.attention import full_attention_modules
from tests.hybrid_models import HYBRID, SHARING, WORKING
from tests.pipelines.words import text, word_tokenizer
from tests.presses.reading import lossless
from tests.tiny_models import prompt, tiny_model

pytestmark = pytest.mark.skipif(
    not host.HOLDS_STATES, reason="caches of this transformers cannot hold states beside tokens"
)
FAMILIES = [name for name in (*WORKING, *SHARING) if name in HYBRID]
IDS = prompt(170)
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "no_repeat_ngram_size": 1}


def layers_packed(model: PreTrainedModel, cache: Any) -> bool:
    """Whether exactly the layers of full attention hold packed pages."""
    full = {module.layer_idx for module in full_attention_modules(model)}
    packed = {i for i, one in enumerate(cache.layers) if isinstance(one, PackedLayer) and one.packed_tokens}
    return full == packed and len(full) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family: str) -> None:
    """In the press's context, enabled, with beams, and with a batch of which one row is padded."""
    model = tiny_model(family)
    expected = model.generate(IDS, **GREEDY)
    assert not torch.equal(expected[:, 170:], model.generate(IDS.roll(1, 1), **GREEDY)[:, 170:])
    with lossless()(model):
        got = model.generate(IDS, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(got.sequences, expected)
    cache = got[host.generate_cache()]
    assert layers_packed(model, cache)
    ids, mask = torch.cat([IDS, prompt(170, seed=1)]), torch.ones(2, 170, dtype=torch.int64)
    mask[1, :21] = 0
    beams = model.generate(IDS, **GREEDY, num_beams=2)
    padded = model.generate(ids, attention_mask=mask, **GREEDY)
    with enable(model, lossless()):
        assert torch.equal(model.generate(IDS, **GREEDY), expected)
        assert torch.equal(model.generate(IDS, **GREEDY, num_beams=2), beams)
        assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), padded)


@pytest.mark.filterwarnings("ignore:.* is computed whole, with intermediate tensors for every token")
@pytest.mark.parametrize("family", FAMILIES)
def test_pipeline(family: str, tmp_path: Path) -> None:
    """Read whole and in chunks, with two questions, beams, and a context that is kept and saved."""
    model = tiny_model(family)
    pipe = TextGenerationPipeline(model=model, tokenizer=word_tokenizer())
    context, press = text(170), lossless()
    asked = {"questions": ["w1 w2", "w3", "w1 w2"], "max_new_tokens": 4, "no_repeat_ngram_size": 1}
    expected = pipe(context, **asked)
    assert expected["answers"][0] == expected["answers"][2] != expected["answers"][1]
    beams = pipe(context, **asked, num_beams=2)
    cache = host.empty_cache(model)
    assert pipe(context, press=press, cache=cache, **asked) == expected
    assert layers_packed(model, cache)
    assert pipe(context, press=press, chunk_tokens=64, **asked) == expected
    assert pipe(context, press=press, num_beams=2, **asked) == beams
    for press in (TurboQuant(8, recent_tokens=16, balance=False), None):
        kept = pipe.read(context, press=press)
        kept.save(tmp_path / "context")
        answers = pipe(kept, **asked)  # twice: a question leaves no state behind
        assert (
            answers == pipe(kept, **asked) == pipe(CachedContext.load(tmp_path / "context", model), **asked)
        )
    assert answers == expected


@pytest.mark.parametrize("family", ["qwen3_5", "falcon_h1"])
def test_memory_counts_states_apart(family: str) -> None:
    model, caches = tiny_model(family), []
    for press in (None, TurboQuant(4, recent_tokens=16, balance=False)):
        pipe = TextGenerationPipeline(model=model, tokenizer=word_tokenizer())
        caches.append(cache_memory(pipe.read(text(700), press=press).cache))
    plain, packed = caches
    assert plain.state_bytes == packed.state_bytes > 0 == plain.packed_bytes
    assert plain.ratio == 1.0 and packed.packed_bytes < 0.3 * plain.uncompressed_bytes
    assert packed.total_bytes == packed.state_bytes + sum(
        getattr(packed, f"{kind}_bytes") for kind in ("packed", "dense", "metadata")
    )
    assert packed.as_dict()["state_bytes"] == packed.state_bytes
    assert 4 < packed.bits_per_value < 8 and plain.bits_per_value == 32


EVICTORS = {
    "qwen3_5": [Knorm(0.5), KeyDiff(0.5), AdaKV(Knorm(0.5)), kvpress.KnormPress(0.5)],
    "jamba": [StreamingLLM(0.5), LagKV(0.5, lag_size=32)],
    "nemotron_h": [Knorm(0.5), Random(0.5, seed=3)],
    "lara_mini": [ChunkKV(Knorm(0.5))],
    "zaya": [Knorm(0.5)],
    "falcon_h1": [SnapKV(0.5, window_size=16), TOVA(0.5), ExpectedAttention(0.5)],
}


@pytest.mark.parametrize("family", [name for name in EVICTORS if name in HYBRID])
def test_eviction(family: str) -> None:
    """Before packing without loss, it answers as alone; layers of full attention keep half of the tokens."""
    model = tiny_model(family)
    full = {module.layer_idx for module in full_attention_modules(model)}
    pipe = TextGenerationPipeline(model=model, tokenizer=word_tokenizer())
    asked = {"questions": ["w1 w2", "w3"], "max_new_tokens": 6, "no_repeat_ngram_size": 1}
    plain, changed = pipe(text(300), **asked), False
    for press in EVICTORS[family]:
        cache = host.empty_cache(model)
        expected = pipe(text(300), press=press, cache=cache, **asked)
        kept = {index: cache.layers[index].get_seq_length() for index in full}
        by_head = isinstance(press, kvpress.AdaKVPress)
        assert by_head or all(100 < tokens < 200 for tokens in kept.values()), kept
        changed |= expected != plain
        assert pipe(text(300), press=Compose([press, lossless()]), **asked) == expected
        with enable(model, press):
            turn = model.generate(IDS, **GREEDY, return_dict_in_generate=True)
        generated = turn.sequences
        assert turn.past_key_values.get_seq_length() == generated.shape[1] - 1, "the next turn goes on there"
        with enable(model, Compose([press, lossless()])):
            assert torch.equal(model.generate(IDS, **GREEDY), generated)
        if isinstance(press, NamedPress):
            with press(model):
                assert by_head or torch.equal(model.generate(IDS, **GREEDY), generated)
            for module in full_attention_modules(model):
                vars(module).pop("masked_key_indices", None)
    assert changed, "nothing evicted that counts: the comparison would prove nothing"


@pytest.mark.parametrize("quantizers", [[], [lossless()]], ids=["alone", "packed"])
@pytest.mark.parametrize(
    ("press", "reason"),
    [
        (SnapKV(0.5), "does not compute the queries of its attention as the model does"),
        (AdaKV(SnapKV(0.5)), "does not compute the queries"),
        (kvpress.SnapKVPress(0.5), "does not compute the queries"),
        (KVzip(0.5), "it was not tried there"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_eviction_that_is_refused_before_reading(press: Any, reason: str, quantizers: list[Any]) -> None:
    model = tiny_model("qwen3_5")
    pipe = TextGenerationPipeline(model=model, tokenizer=word_tokenizer())
    cache = host.empty_cache(model)
    with pytest.raises(UnsupportedModelError, match=reason):
        pipe(text(300), press=Compose([press, *quantizers]) if quantizers else press, cache=cache)
    assert not cache.get_seq_length()


def test_caches_that_cannot_hold_states_are_refused() -> None:
    model = tiny_model("qwen3_5")
    pipe = TextGenerationPipeline(model=model, tokenizer=word_tokenizer())
    for press in (None, lossless(), Knorm(0.5)):
        with pytest.raises(InvalidInputError, match=r"give DynamicCache\(config=model\.config\)"):
            pipe(text(30), press=press, cache=DynamicCache())
    with (
        lossless()(model),
        pytest.raises(InvalidInputError, match=r"give DynamicCache\(config=model\.config\)"),
    ):
        model.generate(IDS, **GREEDY, **{host.generate_cache(): DynamicCache()})


@pytest.mark.parametrize("family", ["qwen3_5", "falcon_h1"])
def test_steps_are_not_captured_and_say_so(family: str) -> None:
    model = tiny_model(family)
    expected = model.generate(IDS, **GREEDY)
    with (
        lossless()(model),
        captured_decoding(model) as steps,
        pytest.warns(UserWarning, match="of the cache are"),
    ):
        assert torch.equal(model.generate(IDS, **GREEDY), expected)
    assert not steps.eager_steps


def test_prompt_lookup() -> None:
    """Where transformers can undo tokens, it works; elsewhere it is refused by transformers itself."""
    model, options = tiny_model("lfm2"), {"prompt_lookup_num_tokens": 3, "eos_token_id": 0}
    pipe = TextGenerationPipeline(model=model, tokenizer=word_tokenizer())
    asked = {"questions": ["w1 w2", "w3 w1 w2"], "max_new_tokens": 8, "press": lossless()}
    assert pipe(text(200), **asked, **options) == pipe(text(200), **asked)
    expected = model.generate(IDS, max_new_tokens=8, do_sample=False)
    with enable(model, lossless()):
        assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False, **options), expected)
    with enable(tiny_model("jamba"), lossless()), pytest.raises(ValueError, match="stateful"):
        tiny_model("jamba").generate(IDS, max_new_tokens=8, do_sample=False, **options)


REASONS = {
    "minimax": "keeps its state in a cache of its own kind",
    "kimi_linear": "caches one latent vector for each token",
    "zamba2": "share attention modules",
}


@pytest.mark.parametrize("family", [name for name in REASONS if name in HYBRID])
@pytest.mark.parametrize("press", [TurboQuant(4), Knorm(0.5)], ids=["packed", "evicted"])
def test_refused(family: str, press: Any) -> None:
    model = tiny_model(family)
    pipe = TextGenerationPipeline(model=model, tokenizer=word_tokenizer())
    with pytest.raises(UnsupportedModelError, match=REASONS[family]), press(model):
        pytest.fail("entered")
    with pytest.raises(UnsupportedModelError, match=REASONS[family]):
        pipe(text(30), press=press)
    enabling = "makes a cache of its own kind" if family == "minimax" else REASONS[family]
    with pytest.raises(UnsupportedModelError, match=enabling):
        enable(model, press)
