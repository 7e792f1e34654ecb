"""Calibration: what it sums up over pieces is what `key_statistics` finds in all tokens at once."""

from typing import Any

import pytest
import torch
from torch import nn

from quantpress.cache import host
from quantpress.cache.saved.model_profile import ModelProfile
from quantpress.errors import EmptyContextError, InvalidInputError, NonFiniteError, UnsupportedModelError
from quantpress.pipelines.calibration import calibrate
from quantpress.presses.models.attention import hooked
from quantpress.presses.packing.prefill_hook import prefill_call
from quantpress.presses.packing.queries import last_queries
from quantpress.quantization.transform import key_statistics
from tests.pipelines.words import text, word_tokenizer
from tests.tiny_models import MODELS, tiny_model

SINKS = 4
FAMILIES = ("llama", "qwen3", "phi3", "gemma3", "phi", "multi_query")


def profile_of(family: str, words: int = 1300, **options: Any) -> ModelProfile:
    return calibrate(tiny_model(family), word_tokenizer(), {"words": text(words)}, progress=False, **options)


def states(family: str, ids: torch.Tensor) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Keys [1, Hkv, T, D] and squared queries, averaged over the heads of a group, of each full layer."""
    model, found = tiny_model(family), {}

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        call: Any = prefill_call(module, args, kwargs)
        keys = call.cache.layers[call.layer_idx].keys
        queries = last_queries(module, call.hidden_states, call.position_embeddings, keys.shape[2])
        squares = queries.double().square().unflatten(1, (keys.shape[1], -1)).mean(2)
        found[call.layer_idx] = keys.double(), squares

    with torch.no_grad(), hooked(model, hook):
        decoder = model.get_decoder()
        decoder(input_ids=ids, **{host.cache_name(decoder): host.empty_cache(model)}, use_cache=True)
    return found


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_all_tokens_at_once(family: str, pieces: int) -> None:
    words = 600 * pieces
    tokenizer = word_tokenizer()
    profile = profile_of(family, words, tokens=words, piece_tokens=600)
    ids = tokenizer.encode(text(words), add_special_tokens=False)
    read = [
        states(family, torch.tensor([[tokenizer.bos_token_id, *ids[at : at + 600]]]))
        for at in range(0, words, 600)
    ]
    assert profile.tokens == pieces * (601 - SINKS) and profile.piece_tokens == 600
    assert profile.statistics.keys() == read[0].keys()
    for index, found in profile.statistics.items():
        keys, squares = (torch.cat([one[index][i][:, :, SINKS:] for one in read], 2) for i in (0, 1))
        expected = key_statistics(keys.float(), squares.mean(2).float(), ())
        for name, part in expected.tensors().items():
            torch.testing.assert_close(found.tensors()[name], part, rtol=1e-4, atol=1e-5)


def test_only_layers_that_are_packed_are_in_it() -> None:
    assert set(profile_of("gemma3").statistics) == {1, 2}


@pytest.mark.skipif(not host.HOLDS_STATES, reason="caches of this transformers cannot hold states")
def test_hybrid_models_have_their_attention_layers() -> None:
    model = tiny_model("qwen3_5")
    kinds = model.config.get_text_config().layer_types
    full = {index for index, kind in enumerate(kinds) if kind == "full_attention"}
    assert set(profile_of("qwen3_5").statistics) == full


@pytest.mark.skipif("gemma4" not in MODELS, reason="this transformers has no such models")
@pytest.mark.filterwarnings("ignore:the queries of Gemma4TextAttention")
def test_layers_may_differ_in_shape() -> None:
    model = tiny_model("gemma4")
    profile = profile_of("gemma4")
    assert set(profile.statistics) == {1}  # 3 reads the keys of another layer
    profile.check(model.config)


def test_texts_share_the_tokens_and_positions_bound_a_piece() -> None:
    texts = {"a": text(5000), "b": text(5000, seed=1)}
    profile = calibrate(tiny_model("llama"), word_tokenizer(), texts, 4000, 10**6, progress=False)
    assert profile.text == "a, b" and profile.piece_tokens == 4095
    assert profile.tokens == 2 * (2001 - SINKS)


def test_a_layer_whose_queries_are_unknown_is_centred_only(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = profile_of("llama", 700)
    monkeypatch.setattr("quantpress.presses.packing.queries._project", lambda *_: torch.zeros(1, 1, 1, 1))
    with pytest.warns(UserWarning, match="queries of LlamaAttention are not known"):
        profile = profile_of("llama", 700)
    for index, found in profile.statistics.items():
        assert torch.equal(found.tensors()["mean"], expected.statistics[index].tensors()["mean"])
        assert bool((found.tensors()["weight"] == 1).all())


@pytest.mark.parametrize(
    ("family", "reason"),
    [("deepseek_v3", "latent vector"), ("mistral_sliding", "sliding window")],
)
def test_models_without_such_keys_are_refused(family: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        profile_of(family)


def test_wrong_amounts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInputError, match=r"297 tokens are left of words .* give at least 512"):
        profile_of("llama", 300)
    with pytest.raises(InvalidInputError, match="pieces of 4"):
        profile_of("llama", piece_tokens=4)
    with pytest.raises(EmptyContextError, match="no text"):
        calibrate(tiny_model("llama"), word_tokenizer(), {})
    with monkeypatch.context() as patch:
        weight = tiny_model("llama").model.layers[1].self_attn.k_proj.weight
        patch.setattr(weight, "data", weight.data * float("nan"))
        with pytest.raises(NonFiniteError):
            profile_of("llama")
