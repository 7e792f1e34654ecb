"""`transformers.pipeline("kv-press-text-generation")` is ours once quantpress is imported, in any order."""

import subprocess
import sys
from pathlib import Path

import pytest

from quantpress import pipelines, task
from tests.limits import HANG

START = """
import sys
sys.path.insert(0, FOLDER)
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


@pytest.mark.parametrize(
    "steps",
    [
        ["import kvpress, quantpress", START, "ask()"],
        ["import quantpress", ALONE, START, "ask()", AGAIN, "ask()"],
        ["from quantpress import TextGenerationPipeline", START, "ask()"],
    ],
    ids=["kvpress first", "quantpress alone, then kvpress again", "the pipeline class first"],
)
def test_the_task_is_ours(steps: list[str]) -> None:
    code = "\n".join(steps).replace("FOLDER", repr(str(Path(__file__).parents[1])))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    assert "already registered" not in done.stderr
    assert done.stdout == "True\n" * steps.count("ask()")


def test_the_name_is_that_of_the_pipelines() -> None:
    assert task.TASK == pipelines.TASK
