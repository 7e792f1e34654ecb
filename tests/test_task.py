"""`transformers.pipeline("kv-press-text-generation")` is ours once quantpress is imported, in any order."""

import os

import pytest

from quantpress import pipelines, task
from tests.forked import run_forked

START = """
from tests.pipelines.words import word_tokenizer
from tests.tiny_models import tiny_model
def ask():
    import transformers
    from transformers.pipelines import PIPELINE_REGISTRY
    parts = {"model": tiny_model("llama"), "tokenizer": word_tokenizer()}
    pipe = transformers.pipeline("kv-press-text-generation", **parts)
    assert type(pipe).__module__ == "quantpress.pipelines.text_generation", type(pipe)
    assert "default" in PIPELINE_REGISTRY.check_task("kv-press-text-generation")[1]
    print(pipe("w1 " * 90, question="w2", press="Knorm(0.5)", max_new_tokens=2)["answer"] is not None)
"""


ALONE = """
from transformers.pipelines import PIPELINE_REGISTRY
impl = PIPELINE_REGISTRY.check_task("kv-press-text-generation")[1]["impl"]
assert impl.__module__ == "quantpress.pipelines.text_generation", impl
"""
AGAIN = "import importlib, kvpress; importlib.reload(kvpress.pipeline)"


ORDERS = {
    "kvpress first": ["import kvpress, quantpress", START, "ask()"],
    "quantpress alone, then kvpress again": ["import quantpress", ALONE, START, "ask()", AGAIN, "ask()"],
    "the pipeline class first": ["from quantpress import TextGenerationPipeline", START, "ask()"],
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")
@pytest.mark.parametrize("order", ORDERS)
def test_the_task_is_ours(order: str) -> None:
    steps = ORDERS[order]
    done = run_forked("\n".join(steps))
    assert done.returncode == 0, done.stderr
    assert "already registered" not in done.stdout + done.stderr
    assert done.stdout == "True\n" * steps.count("ask()"), done.stdout + done.stderr


def test_the_name_is_that_of_the_pipelines() -> None:
    assert task.TASK == pipelines.TASK
