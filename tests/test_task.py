"""`transformers.pipeline("kv-press-text-generation")` is ours once quantpress is imported, in any order."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantpress import pipelines, task
from tests.limits import HANG

ROOT = Path(__file__).parents[1]
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


ORDERS = {
    "kvpress first": ["import kvpress, quantpress", START, "ask()"],
    "quantpress alone, then kvpress again": ["import quantpress", ALONE, START, "ask()", AGAIN, "ask()"],
    "the pipeline class first": ["from quantpress import TextGenerationPipeline", START, "ask()"],
}
# What every order imports anyway is imported once, before it forks; transformers.pipelines is not among it.
EACH = """
import os, sys
import pandas, torch, transformers.modeling_utils
assert not {"kvpress", "quantpress", "transformers.pipelines"} & set(sys.modules)
for steps in ORDERS:
    child = os.fork()
    if not child:
        sys.stderr = sys.stdout
        exec(steps, {})
        sys.stdout.flush()
        os._exit(0)
    print("ended", os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")
def test_the_task_is_ours() -> None:
    orders = ["\n".join(steps).replace("FOLDER", repr(str(ROOT))) for steps in ORDERS.values()]
    code = EACH.replace("ORDERS", repr(orders))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    assert "already registered" not in done.stdout + done.stderr
    expected = ["True\n" * steps.count("ask()") + "ended 0\n" for steps in ORDERS.values()]
    assert done.stdout == "".join(expected), done.stdout + done.stderr


def test_the_name_is_that_of_the_pipelines() -> None:
    assert task.TASK == pipelines.TASK
