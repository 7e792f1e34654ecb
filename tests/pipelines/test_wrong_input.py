"""Errors name the wrong input, and leave nothing on the model or in the cache."""

import logging

import kvpress
import pytest
from transformers import DynamicCache, GenerationConfig, TextStreamer

from quantpress.errors import CompositionError, ContextTooLongError, EmptyContextError, InvalidInputError
from quantpress.pipelines.text_generation import TextGenerationPipeline
from quantpress.presses import Demote, Knorm, SnapKV, TurboQuant
from tests.pipelines.cases import CONTEXT, DECODING, PRESSES, QUESTIONS, SNAP, UNEQUAL
from tests.pipelines.words import ours, text, theirs, word_tokenizer
from tests.tiny_models import tiny_model


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"question": "w1", "questions": ["w2"]}, "both question and questions"),
        ({"questions": "w1"}, "give a list"),
        ({"questions": []}, "at least one"),
        ({"question": 3}, "type int"),
        ({"question": ["w1", "w2"]}, r"question is \['w1', 'w2'\]; .* as questions="),
        ({"questions": 3}, "questions is 3"),
        ({"press": SnapKV | None}, "no press"),
        ({"max_new_tokens": "5"}, "max_new_tokens is '5'; give a whole number, 1 or more"),
        ({"temperature": "1"}, "temperature is '1'; give a number"),
        ({"do_sample": "no"}, "do_sample is 'no'; give True or False"),
        ({"eos_token_id": [1, "w1"]}, "eos_token_id is"),
        ({"stop_strings": ["w1", 2]}, "stop_strings is"),
        ({"generation_config": {"max_new_tokens": 3}}, "give a GenerationConfig"),
        ({"streamer": print}, "give a streamer"),
        ({"logits_processor": print}, "give a list"),
        ({"assistant_model": "gpt2"}, "assistant_model is 'gpt2'"),
        ({"cache": DynamicCache}, "give an empty cache"),
        ({"answer_prefix": 3}, "answer_prefix is 3; give a str"),
        ({"report": "no"}, "report is 'no'"),
        ({"chunk_tokens": "64"}, "chunk_tokens is '64'; give a whole number, 0 or more"),
        ({"press": "snapkv"}, "no press"),
        ({"press": 0.5}, "no press"),
        ({"temprature": 0.5}, "did you mean 'temperature'"),
        ({"max_new_token": 5}, "did you mean 'max_new_tokens'"),
        ({"nonsense_argument": 5}, "unknown argument"),
        ({"seed": 5}, "set_seed"),
        ({"num_return_sequences": 2}, "repeat the question"),
        ({"use_cache": False}, "use_cache=False"),
        ({"return_dict_in_generate": True}, "continue_inputs"),
        ({"max_length": 100}, "max_new_tokens"),
        ({"prefill_chunk_size": 100}, "chunk_tokens"),
        ({"generation_config": GenerationConfig(num_return_sequences=2, num_beams=2)}, "repeat the question"),
        ({"batch_size": 2}, "one at a time"),
        ({"max_context_length": 0}, "max_context_length is 0"),
        ({"chunk_tokens": -1}, "chunk_tokens is -1"),
        ({"cuda_graph": "yes"}, "cuda_graph is 'yes'"),
        ({"join_kernels": 1}, "join_kernels is 1"),
        ({"cuda_graph": True}, "cuda_graph=True, but the model is on cpu"),
        ({"streamer": TextStreamer(word_tokenizer()), "num_beams": 2}, "beam search"),
        ({"press": DECODING["decoding"](), "num_beams": 2}, "DecodingPress acts during decoding"),
        ({"press": DECODING["dms"](), "prompt_lookup_num_tokens": 2}, "DMSPress acts during decoding"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(InvalidInputError, match=words):
        ours()(CONTEXT, **arguments)


def test_presses_that_do_not_go_together_are_refused_when_the_pipeline_is_made():
    with pytest.raises(CompositionError):
        ours(press=[TurboQuant, Knorm])


def test_arguments_without_a_name_are_not_left_out():
    with pytest.raises(InvalidInputError, match=r"'w1', TurboQuant.* has no name; write"):
        ours()(CONTEXT, "w1", TurboQuant(4))


def test_a_tokenizer_is_asked_for():
    with pytest.raises(InvalidInputError, match="no tokenizer for LlamaForCausalLM; give tokenizer="):
        TextGenerationPipeline(model=tiny_model("llama"))


@pytest.mark.parametrize("press", [Demote(Knorm(0.5)), Demote, "Demote(Knorm(0.5))"])
def test_a_press_that_does_nothing_by_itself_is_refused(press):
    with pytest.raises(
        CompositionError, match=r"Demote.* evicts nothing by itself; put TurboQuant\(\) behind"
    ):
        ours()(CONTEXT, press=press)


def test_harmless_values_of_refused_arguments_pass():
    assert ours()(CONTEXT, num_return_sequences=1, use_cache=True, output_scores=False, max_new_tokens=2)[
        "answer"
    ]


@pytest.mark.parametrize("context", ["", "  \n "], ids=["nothing", "white space"])
def test_an_empty_context_is_refused(context):
    with pytest.raises(EmptyContextError, match="context"):
        ours()(context, question="w1")


@pytest.mark.parametrize("context", [3, None, {"role": "user"}, [7]], ids=["int", "None", "dict", "list"])
def test_a_context_that_is_no_text_is_refused(context):
    with pytest.raises(InvalidInputError):
        ours()(context, question="w1")


def test_a_context_longer_than_the_model_names_both_numbers():
    with pytest.raises(ContextTooLongError, match=r"4501 tokens.*4096 positions.*max_context_length=4096"):
        ours()(text(4500), question="w1")


def test_a_context_without_room_for_the_answer_warns():
    with pytest.warns(UserWarning, match="need up to 4105 positions, the model has 4096"):
        ours(max_new_tokens=10)(text(4093))


def test_truncation_warns_and_reads_the_beginning(caplog):
    pipe, arguments = ours(), {"question": QUESTIONS[0], "max_new_tokens": 6}
    with caplog.at_level(logging.WARNING):
        cut = pipe(CONTEXT, max_context_length=101, **arguments)
    assert "truncated from 301 to 101 tokens" in caplog.text
    assert cut == pipe(" ".join(CONTEXT.split()[:100]), **arguments)
    assert cut == theirs()(CONTEXT, max_context_length=101, **arguments)


def test_a_cache_that_holds_tokens_is_refused():
    cache, pipe = DynamicCache(), ours(max_new_tokens=1)
    pipe(CONTEXT, cache=cache)
    with pytest.raises(InvalidInputError, match="already holds 301 tokens"):
        pipe(CONTEXT, cache=cache)


def test_unequal_layers_refuse_assisted_decoding():
    with pytest.raises(InvalidInputError, match="crop"):
        ours()(CONTEXT, press=UNEQUAL["pyramidkv"](), prompt_lookup_num_tokens=2)


class _Failing(kvpress.KnormPress):
    def compress(self, module, *args):
        if module.layer_idx == self.layer:
            raise RuntimeError("from inside")
        return super().compress(module, *args)


def _state(model):
    state = [(name, sorted(vars(part)), sorted(part._modules)) for name, part in model.named_modules()]
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]
    return (
        state,
        hooks,
        model.generation_config,
        {name: id(part.forward.__func__) for name, part in model.named_modules()},
    )


@pytest.mark.parametrize("layer", [0, 2, None], ids=["first layer", "last layer", "while answering"])
def test_the_model_is_as_it_was_after_an_exception(layer):
    pipe = ours()
    pipe(CONTEXT, max_new_tokens=1)
    before = _state(pipe.model)
    arguments = {
        "press": kvpress.AdaKVPress(kvpress.SnapKVPress(0.5, **SNAP)),
        "report": True,
        "chunk_tokens": 64,
    }
    if layer is not None:
        arguments["press"] = _Failing(0.5)
        arguments["press"].layer = layer
    else:
        arguments["logits_processor"] = [_fail]
    with pytest.raises(RuntimeError, match="from inside"):
        pipe(CONTEXT, **arguments)
    assert _state(pipe.model) == before
    pipe(CONTEXT, press=PRESSES["adakv"](), max_new_tokens=1)
    assert _state(pipe.model) == before


def _fail(ids, scores):
    raise RuntimeError("from inside")


def test_an_exception_while_answering_leaves_a_given_cache_with_the_context():
    cache = DynamicCache()
    with pytest.raises(RuntimeError, match="from inside"):
        ours()(CONTEXT, question=QUESTIONS[0], cache=cache, logits_processor=[_fail])
    assert cache.get_seq_length() == 301


@pytest.mark.parametrize("press", [SnapKV(0.5), SnapKV(0.5) | TurboQuant(4)], ids=repr)
def test_a_context_too_short_for_a_press_is_named(press):
    pipe, cache = ours(), DynamicCache()
    with pytest.raises(
        InvalidInputError, match=r"SnapKV\(.*context of \d+ tokens: .*window size 64\. Give a longer"
    ):
        pipe(text(30), question="w1", press=press, cache=cache)
    assert cache.get_seq_length() == 0
    assert not any(module._forward_hooks for module in pipe.model.modules())
    assert pipe(text(30), question="w1", press=None)["answer"]
