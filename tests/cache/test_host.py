"""What differs between versions of transformers lies in one place, and our code uses the new names."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from quantpress import enable
from quantpress.cache import host
from quantpress.pipelines.capture.captured import captured_decoding
from quantpress.pipelines.contexts.cached_context import CachedContext
from quantpress.pipelines.text_generation import TextGenerationPipeline
from quantpress.presses import AdaKV, Compose, Decoding, Knorm, KVCompose, SnapKV, TurboQuant
from tests.pipelines.words import text, word_tokenizer
from tests.tiny_models import prompt, tiny_model

PRESSES: dict[str, Any] = {
    "none": None,
    "packed": TurboQuant(4, recent_tokens=16),
    "evicted": Compose([SnapKV(0.5, window_size=16), TurboQuant(4, recent_tokens=16)]),
    "by head": AdaKV(Knorm(0.5)),
    "at exit": KVCompose(compression_ratio=0.5),
    "while decoding": Decoding(Knorm(), compression_interval=4, target_size=200),
}


@pytest.mark.parametrize("name", PRESSES)
def test_our_own_code_uses_no_name_that_transformers_has_given_up(name: str, tmp_path: Path) -> None:
    model, press, ids = tiny_model("llama"), PRESSES[name], prompt(300)
    pipe = TextGenerationPipeline(model=model, tokenizer=word_tokenizer())
    asked: dict[str, Any] = {"question": "w1 w2", "max_new_tokens": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for chunk in (0, 64):
            pipe(text(300), press=press, chunk_tokens=chunk, **asked)
        if name not in ("at exit", "while decoding"):
            pipe(text(300), press=press, prompt_lookup_num_tokens=2, eos_token_id=0, **asked)
            kept = pipe.read(text(300), press=press)
            kept.save(tmp_path / "context")
            pipe(CachedContext.load(tmp_path / "context", model), **asked)
        if press is not None:
            with enable(model, press):
                model.generate(ids, max_new_tokens=3, do_sample=False)
        if name in ("packed", "evicted"):
            with press(model), captured_decoding(model):
                model.generate(ids, max_new_tokens=3, do_sample=False)


def test_lengths_and_masks() -> None:
    """Layers of transformers take what `mask_query` gives; `repeat_batch` is its own for plain layers."""
    cache, other = DynamicCache(), DynamicCache()
    for one in (cache, other):
        one.update(*torch.randn(2, 2, 1, 5, 4, generator=torch.Generator().manual_seed(0)), 0)
    assert cache.get_mask_sizes(host.mask_query(3), 0) == (8, 0)
    assert host.query_count(host.mask_query(3)) == 3
    host.repeat_batch(cache, 2)
    other.batch_repeat_interleave(2)
    assert torch.equal(cache.layers[0].keys, other.layers[0].keys)
    assert host.token_layers(cache) == cache.layers and not host.state_tensors(cache)
    assert type(host.empty_cache(tiny_model("llama"))) is DynamicCache


@pytest.mark.skipif(not host.HOLDS_STATES, reason="caches of this transformers cannot hold states")
def test_a_cache_for_a_hybrid_model_and_its_copies() -> None:
    """Steps write states in place: a copy is not to see them."""
    model = tiny_model("qwen3_5")
    cache = host.empty_cache(model)
    with torch.no_grad():
        model(prompt(20), **{host.cache_name(model): cache})
    before = [state.clone() for state in host.state_tensors(cache)]
    cache.layers = [host.copied(layer) for layer in cache.layers]
    copied = [state.data_ptr() for state in host.state_tensors(cache)]
    assert before and all(map(torch.equal, before, host.state_tensors(cache)))
    with torch.no_grad():
        model(prompt(1), **{host.cache_name(model): cache})
    assert copied == [state.data_ptr() for state in host.state_tensors(cache)]
