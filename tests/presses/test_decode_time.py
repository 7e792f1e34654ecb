"""Eviction while decoding over a packed cache: kvpress's own answers, codes that only move, a byte budget."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import kvpress
import pytest
import torch
from transformers import DynamicCache

from quantpress.cache import cache_memory
from quantpress.cache.layer import PackedLayer
from quantpress.cache.tokens.packed_tokens import PackedTokens
from quantpress.errors import CompositionError, InvalidInputError
from quantpress.kernels.attend import DenseSegment
from quantpress.kernels.layout import unpack_pages
from quantpress.pipelines.capture.eligibility import why_not
from quantpress.pipelines.text_generation import TextGenerationPipeline
from quantpress.presses import DMS, AdaKV, Compose, Decoding, PrefillDecoding, SnapKV, TurboQuant
from tests.cache.test_memory import reachable_tensors
from tests.pipelines.words import text, word_tokenizer
from tests.presses.matrix import CONTEXT, CONTEXT_TOKENS, model_of, ours, theirs
from tests.presses.reading import lossless, read
from tests.tiny_models import prompt, tiny_model
from tests.versions import kvpress_names

NAME = "KnormPress"  # whose model answers


def keydiff(target_size: int = 400, interval: int = 4) -> kvpress.DecodingPress:
    """Its scores have no ties. Keys of a word have the same norm wherever it stands, so with Knorm the order
    of the cache, which is kvpress's own top-k there and that of the text here, would decide between them.
    """
    return Decoding(kvpress.KeyDiffPress(), compression_interval=interval, target_size=target_size)


def prefill_too() -> kvpress.PrefillDecodingPress:
    return PrefillDecoding(SnapKV(0.3, window_size=16), keydiff(300))


PRESSES: dict[str, Callable[[], Any]] = {
    "KeyDiff": keydiff,
    "KeyDiff, each token": lambda: keydiff(500, 1),
    "KeyDiff, less than a page": lambda: keydiff(50),
    "ExpectedAttention": lambda: Decoding(
        kvpress.ExpectedAttentionPress(n_sink=0), compression_interval=6, target_size=400
    ),
    "TOVA, once": lambda: Decoding(kvpress.TOVAPress(), compression_interval=7, target_size=400),
    "ratio": lambda: kvpress.CompressionRatioDecodingPress(
        kvpress.KeyDiffPress(), target_compression_ratio=0.4, compression_interval=4
    ),
    "SnapKV, then KeyDiff": prefill_too,
}


@contextmanager
def watched() -> Iterator[list[tuple[int, int, int]]]:
    """(tokens before, tokens kept, packed tokens afterwards) of every call of `keep`."""
    calls: list[tuple[int, int, int]] = []
    keep = PackedLayer.keep

    def watching(self: PackedLayer, kept: torch.Tensor) -> None:
        before = self.get_seq_length()
        keep(self, kept)
        calls.append((before, self.get_seq_length(), self.packed_tokens))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedLayer, "keep", watching)
        yield calls


@pytest.mark.parametrize("name", PRESSES)
def test_kvpress_answers_with_a_lossless_codec(name: str) -> None:
    expected = theirs(NAME, PRESSES[name]())
    assert expected != theirs(NAME, None), "the press changes nothing here: it would prove nothing"
    with watched() as calls:
        assert ours(NAME, Compose([PRESSES[name](), lossless()])) == expected
    assert calls and all(before > kept for before, kept, _ in calls)
    assert all(packed >= 128 for _, kept, packed in calls if kept >= 200)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Decoding(AdaKV(kvpress.KnormPress(0.0)), compression_interval=12, target_size=400),
        lambda: DMS(kvpress.KnormPress(), threshold=-8.5, sliding_window_size=8, decoding=True),
    ],
    ids=["AdaKV", "DMS"],
)
def test_those_that_hide_tokens_while_decoding(make: Callable[[], Any]) -> None:
    question = {"questions": [""], "max_new_tokens": 24}
    expected = theirs(NAME, make(), **question)
    assert expected != theirs(NAME, None, **question)
    assert ours(NAME, Compose([make(), lossless()]), **question) == expected


def test_the_packed_cache_may_be_made_by_a_wrapped_composition() -> None:
    """Then kvpress's own wrapper is the press, and its decoding press meets packed layers."""
    expected = theirs(NAME, prefill_too())
    wrapped = PrefillDecoding(Compose([SnapKV(0.3, window_size=16), lossless()]), keydiff(300))
    with watched() as calls:
        assert ours(NAME, wrapped) == expected
    assert calls


@pytest.mark.parametrize("quantizer", [lossless(), TurboQuant(4, recent_tokens=16)], ids=["lossless", "4"])
def test_every_question_finds_the_whole_context(quantizer: TurboQuant) -> None:
    """And leaves the cache as it was: codes, scales and all."""
    asked = [text(5, seed=1), text(9, seed=2), text(5, seed=1)]
    pipe = TextGenerationPipeline(model=model_of(NAME), tokenizer=word_tokenizer())
    press, cache, untouched = Compose([keydiff(), quantizer]), DynamicCache(), DynamicCache()
    with watched() as calls:
        one_by_one = [pipe(CONTEXT, press=press, question=one, max_new_tokens=16)["answer"] for one in asked]
        together = pipe(CONTEXT, press=press, questions=asked, max_new_tokens=16, cache=cache)["answers"]
    assert calls and together == one_by_one
    pipe(CONTEXT, press=quantizer, question="", max_new_tokens=1, cache=untouched)
    for layer, other in zip(cache.layers, untouched.layers, strict=True):
        assert layer.get_seq_length() == layer.tokens_seen == CONTEXT_TOKENS
        stored, expected = (
            one.tokens.packed_tensors() + one.tokens.dense_tensors() for one in (layer, other)
        )
        assert all(torch.equal(now, then) for now, then in zip(stored, expected, strict=True))


def test_codes_of_the_context_are_those_of_the_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token, after two evictions; what is encoded meanwhile is recent tokens that fill a page."""
    model, ids, encoded = tiny_model("llama"), prompt(640), []
    press = Compose([keydiff(400, 8), TurboQuant(4, recent_tokens=16)])
    with torch.inference_mode(), press(model):
        cache = DynamicCache()
        model(input_ids=ids, past_key_values=cache)
        before = [key_codes(layer) for layer in cache.layers]
        pack = PackedTokens.pack

        def counting(self: PackedTokens, old: DenseSegment) -> None:
            encoded.append(old.tokens)
            pack(self, old)

        monkeypatch.setattr(PackedTokens, "pack", counting)
        with watched() as calls:
            for step in range(16):
                position = torch.tensor([[640 + step]])
                model(input_ids=prompt(1, seed=step), past_key_values=cache, position_ids=position)
    layers = len(cache.layers)
    assert len(calls) == 2 * layers and all(packed >= 128 for *_, packed in calls)
    assert sum(encoded) <= 2 * 128 * layers
    for then, layer in zip(before, cache.layers, strict=True):
        assert layer.get_seq_length() == 400
        now = key_codes(layer)
        for head_then, head_now in zip(then, now, strict=True):
            found = (head_now[:, None] == head_then[None]).all(-1).any(-1)
            # All but those that were recent at the end of the prefill, 124 of them, or came later.
            assert int(found.sum()) >= len(head_now) - 140 and int(found.sum()) >= 100


def key_codes(layer: Any) -> list[torch.Tensor]:
    """Codes [T, D] and scale of each packed key, by head."""
    planes, spec = layer.tokens.key_pages.planes, layer.settings.key_codec.spec
    codes = unpack_pages(planes["codes0"], 4, spec.head_dim, "key").flatten(2, 3)[0]
    scales = planes["scale0"].flatten(2, 3)[0].unsqueeze(-1)
    return list(torch.cat([codes.float(), scales.float()], dim=-1))


def test_a_press_that_changes_values_is_refused_at_the_layer() -> None:
    """Where no Compose was asked: CAM over a cache that was packed before."""
    model = tiny_model("llama", "eager")
    cache = read(model, lossless(), prompt(400))
    press = kvpress.CAMPress(kvpress.KnormPress(), compression_interval=1, target_size=300)
    position = torch.tensor([[400]])
    with (
        torch.inference_mode(),
        kvpress_names(model, press),
        press(model),
        pytest.raises(InvalidInputError, match="changes keys or values must come before TurboQuant"),
    ):
        for _ in range(2):
            model(input_ids=prompt(1), past_key_values=cache, position_ids=position)


@pytest.mark.slow
def test_a_long_generation_stays_within_its_bytes() -> None:
    """900 tokens and 400 more: never more than the windows in the model's dtype and the target in codes."""
    bits, target, interval, recent, sinks = 4, 256, 64, 64, 4
    model = tiny_model("llama")
    press = Compose([keydiff(target, interval), TurboQuant(bits, recent_tokens=recent, sink_tokens=sinks)])
    cache, sizes = DynamicCache(), []
    with torch.inference_mode(), press(model):
        ids = prompt(900)
        for step in range(400):
            position = torch.arange(ids.shape[1])[None] if step == 0 else torch.tensor([[899 + step]])
            logits = model(input_ids=ids, past_key_values=cache, position_ids=position).logits
            ids = logits[:, -1:].argmax(-1)
            if step % 16 == 0 or step % interval in (0, interval - 1):
                sizes.append(cache_memory(cache).total_bytes)
    memory = cache_memory(cache)
    walk = reachable_tensors([vars(layer) for layer in cache.layers], {})
    assert memory.total_bytes == sum(tensor.untyped_storage().nbytes() for tensor in walk.values())
    config = model.config
    row = 2 * config.num_key_value_heads * config.head_dim  # numbers of a token
    codes = row * (4 / 8 + 2 / config.head_dim) * (target + interval) * 17 / 16
    # 16-bit tokens: sinks, recent ones, a page that fills up, and what filled no page at the last eviction.
    windows = row * 4 * (sinks + recent + 2 * 128)
    budget = config.num_hidden_layers * (codes + windows + 6 * row * 4)
    everything = config.num_hidden_layers * row * 4 * 1300
    assert max(sizes) <= budget < 0.3 * everything
    assert max(sizes[len(sizes) // 2 :]) <= max(sizes[: len(sizes) // 2])


def test_sliding_window_layers_are_left_to_the_model() -> None:
    pipe = TextGenerationPipeline(model=tiny_model("gemma3"), tokenizer=word_tokenizer())
    asked = {"question": text(5, seed=1), "max_new_tokens": 12}
    expected = pipe(CONTEXT, press=keydiff(200), **asked)["answer"]
    assert expected != pipe(CONTEXT, **asked)["answer"]
    with watched() as calls:
        assert pipe(CONTEXT, press=Compose([keydiff(200), lossless()]), **asked)["answer"] == expected
    assert calls


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_graph_would_not_run_the_eviction(family: str) -> None:
    """Also in a model that kvpress does not support, where the hook is wrapped."""
    model = tiny_model(family)
    with Compose([keydiff(), lossless()])(model):
        assert "forward hook" in str(why_not(model=model))
    with Compose([lossless()])(model):
        assert not why_not(model=model)


@pytest.mark.parametrize("quantizers", [[], [lossless()]], ids=["alone", "packed"])
def test_padded_batches_are_refused(quantizers: list[TurboQuant]) -> None:
    model, mask = tiny_model("llama"), torch.ones(2, 200, dtype=torch.int64)
    mask[0, :9] = 0
    with (
        torch.inference_mode(),
        Compose([keydiff(), *quantizers])(model),
        pytest.raises(CompositionError, match=r"DecodingPress evicts while decoding.*of a padded batch"),
    ):
        model(input_ids=prompt(200).expand(2, -1), attention_mask=mask, past_key_values=DynamicCache())


def test_batches_without_padding() -> None:
    """Each text for itself; `generate` counts positions on."""
    model, ids = tiny_model("llama"), torch.cat([prompt(300, seed=1), prompt(300, seed=2)])
    how: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    with torch.inference_mode(), kvpress_names(model, keydiff(200)), keydiff(200)(model):
        expected = model.generate(ids, **how)
    with torch.inference_mode(), Compose([keydiff(200), lossless()])(model), watched() as calls:
        assert torch.equal(model.generate(ids, **how), expected)
    assert calls
