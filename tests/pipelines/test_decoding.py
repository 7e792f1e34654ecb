"""Answers are decoded greedily by default, and in every other way that model.generate offers."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, TextStreamer, set_seed
from transformers.generation.logits_process import LogitsProcessorList, SuppressTokensLogitsProcessor

from tests.pipelines.cases import ALL, CONTEXT, LONG_CONTEXT, QUESTIONS
from tests.pipelines.words import ours, text, word_tokenizer
from tests.tiny_models import tiny_model


def _ids(answer):
    return word_tokenizer()(answer, add_special_tokens=False).input_ids


def test_greedy_answers_do_not_follow_the_models_own_configuration():
    model, pipe = tiny_model("llama"), ours()
    plain = pipe(CONTEXT, max_new_tokens=20)
    own = model.generation_config
    model.generation_config = GenerationConfig(
        repetition_penalty=5.0,
        num_beams=3,
        do_sample=True,
        temperature=9.0,
        eos_token_id=None,
        pad_token_id=0,
    )
    try:
        assert pipe(CONTEXT, max_new_tokens=20) == plain
        mine = model.generation_config
        set_seed(0)
        sampled = pipe(CONTEXT, max_new_tokens=20, do_sample=True, num_beams=1)
        assert sampled != plain
        assert model.generation_config is mine
    finally:
        model.generation_config = own
    assert pipe(CONTEXT, max_new_tokens=20, repetition_penalty=5.0) != plain


def test_an_answer_stops_at_the_end_token():
    pipe = ours()
    answer = pipe(CONTEXT, max_new_tokens=20)["answer"].split()
    end = _ids(answer[4])[0]
    first = answer.index(answer[4])
    assert pipe(CONTEXT, max_new_tokens=20, eos_token_id=end)["answer"].split() == answer[: first + 1]


def test_sampling_follows_transformers_seed():
    pipe, arguments = ours(), {"do_sample": True, "temperature": 3.0, "top_p": 0.99, "max_new_tokens": 12}
    runs = []
    for seed in (1, 1, 2):
        set_seed(seed)
        runs.append(pipe(CONTEXT, question=QUESTIONS[0], **arguments))
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("name", ["none", "snapkv", "evict_and_pack"])
def test_beams_restore_the_cache(name):
    pipe, arguments = ours(), {"num_beams": 3, "max_new_tokens": 8, "press": ALL[name]()}
    both = pipe(LONG_CONTEXT, questions=QUESTIONS[:2], **arguments)["answers"]
    assert both[1] == pipe(LONG_CONTEXT, question=QUESTIONS[1], **arguments)["answer"]


def test_beams_over_the_whole_context_are_those_of_generate():
    pipe = ours()
    inputs = pipe.preprocess(CONTEXT, questions=[QUESTIONS[0]])
    ids = torch.cat([inputs["context_ids"], *inputs["questions_ids"]], dim=1)
    found = pipe.model.generate(ids, num_beams=4, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
    expected = pipe.tokenizer.decode(found, skip_special_tokens=True)
    assert pipe(CONTEXT, question=QUESTIONS[0], num_beams=4, max_new_tokens=9)["answer"] == expected


def test_every_beam_has_the_masks_of_a_head_wise_press():
    pipe, seen = ours(), []

    def look(module, *_):
        seen.append(getattr(module, "masked_key_indices", None))

    hook = pipe.model.model.layers[1].self_attn.register_forward_hook(look)
    try:
        pipe(CONTEXT, question=QUESTIONS[0], press=ALL["adakv"](), num_beams=3, max_new_tokens=3)
    finally:
        hook.remove()
    pipe(
        CONTEXT, press=ALL["adakv"](), cache=DynamicCache(), max_new_tokens=1
    )  # leaves the mask of a single beam
    attention = pipe.model.model.layers[1].self_attn
    alone = torch.stack(list(attention.masked_key_indices), dim=1).tolist()
    del attention.masked_key_indices
    expected = sorted([beam, head, slot] for _, head, slot in alone for beam in range(3))
    assert len(alone) > 100
    during = [masks for masks in seen if masks is not None and len(masks[0]) > len(alone)]
    assert len(during) == 3
    for masks in during:
        assert sorted(torch.stack(list(masks), dim=1).tolist()) == expected


@pytest.mark.parametrize("name", ["none", "snapkv", "evict_and_pack_lossless"])
@pytest.mark.parametrize("method", ["prompt_lookup", "assistant"])
def test_assisted_decoding_gives_the_greedy_answer(name, method):
    context = " ".join([text(40)] * 12)  # repeats itself, so prompt lookup finds something
    extra = (
        {"prompt_lookup_num_tokens": 4} if method == "prompt_lookup" else {"assistant_model": _assistant()}
    )
    arguments = {"questions": QUESTIONS[:2], "max_new_tokens": 12, "eos_token_id": 2, "press": ALL[name]()}
    greedy = ours()(context, **arguments)
    shown = _Collected()
    assert ours()(context, streamer=shown, **arguments, **extra) == greedy
    assert (
        len(shown.ids[0]) == len(_ids(QUESTIONS[0])) + 1
    )  # the question and its line break, not the context


def _assistant():
    assistant = tiny_model("llama", seed=1)
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return assistant


class _Collected(TextStreamer):
    def __init__(self):
        super().__init__(word_tokenizer())
        self.ids, self.ended = [], 0

    def put(self, value):
        self.ids.append(value.reshape(-1).tolist())

    def end(self):
        self.ended += 1


def test_a_streamer_sees_every_answer():
    shown = _Collected()
    answers = ours()(CONTEXT, questions=QUESTIONS[:2], max_new_tokens=4, streamer=shown)["answers"]
    new = [ids for ids in shown.ids if len(ids) == 1]
    assert [word_tokenizer().decode([one for (one,) in part]) for part in (new[:4], new[4:])] == answers
    assert shown.ended == 2


def test_logits_processors_and_a_generation_config_are_handed_on():
    pipe = ours()
    first = pipe(CONTEXT, max_new_tokens=1)["answer"]
    forbid = LogitsProcessorList([SuppressTokensLogitsProcessor(_ids(first))])
    assert pipe(CONTEXT, max_new_tokens=1, logits_processor=forbid)["answer"] != first
    config = GenerationConfig(suppress_tokens=_ids(first), max_new_tokens=3)
    answer = pipe(CONTEXT, generation_config=config)["answer"]
    assert len(answer.split()) == 3
    assert answer.split()[0] != first
    assert len(pipe(CONTEXT, generation_config=config, max_new_tokens=5)["answer"].split()) == 5
