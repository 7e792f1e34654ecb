"""`enable`: every later generate compresses its cache, and `disable` leaves nothing behind."""

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import kvpress
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
    TextGenerationPipeline,
    TextIteratorStreamer,
)

from quantpress.cache import PackedLayer, cache_memory, continue_inputs
from quantpress.cache.text_cache import TextCache
from quantpress.errors import CompositionError, InvalidInputError, UnsupportedModelError
from quantpress.pipelines.captured import captured_decoding
from quantpress.pipelines.enabling import disable, enable, enabled_press
from quantpress.pipelines.prefill import chunked_prefill
from quantpress.pipelines.preserve import unchanged_model
from quantpress.pipelines.replaced import Replaced
from quantpress.presses import (
    DMS,
    AdaKV,
    Compose,
    Decoding,
    KeyRerotation,
    Knorm,
    KVCompose,
    KVzip,
    PyramidKV,
    SnapKV,
    StreamingLLM,
    TurboQuant,
)
from tests.pipelines.words import ours, text, word_tokenizer
from tests.presses.reading import lossless, multimodal_gemma3
from tests.presses.test_generation import Tokenizer
from tests.tiny_models import FAMILIES, prompt, tiny_model

TOKENS = 420
IDS = prompt(TOKENS, seed=3)
NEXT = prompt(20, seed=5)
GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
FULL = {**GREEDY, "return_dict_in_generate": True}
SNAP = SnapKV(0.5, window_size=16)
NO_END = {"eos_token_id": [255], "pad_token_id": 0}  # prompt lookup wants one


def packed(cache: Any) -> list[bool]:
    return [isinstance(layer, PackedLayer) and layer.packed_tokens > 0 for layer in cache.layers]


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that every module of a model holds, hooks too, by identity."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            inner = list(value.items()) if isinstance(value, dict) else value
            found[f"{name}.{attribute}"] = [(k, id(v)) for k, v in inner] if inner is not value else id(value)
    return found


def pressed_by_hand(
    model: PreTrainedModel, press: Any, ids: torch.Tensor
) -> tuple[torch.Tensor, DynamicCache]:
    """What the context of a press around `generate` gives."""
    cache = DynamicCache(config=model.config)
    with press(model):
        return model.generate(ids, past_key_values=cache, **GREEDY), cache


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "qwen3_sliding", "multi_query", "gpt_neox", "phi"])
@pytest.mark.filterwarnings("ignore:the queries of .* are not known")
def test_generate_equals_the_uncompressed_model_with_a_lossless_codec(family: str) -> None:
    model = tiny_model(family)
    expected = model.generate(IDS, **GREEDY)
    with enable(model, lossless()):
        got = model.generate(IDS, **FULL)
    assert torch.equal(got.sequences, expected)
    assert packed(got.past_key_values) == [
        not layer.is_sliding for layer in DynamicCache(config=model.config).layers
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_eviction_and_packing_equal_the_press_s_own_context(family: str) -> None:
    model = multimodal_gemma3() if family == "gemma3" else tiny_model(family)
    expected, cache = pressed_by_hand(model, Compose([SNAP]), IDS)
    assert not torch.equal(expected, model.generate(IDS, **GREEDY)), "nothing evicted: proves nothing"
    with enable(model, Compose([SNAP, lossless()])):
        got = model.generate(IDS, **FULL)
    assert torch.equal(got.sequences, expected)
    assert any(packed(got.past_key_values))
    kept = [layer.get_seq_length() for layer in got.past_key_values.layers]
    assert kept == [layer.get_seq_length() for layer in cache.layers]
    assert got.past_key_values.get_seq_length() == got.sequences.shape[1] - 1


def test_bits_are_bits_in_memory() -> None:
    model, ids = tiny_model("llama"), prompt(1400)
    with enable(model, 3, recent_tokens=32):
        cache = model.generate(ids, **FULL).past_key_values
    plain = model.generate(ids, **FULL).past_key_values
    held = sum(tensor.nbytes for layer in plain.layers for tensor in (layer.keys, layer.values))
    assert held / cache_memory(cache).total_bytes > 4


@pytest.mark.parametrize(
    ("press", "shown"),
    [
        (None, "TurboQuant(4)"),
        (3, "TurboQuant(3)"),
        (2.5, "TurboQuant(2.5)"),
        ("quality", "TurboQuant(4, key_bits=8, value_bits=4)"),
        (TurboQuant, "TurboQuant(4)"),
        ([SnapKV, TurboQuant], "SnapKV(0.5) | TurboQuant(4)"),
        (kvpress.KnormPress(0.3), "KnormPress(0.3)"),
    ],
    ids=str,
)
def test_what_may_be_given(press: Any, shown: str) -> None:
    model = tiny_model("llama")
    with enable(model, press):
        assert repr(enabled_press(model)) == f"Compose({shown})"
    assert enabled_press(model) is None


# Turns of a chat


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
def test_a_cache_given_back_goes_on_where_it_was(family: str) -> None:
    model = tiny_model(family)
    with enable(model, lossless()):
        first = model.generate(IDS, **FULL)
        conversation = torch.cat([first.sequences, NEXT], dim=1)
        second = model.generate(conversation, past_key_values=first.past_key_values, **FULL)
        third = torch.cat([second.sequences, NEXT], dim=1)
        got = model.generate(third, past_key_values=second.past_key_values, **GREEDY)
    assert second.past_key_values is first.past_key_values
    assert torch.equal(second.sequences, model.generate(conversation, **GREEDY))
    assert torch.equal(got, model.generate(third, **GREEDY))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_turn_over_an_evicted_cache(attention: str, quantized: bool) -> None:
    """The new tokens stand where the text says; by hand this takes `continue_inputs`."""
    model = tiny_model("llama", attention)
    answer, cache = pressed_by_hand(model, Compose([SNAP]), IDS)
    conversation = torch.cat([answer, NEXT], dim=1)
    seen = answer.shape[1] - 1
    rest = continue_inputs(cache, conversation[:, seen:], tokens_seen=seen)
    expected = model.generate(**rest, past_key_values=cache, **GREEDY)[:, rest["input_ids"].shape[1] :]
    with enable(model, Compose([SNAP, lossless()]) if quantized else SNAP):
        first = model.generate(IDS, **FULL)
        got = model.generate(conversation, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(first.sequences, answer)
    assert torch.equal(got[:, conversation.shape[1] :], expected)


@pytest.mark.parametrize("evict", [False, True])
def test_guesses_over_a_cache_given_back(evict: bool) -> None:
    """Rejected guesses are dropped from the end of the text, whatever was evicted before."""
    model = tiny_model("llama")
    press = Compose([SNAP, lossless()]) if evict else lossless()
    with enable(model, press):
        answers = []
        for options in ({}, {"prompt_lookup_num_tokens": 4}):
            first = model.generate(IDS, **FULL, **NO_END)
            conversation = torch.cat([first.sequences, NEXT, NEXT], dim=1)
            cache = first.past_key_values
            answers.append(model.generate(conversation, past_key_values=cache, **GREEDY, **options, **NO_END))
    assert torch.equal(*answers)


def test_layers_of_different_lengths() -> None:
    """kvpress fails at the second turn: the model's one mask does not fit."""
    model, ids = tiny_model("llama"), prompt(800)
    with enable(model, Compose([PyramidKV(0.5, window_size=8, beta=2)])):
        first = model.generate(ids, **FULL)
        kept = {layer.get_seq_length() for layer in first.past_key_values.layers}
        conversation = torch.cat([first.sequences, NEXT], dim=1)
        got = model.generate(conversation, past_key_values=first.past_key_values, **FULL)
    assert len(kept) > 1
    assert {got.past_key_values.get_seq_length(index) for index in range(3)} == {got.sequences.shape[1] - 1}


def test_positions_of_a_press_that_numbers_tokens_anew() -> None:
    model = tiny_model("llama")
    press = KeyRerotation(StreamingLLM(0.5))
    cache = DynamicCache()
    with torch.inference_mode(), press(model):
        logits = model(input_ids=IDS, past_key_values=cache).logits
    expected = [int(logits[0, -1].argmax())]
    for position in range(TOKENS // 2, TOKENS // 2 + 9):
        token, place = torch.tensor([expected[-1:]]), torch.tensor([[position]])
        with torch.inference_mode():
            logits = model(input_ids=token, past_key_values=cache, position_ids=place).logits
        expected.append(int(logits[0, -1].argmax()))
    with enable(model, Compose([press, lossless()])):
        assert model.generate(IDS, **GREEDY)[0, TOKENS:].tolist() == expected


# Presses that leave something on the model, or act at another time


def test_masks_of_head_wise_presses_go_with_the_cache() -> None:
    """Two conversations take turns, and a cache of the caller's own comes between."""
    model, ids = tiny_model("llama"), [IDS, prompt(TOKENS, seed=9)]
    press = AdaKV(Knorm(0.5))
    before = state(model)
    with enable(model, Compose([press, lossless()])):
        alone = []
        for one in ids:
            first = model.generate(one, **FULL)
            conversation = torch.cat([first.sequences, NEXT], dim=1)
            alone.append(model.generate(conversation, past_key_values=first.past_key_values, **GREEDY))
        turns = [model.generate(one, **FULL) for one in ids]
        together = []
        for turn in turns:
            model.generate(IDS, past_key_values=DynamicCache(), **GREEDY)
            conversation = torch.cat([turn.sequences, NEXT], dim=1)
            together.append(model.generate(conversation, past_key_values=turn.past_key_values, **GREEDY))
    assert all(map(torch.equal, alone, together))
    masked = turns[0].past_key_values.masked
    assert set(masked) == {0, 1, 2}
    left = {name for name, value in state(model).items() if before.get(name) != value}
    assert all(name.endswith("masked_key_indices") for name in left)  # None: kvpress's mark of any prefill
    assert all(layer.self_attn.masked_key_indices is None for layer in model.model.layers)


def test_a_press_that_acts_when_its_context_ends() -> None:
    """With the press's context around all of generate this is refused: it would read the answer again."""
    model = tiny_model("llama")
    with enable(model, Compose([KVCompose(compression_ratio=0.5), lossless()])):
        cache = model.generate(IDS, **FULL).past_key_values
    kept = [layer.get_seq_length() for layer in cache.layers]
    assert all(9 < length < 0.7 * TOKENS for length in kept)
    assert cache.get_seq_length() == TOKENS + 9


@pytest.mark.parametrize("quantized", [False, True])
def test_kvzip_reads_the_prompt_again_before_the_first_token(
    quantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens equal those decoded by hand from a cache that kvpress's own context has read."""
    monkeypatch.setattr("kvpress.presses.kvzip_press.AutoTokenizer", Tokenizer)
    model, cache = tiny_model("llama"), DynamicCache()
    plain = model.generate(IDS, **GREEDY)[0, TOKENS:].tolist()
    with unchanged_model(model), torch.inference_mode():
        with kvpress.KVzipPress(0.5)(model):
            logits = model(input_ids=IDS, past_key_values=cache).logits
        expected = [int(logits[0, -1].argmax())]
        while len(expected) < 10:
            step = {"input_ids": torch.tensor([expected[-1:]]), "past_key_values": cache}
            expected.append(int(model(**step).logits[0, -1].argmax()))
    assert expected != plain, "nothing evicted: the comparison would prove nothing"
    with enable(model, Compose([KVzip(0.5), lossless()] if quantized else [KVzip(0.5)])):
        got = model.generate(IDS, **FULL)
    assert got.sequences[0, TOKENS:].tolist() == expected
    assert packed(got.past_key_values) == [quantized] * 3


@pytest.mark.parametrize(
    "make",
    [
        lambda: Decoding(Knorm(), compression_interval=8, target_size=64),
        lambda: DMS(Knorm(), threshold=-12, decoding=True),
    ],
    ids=["Decoding", "DMS"],
)
def test_presses_that_act_during_decoding(make: Any) -> None:
    model = tiny_model("llama")
    options = {"max_new_tokens": 40, "do_sample": False}
    with make()(model):
        expected = model.generate(IDS, **options)
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    with enable(model, make()):
        got = model.generate(IDS, **options, return_dict_in_generate=True)
    assert torch.equal(got.sequences, expected)
    assert got.past_key_values.get_seq_length() == TOKENS + 39
    if isinstance(make(), kvpress.DecodingPress):
        assert got.past_key_values.layers[0].get_seq_length() < 64 + 9
    assert not model.model.layers[0].self_attn._forward_hooks


# Ways of decoding


def test_prompt_lookup_and_an_assistant_equal_greedy_decoding() -> None:
    model, assistant = tiny_model("llama"), tiny_model("llama", seed=1)
    ids = torch.cat([IDS, IDS[:, :40]], dim=1)
    expected = model.generate(ids, **GREEDY, **NO_END)
    with enable(model, lossless()), enable(assistant, lossless()):
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=5, **GREEDY, **NO_END), expected)
        got = model.generate(ids, assistant_model=assistant, **FULL, **NO_END)
    assert torch.equal(got.sequences, expected)
    assert packed(got.past_key_values) == [True] * 3


def test_guesses_with_codes_differ_from_greedy_only_where_pages_are_packed() -> None:
    """While no page fills up, the same tokens lie in codes."""
    model = tiny_model("llama")
    with enable(model, 4):
        expected = model.generate(IDS, **GREEDY, **NO_END)
        assert torch.equal(model.generate(IDS, prompt_lookup_num_tokens=5, **GREEDY, **NO_END), expected)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_beams(options: dict[str, int]) -> None:
    model = tiny_model("llama")
    expected = model.generate(IDS, **GREEDY, **options)
    with enable(model, lossless()):
        assert torch.equal(model.generate(IDS, **GREEDY, **options), expected)


def test_beams_after_an_eviction() -> None:
    model = tiny_model("llama")
    options = {**GREEDY, "num_beams": 3}
    with Compose([SNAP])(model):
        expected = model.generate(IDS, **options)
    with enable(model, Compose([SNAP, lossless()])):
        assert torch.equal(model.generate(IDS, **options), expected)
    assert not torch.equal(model.generate(IDS, **options), expected)


def test_embeddings_instead_of_ids() -> None:
    model = tiny_model("llama")
    embedded = model.get_input_embeddings()(IDS)
    with enable(model, Compose([SNAP, lossless()])):
        expected = model.generate(IDS, **GREEDY)
        assert torch.equal(model.generate(inputs_embeds=embedded, **GREEDY), expected[:, TOKENS:])


def test_sampling_and_streaming() -> None:
    model, tokenizer = tiny_model("llama"), word_tokenizer()
    options = {"max_new_tokens": 10, "do_sample": True, "temperature": 0.9}
    texts = []
    for press in (None, lossless()):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        if press is not None:
            enable(model, press)
        torch.manual_seed(3)
        thread = threading.Thread(
            target=model.generate, args=(IDS,), kwargs={**options, "streamer": streamer}
        )
        thread.start()
        texts.append("".join(streamer))
        thread.join()
        disable(model)
    assert texts[0] == texts[1] and len(texts[0].split()) == 10


def test_small_activations_while_the_prompt_is_read() -> None:
    model = tiny_model("llama")
    with enable(model, lossless()):
        expected = model.generate(IDS, **GREEDY)
        with chunked_prefill(model, 64):
            assert torch.equal(model.generate(IDS, **GREEDY), expected)


def test_left_padded_batch() -> None:
    model = tiny_model("llama")
    ids, mask = prompt(TOKENS, batch=2, seed=3), torch.ones(2, TOKENS, dtype=torch.int64)
    ids[1, :37], mask[1, :37] = 0, 0
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    with enable(model, lossless()):
        first = model.generate(ids, attention_mask=mask, **FULL)
        assert torch.equal(first.sequences, expected)
        rest = torch.cat([first.sequences, NEXT.expand(2, -1)], dim=1)
        longer = torch.cat([mask, torch.ones(2, rest.shape[1] - TOKENS, dtype=torch.int64)], dim=1)
        got = model.generate(rest, attention_mask=longer, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(got, model.generate(rest, attention_mask=longer, **GREEDY))
    with enable(model, SNAP), pytest.raises(CompositionError, match="padded batch"):
        model.generate(ids, attention_mask=mask, **GREEDY)


def test_captured_decoding_inside() -> None:
    """On the CPU the steps at fixed addresses run eagerly, and the same code decides."""
    model, ids = tiny_model("llama"), prompt(400)
    with enable(model, Compose([SNAP, lossless()])):
        expected = model.generate(ids, max_new_tokens=60, do_sample=False)
        with captured_decoding(model) as steps:
            got = model.generate(ids, max_new_tokens=60, return_dict_in_generate=True, do_sample=False)
        assert steps.eager_steps > 50
    assert torch.equal(got.sequences, expected)
    assert got.past_key_values.get_seq_length() == 459


def test_threads_take_turns() -> None:
    model, prompts = tiny_model("llama"), [prompt(300, seed=seed) for seed in range(4)]
    answers: dict[int, torch.Tensor] = {}
    with enable(model, Compose([SNAP, lossless()])):
        expected = [model.generate(ids, **GREEDY) for ids in prompts]

        def answer(index: int) -> None:
            answers[index] = model.generate(prompts[index], **GREEDY)

        threads = [threading.Thread(target=answer, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(answers[index], expected[index]) for index in range(4))


# Pipelines


def test_pipelines_use_it() -> None:
    model, tokenizer = tiny_model("llama"), word_tokenizer()
    context = text(400)
    plain = TextGenerationPipeline(model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    expected = plain(context, **options)
    answer = ours()(context, question="w1 w2", press=Compose([SNAP, TurboQuant(3)]), report=True)
    with enable(model, lossless()):
        assert plain(context, **options) == expected
    with enable(model, Compose([SNAP, TurboQuant(3)])):
        got = ours()(context, question="w1 w2", report=True)
        unpressed = plain(context, **options)
    assert got["answer"] == answer["answer"]
    assert got["report"].resident_bytes == answer["report"].resident_bytes
    assert unpressed != expected


# What is left alone


def test_caches_of_the_caller_and_other_forwards_are_left_alone() -> None:
    model, cache = tiny_model("llama"), DynamicCache()
    expected = model.generate(IDS, **GREEDY)
    logits = model(IDS).logits
    with enable(model, Compose([SNAP, TurboQuant(2)])):
        assert torch.equal(model.generate(IDS, past_key_values=cache, **GREEDY), expected)
        assert type(cache) is DynamicCache and cache.get_seq_length() == TOKENS + 9
        assert not any(packed(cache))
        assert torch.equal(model.generate(IDS, use_cache=False, **GREEDY), expected)
        assert torch.equal(model(IDS).logits, logits)


def test_disable_restores_everything() -> None:
    model = tiny_model("llama")
    model.generate(IDS, **GREEDY)  # kvpress leaves its mark at the first prefill of all
    before, answer = state(model), model.generate(IDS, **GREEDY)
    for press in (
        4,
        Compose([SNAP, TurboQuant]),
        Compose([AdaKV(Knorm(0.5)), TurboQuant]),
        Decoding(Knorm()),
    ):
        handle = enable(model, press)
        assert state(model) != before
        model.generate(IDS, **GREEDY)
        disable(model)
        assert state(model) == before
        handle.__exit__()  # leaving a context that was undone by hand
    disable(model)
    assert torch.equal(model.generate(IDS, **GREEDY), answer)


@pytest.mark.parametrize("press", [4, SNAP, Decoding(Knorm())], ids=["quantizer", "evictor", "decoding"])
def test_exceptions_pass_through(press: Any) -> None:
    """In the middle of a prefill, and later."""
    model = tiny_model("llama")
    model.generate(IDS, **GREEDY)
    before = state(model)
    with pytest.raises(RuntimeError, match="on purpose"), enable(model, press):
        inside = state(model)
        handle = model.model.layers[1].mlp.register_forward_hook(_fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            model.generate(IDS, **GREEDY)
        handle.remove()
        assert state(model) == inside
        assert model.generate(IDS, **GREEDY).shape[1] == TOKENS + 10
        model.generate(IDS, logits_processor=[_fail], **GREEDY)
    assert state(model) == before


def _fail(*_: Any) -> None:
    raise RuntimeError("on purpose")


def test_models_are_independent() -> None:
    first, second = tiny_model("llama"), tiny_model("qwen3")
    with enable(first, lossless()), enable(second, SNAP):
        caches = [model.generate(IDS, **FULL).past_key_values for model in (first, second)]
    assert packed(caches[0]) == [True] * 3 and packed(caches[1]) == [False] * 3
    assert caches[1].layers[0].get_seq_length() == TOKENS // 2 + 9


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_is_enabled_by_itself(way: str) -> None:
    model = tiny_model("llama")
    with enable(model, Compose([SNAP, TurboQuant(3)])):
        expected = model.generate(IDS, **GREEDY)
        other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert "forward" not in vars(model)
    assert all(replaced.owner is other for replaced in vars(other)["_quantpress_enabled"]._replaced)
    assert vars(other)["forward"].original.__self__ is other
    for layer in model.model.layers:  # the copy does not run through the original
        layer.mlp.forward = _fail
    try:
        assert torch.equal(other.generate(IDS, **GREEDY), expected)
    finally:
        for layer in model.model.layers:
            del layer.mlp.forward
    disable(other)
    assert not {"forward", "generate", "_prepare_cache_for_generation"} & set(vars(other))


def test_saved_model_is_the_plain_one(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with enable(model, 4):
        model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert enabled_press(loaded) is None
    assert torch.equal(loaded.generate(IDS, **GREEDY), model.generate(IDS, **GREEDY))


# Refusals


def test_enabled_twice() -> None:
    model = tiny_model("llama")
    with enable(model, 4), pytest.raises(InvalidInputError, match=r"enabled already, with Compose.*disable"):
        enable(model, 3)
    assert enabled_press(model) is None


def test_something_on_top_is_not_torn_off() -> None:
    model = tiny_model("llama")
    enable(model, 4)
    with captured_decoding(model), pytest.raises(InvalidInputError, match="forward was replaced again"):
        disable(model)
    assert enabled_press(model) is not None
    disable(model)
    assert "forward" not in vars(model)


@pytest.mark.parametrize(
    ("press", "options", "reason"),
    [
        (4, {"cache_implementation": "static"}, "StaticCache here .*'static'.*cannot be compressed"),
        (4, {"prefill_chunk_size": 64}, "prefill_chunk_size=64 would show the press"),
        (SNAP, {"prompt_lookup_num_tokens": 3}, "might evict them"),
        (Decoding(Knorm()), {"num_beams": 2}, "acts during decoding"),
        (4, {"cache_implementation": "paged"}, "continuous batching"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_settings_that_rule_it_out(press: Any, options: dict[str, Any], reason: str) -> None:
    model = tiny_model("llama")
    with enable(model, press), pytest.raises(InvalidInputError, match=reason):
        model.generate(IDS, **GREEDY, **NO_END, **options)
    assert not vars(model).keys() & {"forward", "generate"}


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("lfm2", "cache of its own kind"),
        ("bloom", "does not call attention through"),
        ("mistral_sliding", "every layer of Mistral.* sliding window"),
    ],
)
def test_models_that_cannot_be_packed_are_refused_at_once(family: str, reason: str) -> None:
    model = tiny_model(family, "eager" if family == "bloom" else "sdpa")
    with pytest.raises(UnsupportedModelError, match=reason):
        enable(model, 4)
    assert "_quantpress_enabled" not in vars(model) and "forward" not in vars(model)


@pytest.mark.parametrize("family", ["jamba", "falcon_h1"])
def test_a_cache_of_another_kind_is_not_passed_over(family: str) -> None:
    model = tiny_model(family)
    with pytest.raises(UnsupportedModelError, match="cache of its own"), enable(model, 4):
        model.generate(IDS, **GREEDY)


@pytest.mark.parametrize(
    ("give", "error", "reason"),
    [
        (lambda model: enable(model.model, 4), UnsupportedModelError, "no transformers model that generates"),
        (lambda model: enable(nn.Linear(2, 2), 4), UnsupportedModelError, "no transformers model"),
        (lambda model: enable(model, SNAP, bits=3), InvalidInputError, "bits given beside SnapKV"),
        (lambda model: enable(model, "tiny"), InvalidInputError, "no preset 'tiny'"),
        (lambda model: enable(model, 17), InvalidInputError, "17"),
        (lambda model: enable(model, object()), InvalidInputError, "is no press"),
    ],
    ids=["backbone", "no model", "options", "preset", "bits", "object"],
)
def test_wrong_arguments(give: Any, error: type[Exception], reason: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(error, match=reason):
        give(model)
    assert enabled_press(model) is None


def test_a_method_of_the_object_s_own_is_put_back() -> None:
    """As `device_map` leaves a model: its forward is in the object already."""
    layer = nn.Linear(2, 2)
    own = layer.forward = lambda x: x + 1  # type: ignore[method-assign]
    outer = Replaced(layer, "forward", lambda forward, x: 2 * forward(x))
    inner = Replaced(layer, "forward", lambda forward, x: 3 * forward(x))
    assert float(layer(torch.tensor(1.0))) == 12
    with pytest.raises(InvalidInputError, match=r"Linear\.forward was replaced again"):
        outer.undo()
    inner.undo()
    outer.undo()
    assert vars(layer)["forward"] is own


def test_text_cache_counts_the_text() -> None:
    cache = TextCache()
    states = torch.arange(6.0)[None, None, :, None]
    cache.update(states, states, 0)
    cache.layers[0].keys = cache.layers[0].values = states[:, :, 2:]
    cache.has_read(6)
    cache.update(states[:, :, :3], states[:, :, :3], 0)
    assert cache.get_seq_length() == 9 and cache.get_mask_sizes(torch.arange(9, 11), 0) == (9, 2)
    cache.crop(7)
    assert cache.get_seq_length() == 7 and cache.layers[0].keys.flatten().tolist() == [2, 3, 4, 5, 0]
    cache.crop(-1)
    cache.crop(100)
    assert cache.get_seq_length() == 6
    other = copy.deepcopy(cache)
    cache.reset()
    assert cache.evicted == {} and other.get_seq_length() == 6
