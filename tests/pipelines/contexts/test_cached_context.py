"""Contexts read once give the answers of contexts read each time, here and in another process."""

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvpress
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from quantpress.cache import PackedLayer, continue_inputs
from quantpress.cache.saved.fingerprint import difference, model_fingerprint
from quantpress.cache.tokens.evicted_slots import MASKS
from quantpress.codecs.fp8 import Fp8Pages
from quantpress.codecs.raw import RawPages
from quantpress.errors import CacheFileError, EmptyContextError, InvalidInputError, UnsupportedModelError
from quantpress.pipelines.contexts.cached_context import CachedContext
from quantpress.presses import Compose, PyramidKV, SnapKV, StreamingLLM, TurboQuant
from quantpress.presses.models.attention import attention_modules
from tests.forked import run_forked
from tests.pipelines.cases import LONG_CONTEXT, QUESTIONS, SNAP
from tests.pipelines.words import ours
from tests.tiny_models import tiny_model

TOKENS = {"max_new_tokens": 8}
LONG = {"max_new_tokens": 60}  # fills a new page after the loaded ones

PRESSES: dict[str, Callable[[], kvpress.BasePress | None]] = {
    "none": lambda: None,
    "snapkv": lambda: kvpress.SnapKVPress(0.5, **SNAP),
    "adakv": lambda: kvpress.AdaKVPress(kvpress.SnapKVPress(0.5, **SNAP)),
    "key_rerotation": lambda: kvpress.KeyRerotationPress(kvpress.KnormPress(0.4)),
    "turboquant": lambda: TurboQuant(bits=4),
    "snapkv_packed": lambda: Compose([SnapKV(0.5, **SNAP), TurboQuant(bits=3)]),
    "adakv_packed": lambda: Compose(
        [kvpress.AdaKVPress(kvpress.SnapKVPress(0.5, **SNAP)), TurboQuant(bits=4)]
    ),
    "unequal_packed": lambda: Compose([PyramidKV(0.3, **SNAP), TurboQuant(bits=4)]),
    "rerotated_packed": lambda: Compose([kvpress.KeyRerotationPress(kvpress.KnormPress(0.4)), TurboQuant]),
    "sinks_packed": lambda: Compose([StreamingLLM(0.4, n_sink=9), TurboQuant(bits=2, detect_sinks=5)]),
    "mixed_widths": lambda: TurboQuant(bits=2.5, key_bits=4, layer_bits={0: 16, -1: (8, 3)}, seed=3),
    "prod": lambda: TurboQuant(bits=3, estimator="prod", rotation="haar", mean_key=False),
    "lossless": lambda: TurboQuant(codec=lambda dim, role, layer: RawPages(dim, 32)),
    "fp8": lambda: TurboQuant(codec=lambda dim, role, layer: Fp8Pages(dim)),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "context.safetensors"


@pytest.mark.parametrize("name", PRESSES)
def test_a_loaded_context_answers_as_the_text_does(name: str, file: Path) -> None:
    pipe, press, questions = ours(), PRESSES[name](), QUESTIONS[:2]
    expected = pipe(LONG_CONTEXT, questions=questions, press=press, **TOKENS)["answers"]
    context = pipe.read(LONG_CONTEXT, press=press)
    assert not any(hasattr(module, MASKS) for module in attention_modules(pipe.model))
    assert pipe(context, questions=questions, **TOKENS)["answers"] == expected
    context.save(file)
    loaded = CachedContext.load(file, pipe.model)
    assert loaded.tokens_seen == context.tokens_seen
    assert torch.equal(loaded.token_ids, context.token_ids)
    assert loaded.memory == context.memory
    assert pipe(loaded, questions=questions, **TOKENS)["answers"] == expected
    assert pipe(loaded, question=QUESTIONS[1], **TOKENS)["answer"] == expected[1]
    assert not any(hasattr(module, MASKS) for module in attention_modules(pipe.model))


@pytest.mark.parametrize("family", ["gemma3", "qwen3"])
def test_other_families(family: str, file: Path) -> None:
    """Gemma 3 has both sliding-window and full layers."""
    pipe = ours(family)
    press = Compose([SnapKV(0.5, **SNAP), TurboQuant(bits=4)])
    expected = pipe(LONG_CONTEXT, questions=QUESTIONS, press=press, **TOKENS)["answers"]
    pipe.read(LONG_CONTEXT, press=press).save(file)
    loaded = CachedContext.load(file, pipe.model)
    assert pipe(loaded, questions=QUESTIONS, **TOKENS)["answers"] == expected


def test_long_answers_pack_new_pages_and_leave_the_context_alone(file: Path) -> None:
    pipe, press = ours(), TurboQuant(bits=3)
    expected = pipe(LONG_CONTEXT, question=QUESTIONS[0], press=press, **LONG)["answer"]
    pipe.read(LONG_CONTEXT, press=press).save(file)
    loaded = CachedContext.load(file, pipe.model)
    before = file.read_bytes(), loaded.memory
    with loaded.opened(pipe.model) as cache, torch.no_grad():
        packed = cache.layers[0].packed_tokens
        pipe.model(torch.full((1, 60), 5), past_key_values=cache)
        assert cache.layers[0].packed_tokens > packed == loaded.cache.layers[0].packed_tokens
    for _ in range(2):
        assert pipe(loaded, question=QUESTIONS[0], **LONG)["answer"] == expected
    assert (file.read_bytes(), loaded.memory) == before


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"prompt_lookup_num_tokens": 4, "eos_token_id": 2}, {"do_sample": True}],
    ids=lambda options: next(iter(options)),
)
def test_every_way_of_decoding(options: dict[str, Any], file: Path) -> None:
    pipe, press = ours(), Compose([SnapKV(0.5, **SNAP), TurboQuant(bits=4)])
    pipe.read(LONG_CONTEXT, press=press).save(file)
    loaded = CachedContext.load(file, pipe.model)
    answers = []
    for context, given in ((LONG_CONTEXT, {"press": press}), (loaded, {})):
        torch.manual_seed(5)
        answers.append(pipe(context, question=QUESTIONS[0], **given, **options, **TOKENS)["answer"])
    assert answers[0] == answers[1]


def test_branches_do_not_see_each_other(file: Path) -> None:
    model = tiny_model("llama")
    pipe = ours()
    pipe.read(LONG_CONTEXT, press=TurboQuant(bits=4)).save(file)
    context = CachedContext.load(file, model)
    left, right = context.branch(), context.branch()
    ids = torch.randint(2, 200, (1, 300))
    with torch.no_grad():
        for cache in (left, right):
            model(ids[:, :150], past_key_values=cache)
        alone = model(ids[:, 150:], past_key_values=left).logits
        model(torch.flip(ids, [1]), past_key_values=right)
        third = context.branch()
        model(ids[:, :150], past_key_values=third)
        assert torch.equal(model(ids[:, 150:], past_key_values=third).logits, alone)
    assert context.cache.get_seq_length() == third.get_seq_length() - 300


def test_generate_of_your_own_over_an_opened_context(file: Path) -> None:
    """Head-wise masks are on the model inside; afterwards it has those that it had before."""
    pipe, press = ours(), PRESSES["adakv"]()
    pipe.read(LONG_CONTEXT, press=press).save(file)
    expected = pipe(LONG_CONTEXT, question=QUESTIONS[0], press=press, **TOKENS)["answer"]
    context = CachedContext.load(file, pipe.model)
    assert context.masks
    module: Any = attention_modules(pipe.model)[0]
    module.masked_key_indices = "something else"
    try:
        question = pipe.tokenizer.encode(QUESTIONS[0] + context.after, add_special_tokens=False)
        with context.opened(pipe.model) as cache:
            inputs = continue_inputs(cache, torch.tensor([question]), tokens_seen=context.tokens_seen)
            ids = pipe.model.generate(**inputs, past_key_values=cache, do_sample=False, **TOKENS)
        assert pipe.tokenizer.decode(ids[0, len(question) :], skip_special_tokens=True) == expected
        with pytest.raises(RuntimeError), context.opened(pipe.model):
            raise RuntimeError
        assert module.masked_key_indices == "something else"
    finally:
        del module.masked_key_indices
    assert not any(hasattr(one, MASKS) for one in attention_modules(pipe.model))


ANOTHER_PROCESS = """
import json, sys
from transformers import AutoModelForCausalLM
from quantpress import CachedContext, TextGenerationPipeline
from tests.pipelines.words import word_tokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
pipe = TextGenerationPipeline(model=model, tokenizer=word_tokenizer())
context = CachedContext.load(sys.argv[2], model)
print(json.dumps(pipe(context, questions=json.loads(sys.argv[3]), max_new_tokens=8)["answers"]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")
def test_another_process_answers_with_the_same_tokens(file: Path, tmp_path: Path) -> None:
    """The model loaded from disk, under the press with the most state: masks, sinks, mixed widths."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    pipe = ours()
    quantizer = TurboQuant(bits=3, key_bits=3.5, layer_bits={1: 16})
    press = Compose([kvpress.AdaKVPress(kvpress.SnapKVPress(0.5, **SNAP)), quantizer])
    expected = pipe(LONG_CONTEXT, questions=QUESTIONS, press=press, **TOKENS)["answers"]
    pipe.read(LONG_CONTEXT, press=press).save(file)
    done = run_forked(ANOTHER_PROCESS, str(tmp_path / "model"), str(file), json.dumps(QUESTIONS))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected


# What is refused


def saved(file: Path, press: kvpress.BasePress | None = None) -> Path:
    ours().read(LONG_CONTEXT, press=press or TurboQuant(bits=4)).save(file)
    return file


def other_model(change: Callable[[PreTrainedModel], Any]) -> PreTrainedModel:
    model = copy.deepcopy(tiny_model("llama"))
    return change(model) or model


def _one_weight(model: PreTrainedModel) -> None:
    """A training step changes every number of a matrix."""
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(1 + 1e-6)


def _rope(model: PreTrainedModel) -> None:
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 77.0}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: tiny_model("llama", seed=1), "other weights"),
        (lambda: other_model(_one_weight), "other weights"),
        (lambda: other_model(_rope), "rope_parameters was .* is .*77"),
        (lambda: other_model(lambda model: model.to(torch.bfloat16)), "were float32, they are bfloat16"),
        (lambda: tiny_model("qwen3"), "model_type was 'llama', is 'qwen3'"),
        (lambda: tiny_model("multi_query"), "num_key_value_heads was 2, is 1"),
    ],
    ids=["seed", "trained", "rope", "dtype", "family", "heads"],
)
def test_another_model_is_refused(make: Callable[[], PreTrainedModel], reason: str, file: Path) -> None:
    saved(file)
    with pytest.raises(CacheFileError, match=rf"another model: .*{reason}"):
        CachedContext.load(file, make())
    context = ours().read(LONG_CONTEXT)
    with pytest.raises(InvalidInputError, match="another model"), context.opened(make()):
        pass


def test_the_same_model_loaded_another_way_is_the_same(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    again.config.pad_token_id = 9
    assert difference(model_fingerprint(model), model_fingerprint(again)) is None


def test_weights_that_are_not_in_memory_are_named() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_model("llama").config)
    with pytest.raises(UnsupportedModelError, match=r"model\.embed_tokens\.weight|lm_head"):
        model_fingerprint(model)


@pytest.mark.parametrize(
    ("press", "reason"),
    [
        (lambda: TurboQuant(bits=4, seed=1), "key seed was 0, is 1, value seed was 0, is 1"),
        (lambda: TurboQuant(bits=3), "key bits was 4, is 3"),
        (lambda: TurboQuant(bits=4, recent_tokens=64), "recent_tokens was 128, is 64"),
        (lambda: TurboQuant(bits=4, layer_bits={1: 16}), "layer 1: packed was True, is False"),
        (lambda: SnapKV(), "packed was True, is False"),
    ],
    ids=["seed", "bits", "recent", "layer", "unpacked"],
)
def test_another_press_is_refused_where_one_is_asked_for(
    press: Callable[[], Any], reason: str, file: Path
) -> None:
    model = tiny_model("llama")
    saved(file)
    CachedContext.load(file, model, press=TurboQuant(bits=4))
    CachedContext.load(file, model, press=Compose([SnapKV, TurboQuant(bits=4)]))
    CachedContext.load(file, model, press="SnapKV | TurboQuant(bits=4)")
    with pytest.raises(InvalidInputError, match="press=4 is no press"):
        CachedContext.load(file, model, press=4)
    with pytest.raises(CacheFileError, match=reason):
        CachedContext.load(file, model, press=press())
    with pytest.raises(InvalidInputError, match="a TextGenerationPipeline is no model; give one"):
        CachedContext.load(file, ours())  # type: ignore[arg-type]


def test_mutated_files_never_load_wrong(file: Path) -> None:
    model = tiny_model("llama")
    saved(file, Compose([SnapKV(0.7, **SNAP), TurboQuant(bits=2)]))
    whole = bytearray(file.read_bytes())
    header = int.from_bytes(whole[:8], "little")
    expected = CachedContext.load(file, model)
    right = 0
    for trial in range(120):
        place = random.randrange(8 + header) if trial % 2 else random.randrange(8 + header, len(whole))
        bit = 1 << random.randrange(8)
        whole[place] ^= bit
        file.write_bytes(whole)
        whole[place] ^= bit
        try:
            found = CachedContext.load(file, model)
        except CacheFileError:
            continue
        right += 1
        assert found.tokens_seen == expected.tokens_seen and found.memory == expected.memory
        for layer, other in zip(found.cache.layers, expected.cache.layers, strict=True):
            assert torch.equal(layer.keys.clone() + 0, other.keys.clone() + 0)
    assert right < 12


def test_what_acts_during_decoding_is_not_saved(file: Path) -> None:
    pipe = ours()
    decoding = kvpress.DecodingPress(kvpress.KnormPress(), compression_interval=4, target_size=100)
    context = pipe.read(LONG_CONTEXT, press=Compose([decoding, TurboQuant]))
    with pytest.raises(InvalidInputError, match=r"Decoding.*acts during decoding"):
        context.save(file)
    assert not file.exists()
    dms = kvpress.DMSPress(kvpress.KnormPress(), threshold=-9.0, decoding=True)
    with pytest.raises(InvalidInputError, match="DMSPress"):
        pipe.read(LONG_CONTEXT, press=dms)
    with pytest.raises(InvalidInputError, match="DMSPress"):
        pipe(context, question="w1", press=dms)


def test_a_press_that_acts_during_decoding_may_be_given_with_the_question(file: Path) -> None:
    pipe = ours()
    make: Callable[[], Any] = lambda: kvpress.DecodingPress(  # noqa: E731
        kvpress.KnormPress(), compression_interval=4, target_size=100
    )
    both = Compose([make(), TurboQuant(bits=4)])
    asked = {"questions": QUESTIONS[:2], "max_new_tokens": 12}
    expected = pipe(LONG_CONTEXT, press=both, **asked)["answers"]
    in_memory = pipe.read(LONG_CONTEXT, press=both)
    assert pipe(in_memory, **asked)["answers"] == expected
    loaded = CachedContext.load(saved(file), pipe.model)
    assert pipe(loaded, press=make(), **asked)["answers"] == expected
    assert pipe(loaded, **asked)["answers"] != expected


@pytest.mark.parametrize(
    "options",
    [
        {"press": TurboQuant(bits=4)},
        {"max_context_length": 100},
        {"enable_thinking": True},
        {"cache": DynamicCache()},
        {"chunk_tokens": 64},
        {"progress": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_arguments_of_reading_are_refused_with_a_question(options: dict[str, Any]) -> None:
    pipe = ours()
    context = pipe.read(LONG_CONTEXT)
    with pytest.raises(InvalidInputError, match=f"{next(iter(options))} has no effect|acts while"):
        pipe(context, question="w1", **options)


def test_reading_refuses_other_arguments_and_empty_text() -> None:
    pipe = ours()
    with pytest.raises(InvalidInputError, match="max_new_tokens"):
        pipe.read(LONG_CONTEXT, max_new_tokens=3)
    with pytest.raises(EmptyContextError):
        pipe.read("  ")


def test_reading_takes_the_defaults_of_the_pipeline() -> None:
    pipe = ours(press=TurboQuant(bits=3), max_context_length=500)
    context = pipe.read(LONG_CONTEXT)
    assert context.token_ids.shape == (1, 500)
    assert all(isinstance(layer, PackedLayer) for layer in context.cache.layers)
    assert context.description == "TurboQuant(3)"
    assert pipe(context, question="w1", report=True, **TOKENS)["report"].tokens_seen == 500
