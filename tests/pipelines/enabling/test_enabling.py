"""`enable`: every later generate compresses its cache, and `disable` leaves nothing behind."""

import threading
from typing import Any

import kvpress
import pytest
import torch
from transformers import (
    DynamicCache,
    PreTrainedModel,
    TextIteratorStreamer,
)

from quantpress.cache import cache_memory, continue_inputs
from quantpress.errors import CompositionError, InvalidInputError
from quantpress.pipelines.capture.captured import captured_decoding
from quantpress.pipelines.enabling.enable import disable, enable
from quantpress.pipelines.press_argument import enabled_press
from quantpress.pipelines.reading.chunked_prefill import chunked_prefill
from quantpress.pipelines.rollback import model_rollback
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
from tests.pipelines.enabling.enabled import FULL, GREEDY, IDS, NEXT, NO_END, SNAP, TOKENS, packed, state
from tests.pipelines.words import word_tokenizer
from tests.presses.reading import lossless, multimodal_gemma3
from tests.presses.test_generation import Tokenizer
from tests.tiny_models import FAMILIES, prompt, tiny_model
from tests.versions import kvpress_names


def pressed_by_hand(
    model: PreTrainedModel, press: Any, ids: torch.Tensor
) -> tuple[torch.Tensor, DynamicCache]:
    """The result of `generate` inside the context of a press."""
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
        ("quality", "TurboQuant(4, key_bits=8, value_bits=4, recent_tokens=64, detect_sinks=8)"),
        (TurboQuant, "TurboQuant(4)"),
        ("SnapKV(0.5) | TurboQuant(bits=3)", "SnapKV(0.5) | TurboQuant(3)"),
        ([SnapKV, TurboQuant], "SnapKV(0.5) | TurboQuant(4)"),
        (SnapKV | TurboQuant, "SnapKV(0.5) | TurboQuant(4)"),
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
    """New tokens have their positions in the text; without `enable` this needs `continue_inputs`."""
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
    """Rejected guesses are dropped from the end of the text, even after an eviction."""
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
    """kvpress fails at the second turn, because the model's only mask does not fit."""
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


@pytest.mark.parametrize("quantized", [False, True])
def test_masks_of_head_wise_presses_go_with_the_cache(quantized: bool) -> None:
    """Two conversations alternate, with a cache of the caller's own in between."""
    model, ids = tiny_model("llama"), [IDS, prompt(TOKENS, seed=9)]
    press = Compose([AdaKV(Knorm(0.5)), lossless()] if quantized else [AdaKV(Knorm(0.5))])
    before = state(model)
    with enable(model, press):
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
    # A packed layer no longer has evicted tokens; a plain one has to hide them.
    assert set(turns[0].past_key_values.masked) == (set() if quantized else {0, 1, 2})
    assert packed(turns[0].past_key_values) == [quantized] * 3
    left = {name for name, value in state(model).items() if before.get(name) != value}
    assert all(
        name.endswith("masked_key_indices") for name in left
    )  # kvpress sets it to None at every prefill
    assert all(layer.self_attn.masked_key_indices is None for layer in model.model.layers)


def test_a_press_that_acts_when_its_context_ends() -> None:
    """Inside the press's context, generate is refused: the press would read the answer again."""
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
    """Tokens equal those decoded step by step from a cache that was read in kvpress's own context."""
    monkeypatch.setattr("kvpress.presses.kvzip_press.AutoTokenizer", Tokenizer)
    model, cache = tiny_model("llama"), DynamicCache()
    plain = model.generate(IDS, **GREEDY)[0, TOKENS:].tolist()
    with model_rollback(model), torch.inference_mode():
        press = kvpress.KVzipPress(0.5)
        with kvpress_names(model, press), press(model):
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
    with kvpress_names(model, make()), make()(model):
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
    """As long as no page becomes full, the same tokens are packed."""
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
    """On the CPU the steps at fixed addresses run eagerly, by the same code."""
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


def test_the_press_sees_the_question_at_the_end_of_the_prompt() -> None:
    model, reads = tiny_model("llama"), []
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_pre_hook(lambda module, args: reads.append(args[0].tolist()))
    with enable(model, Compose([SNAP, lossless()]), question_aware=True):
        got = model.generate(IDS, **FULL)
    handle.remove()
    assert reads[0] == IDS.tolist() and {len(one[0]) for one in reads[1:]} == {1}
    expected, cache = pressed_by_hand(model, Compose([SNAP, lossless()]), IDS)
    assert torch.equal(got.sequences, expected)
    for layer, other in zip(got.past_key_values.layers, cache.layers, strict=True):
        assert torch.equal(layer.keys.dense(), other.keys.dense())
    with pytest.raises(InvalidInputError, match="generate reads whole prompts"):
        enable(model, 4, question_aware=False)
