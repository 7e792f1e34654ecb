"""`transformers.pipeline("kv-press-text-generation")` is ours once quantpress is imported, in any order."""

import subprocess
import sys
from pathlib import Path

import pytest

from quantpress import pipelines, task
from tests.limits import HANG

ASK = """
import transformers
from transformers.pipelines import PIPELINE_REGISTRY
import sys
sys.path.insert(0, {folder!r})
from tests.pipelines.words import word_tokenizer
from tests.tiny_models import tiny_model
parts = {{"model": tiny_model("llama"), "tokenizer": word_tokenizer()}}
pipe = transformers.pipeline("kv-press-text-generation", **parts)
assert type(pipe).__module__ == "quantpress.pipelines.text_generation", type(pipe)
assert "default" in PIPELINE_REGISTRY.check_task("kv-press-text-generation")[1]
print(pipe("w1 " * 90, question="w2", press="Knorm(0.5)", max_new_tokens=2)["answer"] is not None)
"""
"""After the imports of each test, and once more behind a reload of kvpress's module."""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "imports",
    [
        "import kvpress, quantpress",
        "import quantpress, kvpress",
        "import quantpress",
        "from quantpress import SnapKV\nimport kvpress, importlib\nimportlib.reload(kvpress.pipeline)",
    ],
    ids=["kvpress first", "quantpress first", "kvpress never", "registered by kvpress again"],
)
def test_the_task_is_ours(imports: str) -> None:
    assert run(imports + ASK.format(folder=str(Path(__file__).parents[1]))).endswith("True\n")


def test_the_name_is_that_of_the_pipelines() -> None:
    assert task.TASK == pipelines.TASK


def test_importing_quantpress_stays_light() -> None:
    code = "import quantpress, sys; print(sorted({'torch', 'transformers', 'kvpress'} & set(sys.modules)))"
    assert run(code) == "[]\n"
