"""The line that a user types, with the default model."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers import DynamicCache, TextStreamer

import quantpress.pipelines
from quantpress import Compose, SnapKV, TurboQuant, continue_inputs
from quantpress.evaluation.tasks.haystack import (
    ANSWER_PREFIX,
    book_text,
    needle_question,
    plant,
    random_needles,
)
from quantpress.pipelines.default_model import quick_dtype
from quantpress.pipelines.text_generation import TextGenerationPipeline
from tests.pipelines.cases import LONG_CONTEXT, QUESTIONS
from tests.pipelines.words import ours


@pytest.fixture(scope="module")
def pipe(default_model, default_tokenizer):
    return transformers.pipeline(quantpress.pipelines.TASK, model=default_model, tokenizer=default_tokenizer)


@pytest.fixture(scope="module")
def planted(default_tokenizer):
    """A context of which half fills pages."""
    (needle,) = random_needles(1)
    return needle, plant(book_text(), [needle], default_tokenizer, 640)


def test_registering_twice_is_registering_once(caplog):
    quantpress.pipelines.register()
    entry = transformers.pipelines.PIPELINE_REGISTRY.supported_tasks[quantpress.pipelines.TASK]
    assert entry["impl"] is TextGenerationPipeline
    quantpress.pipelines.register()
    assert transformers.pipelines.PIPELINE_REGISTRY.supported_tasks[quantpress.pipelines.TASK] is entry
    assert "Overwriting" not in caplog.text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
def test_the_line_runs_word_for_word(default_model_path, planted):
    from transformers import pipeline

    pipe = pipeline("kv-press-text-generation", press=Compose([SnapKV, TurboQuant]))

    assert isinstance(pipe, TextGenerationPipeline)
    assert pipe.model.name_or_path == str(default_model_path)
    needle, _ = planted
    context = plant(book_text(), [needle], pipe.tokenizer, 800)
    result = pipe(context, question=needle_question(needle.city), max_new_tokens=5, report=True)
    assert result["answer"].strip()
    report = result["report"]
    assert report.tokens_kept == report.tokens_seen // 2
    assert pipe.model.dtype == quick_dtype()
    assert report.bits_per_value < 8 * pipe.model.dtype.itemsize * 0.6
    assert report.ratio > 2


@pytest.mark.slow
def test_stop_strings_and_a_streamer_on_the_default_model(pipe, planted, capsys):
    needle, context = planted
    arguments = {
        "question": needle_question(needle.city),
        "answer_prefix": ANSWER_PREFIX,
        "press": TurboQuant,
    }
    digits = str(needle.number)
    streamer = TextStreamer(pipe.tokenizer, skip_prompt=True)
    answer = pipe(context, stop_strings=[digits[2]], streamer=streamer, max_new_tokens=20, **arguments)[
        "answer"
    ]
    assert answer.strip() == digits[:3]
    assert capsys.readouterr().out.strip() == digits[:3]


def test_packed_answers_of_generate_are_those_of_the_pipeline():
    """model.generate under a press, with the helper for positions after an eviction."""
    pipe, press = ours(), Compose([SnapKV(window_size=16), TurboQuant])
    expected = pipe(LONG_CONTEXT, question=QUESTIONS[1], press=press, max_new_tokens=8)["answer"]
    inputs = pipe.preprocess(LONG_CONTEXT, [QUESTIONS[1]], "")
    cache = DynamicCache()
    with torch.no_grad(), press(pipe.model):
        pipe.model.model(inputs["context_ids"], past_key_values=cache)
    assert all(layer.packed_tokens for layer in cache.layers)
    (question_ids,) = inputs["questions_ids"]
    ids = pipe.model.generate(
        **continue_inputs(cache, question_ids), past_key_values=cache, max_new_tokens=8, do_sample=False
    )
    assert pipe.tokenizer.decode(ids[0, question_ids.shape[1] :], skip_special_tokens=True) == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
def test_the_snippet_of_the_readme_answers_as_printed(default_model_path, capsys):
    """Where two logits are nearly equal, another machine may say "12" for "twelve"."""
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    snippet = readme.split("```python\n")[1].split("```")[0]
    exec(compile(snippet, "README.md", "exec"), {})
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == 2 and all("12 euros" in one.replace("twelve", "12") for one in answers)
