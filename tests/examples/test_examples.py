"""Every example runs as it stands, on a small setting."""

import ast
import json
import re
import runpy
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import quantpress.pipelines
from quantpress.cache.memory_estimate import layer_estimate
from quantpress.cache.settings import LayerSettings
from quantpress.codecs.scalar import ScalarPages
from quantpress.evaluation import runner
from quantpress.evaluation.results import statistics
from quantpress.evaluation.tasks import haystack
from quantpress.pipelines import arguments
from quantpress.presses.traits import traits_of
from quantpress.quantization.spec import CodecSpec
from tests.examples.openai_double import openai_server

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
SHAPES = {  # layers, KV heads, head_dim
    "meta-llama/Llama-3.1-8B-Instruct": (32, 8, 128),
    "Qwen/Qwen2.5-7B-Instruct-1M": (28, 4, 128),
    "Qwen/Qwen3-4B-Instruct-2507": (36, 8, 128),
    "meta-llama/Llama-3.2-1B-Instruct": (16, 8, 64),
}
LONG_TOKENS = 130048

Run = Callable[..., str]


@pytest.fixture
def one_model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pipeline(...)` without a model takes the default model that all tests share, and loads no other."""
    quantpress.pipelines.register()
    # By name: importing kvpress has put another module of this name in place of an earlier one.
    make: Any = import_module("transformers").pipeline

    def ready(task: str, model: Any = None, **options: Any) -> Any:
        if model is None:
            model = request.getfixturevalue("default_model")
            options["tokenizer"] = request.getfixturevalue("default_tokenizer")
        return make(task, model=model, **options)

    monkeypatch.setattr("transformers.pipeline", ready)


@pytest.fixture
def run(one_model: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a script with arguments and returns what it prints."""

    def script(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return script


@pytest.fixture(scope="session")
def tiny_folder(default_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model of 2 layers with 2 KV heads of 32 dimensions, where the answers do not matter."""
    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=len(default_tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    default_tokenizer.save_pretrained(folder)
    return str(folder)


def test_every_example_is_tested() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    tested = {*re.findall(r'(?:run|EXAMPLES / )\(?\s*"(\w+\.py)"', here)}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested
    assert {path.name for path in NOTEBOOKS} == set(re.findall(r'cells_of\("(\w+\.ipynb)"', here))


def test_every_example_is_named_in_the_list() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    names = {path.name for path in (*EXAMPLES.glob("*.py"), *NOTEBOOKS)}
    assert names == set(re.findall(r"\(([\w.]+\.(?:py|ipynb))\)", listed))


@pytest.mark.slow
def test_a_text_is_asked_about(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "DEFAULT_NEW_TOKENS", 12)
    text = tmp_path / "text.txt"
    text.write_text("Ada lives in Lisbon. The sea is near, and the trams are yellow. " * 20)
    printed = run("ask_a_text.py", str(text), "Where does Ada live?", "--evict", "0.2")
    assert "Lisbon" in printed and "tokens" in printed


def test_pages_shared_by_requests(run: Run) -> None:
    assert "190 tokens served in 60 steps" in run("paged_attention.py", "--bits", "3")


def test_the_codec_by_itself(run: Run) -> None:
    assert "2.5 bits" in run("standalone_codec.py")


# A server


def test_a_served_model_is_asked_twice(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    document = tmp_path / "document.txt"
    document.write_text("ferry " * 300)
    with openai_server() as served:
        printed = run("vllm_client.py", str(document), "When?", "How much?", "--url", served.url)
        silent = run("vllm_client.py", str(document), "When?", "--url", f"{served.url}/silent")
    assert served.asked == ["tiny"] * 3
    first, second = printed.split("> How much?")
    assert "> When?\nAt nine.\n" in first and "301 tokens in the prompt, 0 of them cached)" in first
    assert "302 tokens in the prompt, 256 of them cached)" in second
    assert "the server does not count tokens" in silent


def test_a_server_that_is_not_there_is_named(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    document = tmp_path / "document.txt"
    document.write_text("ferry")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
    with pytest.raises(SystemExit, match=f"{url}: .*Start a server"):
        run("vllm_client.py", str(document), "--url", url)


# Long contexts


@pytest.mark.slow
def test_needles(run: Run) -> None:
    printed = run("needle_128k.py", "--tiny", "--depths", "1", "--tokens", "300", "480")
    rows = re.findall(r"([\d,]+) +│ (.) (\d+).*│ +(\d\.\d\d)x", printed)
    assert [250 <= int(rows[0][0]) <= 300, 420 <= int(rows[1][0]) <= 480] == [True, True]
    assert any("✓" in row for row in rows), printed
    assert 1.3 < float(rows[0][-1]) < float(rows[1][-1]) < 3.6


@pytest.mark.slow
def test_a_long_document_is_cut_and_asked_about(run: Run, tmp_path: Path) -> None:
    document = tmp_path / "text.txt"
    document.write_text("Ada lives in Lisbon. The sea is near, and the trams are yellow. " * 100)
    options = ("--tiny", "--tokens", "320", "--answer-tokens", "8")
    printed = run("long_document_qa_128k.py", str(document), "-q", "Where does Ada live?", *options)
    assert "Lisbon" in printed.split("Where does Ada live?")[1]
    assert 256 < int(re.search(r"tokens seen +│ +(\d+)", printed)[1]) <= 320


@pytest.mark.parametrize("name", ["needle_128k.py", "long_document_qa_128k.py"])
def test_a_missing_model_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert "--model" in capsys.readouterr().err


def test_the_memory_in_the_docstring_is_the_estimate() -> None:
    source = (EXAMPLES / "needle_128k.py").read_text(encoding="utf-8")
    text = ast.get_docstring(ast.parse(source)) or ""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "/" in line]
    table = {row[0]: row[2:] for row in rows if row}
    assert set(table) == set(SHAPES) and f"{LONG_TOKENS:,} tokens" in text
    for model, (layers, heads, dim) in SHAPES.items():
        settings = [
            None,
            *(
                LayerSettings(*(ScalarPages(CodecSpec(dim, bits, r)) for r in ("key", "value")))
                for bits in (4, 3)
            ),
        ]
        sizes = [layers * layer_estimate(one, LONG_TOKENS, heads, dim).total_bytes for one in settings]
        assert table[model] == [f"{size / 1e9:.2f}" for size in sizes]
        assert sizes[0] == LONG_TOKENS * layers * heads * dim * 2 * 2  # keys and values, 2 bytes each


# What presses keep


def test_stacks(run: Run, tiny_folder: str) -> None:
    printed = run("stack_presses.py", "--model", tiny_folder, "--tokens", "780")
    rows = re.findall(r"(\d+) / (\d+) +([\d.]+) +([\d.]+) KiB +([\d.]+)x  (.+)", printed)
    seen = int(rows[0][1])
    shares = [int(row[0]) / seen for row in rows]
    assert shares == pytest.approx([1, 0.5, 0.25, 0.5, 0.5, 0.5, 0.49, 0.48, 0.5, 1], abs=0.01), printed
    size = {row[-1]: float(row[3]) for row in rows}
    assert len(size) == len(rows)
    packed, demoted = size["TurboQuant"], size["Compose(Demote(SnapKV(0.5)) | TurboQuant(4))"]
    assert size["Compose(SnapKV(0.5) | TurboQuant(4))"] < demoted < packed
    whole = seen * 2 * 2 * 32 * 2 * 2 / 1024  # layers, heads, head_dim, keys and values, bytes
    assert packed < whole / 2


def test_memory_computed_is_memory_measured(run: Run, tiny_folder: str) -> None:
    printed = run("measure_memory.py", "--model", tiny_folder, "--tokens", "700", "--context", "100000")
    measured = re.search(r"  all +(.+)", printed)[1]
    tokens, whole, packed = re.search(r"for (\d+) tokens in bfloat16: (.+), packed: (.+)", printed).groups()
    assert packed == measured
    assert whole == f"{int(tokens) * 2 * 2 * 32 * 2 * 2 / 1024:.1f} KiB"
    long = re.search(r"for 100,000 tokens in bfloat16: ([\d.]+) MiB, packed: ([\d.]+) MiB", printed)
    assert 3 < float(long[1]) / float(long[2]) < 4


def test_a_long_answer_stays_within_its_budget(run: Run, tiny_folder: str) -> None:
    options = ("--budget", "192", "--interval", "16", "--new-tokens", "160")
    printed = run("reasoning_decode.py", "--model", tiny_folder, *options)
    kept = [int(count) for count in re.findall(r"(\d+) tokens kept", printed)]
    assert len(kept) == 10 and kept == sorted(kept) and kept[0] < 150 and kept[-1] <= 192 + 16
    most, seen, whole = re.search(r"at most ([\d.]+) KiB; all (\d+) .*: ([\d.]+) KiB", printed).groups()
    assert int(seen) > 230
    assert float(most) < (192 + 16) / int(seen) * float(whole)  # less than its tokens uncompressed


@pytest.mark.slow
def test_many_questions(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "book.safetensors"
    printed = run("many_questions.py", "--tokens", "400", "--questions", "1", "--save", str(file))
    assert printed.count("✓") == 1, printed
    assert "the same answers" in printed
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_comparison(run: Run, tiny_folder: str) -> None:
    """A tiny model knows no number; `test_demo.py` has the default model's answers in the same table."""
    options = ("--model", tiny_folder, "--tokens", "600", "--depths", "1")
    printed = run("compare_presses.py", "none", "TurboQuant(bits=4)", *options)
    rows = re.findall(r"(uncompressed|TurboQuant\(4\)) +[✓✗].* ([\d.]+)x", printed)
    assert [name for name, _ in rows] == ["uncompressed", "TurboQuant(4)"], printed
    assert float(rows[0][1]) == 1 and float(rows[1][1]) > 1.7


# Presses of one's own


@pytest.fixture
def quick_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chapter in place of the book, and rough intervals."""
    chapter = haystack.book_text()[:20000]
    for module in (haystack, runner):
        monkeypatch.setattr(module, "book_text", lambda: chapter)
    monkeypatch.setattr(statistics, "RESAMPLES", 20)


def test_a_press_of_ones_own(run: Run, quick_evaluation: None, tiny_folder: str) -> None:
    printed = run("own_press.py", "--model", tiny_folder, "--documents", "1", "--context", "300")
    bits = dict(re.findall(r"^\| (\S.*?) +\| (\d+\.\d\d) \|", printed, re.M))
    assert bits["LoudValues(0.5)"] == bits["SnapKV(0.5)"] == "8.00" and bits["uncompressed"] == "16.00"
    assert len(re.findall(r"LoudValues, \d+ tokens, (?:16|3) bits", printed)) == 2, printed


# The notebooks


def cells_of(name: str) -> Iterator[tuple[str, str]]:
    """The name and the source of each cell of code."""
    notebook = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))
    for place, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            yield f"{name}, cell {place}", "".join(cell["source"])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_clean(notebook: Path) -> None:
    found = json.loads(notebook.read_text(encoding="utf-8"))
    assert found["nbformat"] == 4
    code = [cell for cell in found["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_the_tour_runs(tiny_folder: str, default_tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """On a tiny model, which knows no number: `test_needles` and `test_many_questions` have right answers."""
    model = LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    names: dict[str, Any] = {"model": model, "tokenizer": default_tokenizer}
    printed = []
    for cell, source in cells_of("tour.ipynb"):
        source = source.replace('generation"', 'generation", model=model, tokenizer=tokenizer')
        exec(compile(source, cell, "exec"), names)
        printed.append(capsys.readouterr().out)
    _, fact, stacks, memory, later, budget, codec = printed
    sizes = [float(size) for size in re.findall(r"(?:True|False) +([\d.]+) KiB", fact)]
    assert len(sizes) == 3 and sizes == sorted(sizes, reverse=True), fact
    half, most, whole = (int(count) for count in re.findall(r"(\d+) tokens in", stacks))
    assert [half / whole, most / whole] == pytest.approx([0.5, 0.7], abs=0.01)
    assert "131,072 tokens" in memory
    assert "same answers: True" in later and "ok" in codec
    plain, cut = (int(count) for count in re.findall(r"(\d+) tokens in", budget))
    assert plain > 250 > 192 + 8 >= cut


def test_the_notebook_of_a_press_runs(
    quick_evaluation: None, tiny_folder: str, default_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a tiny model and one short document."""
    model = LlamaForCausalLM.from_pretrained(tiny_folder)
    names: dict[str, Any] = {"__name__": "own_notebook", "model": model, "tokenizer": default_tokenizer}
    smaller = {
        'generation"': 'generation", model=model, tokenizer=tokenizer',
        "documents=2": "documents=1",
        "context=512": "context=300",
        "continuation=65": "continuation=5",
    }
    for cell, source in cells_of("own_press.ipynb"):
        for theirs, ours in smaller.items():
            source = source.replace(theirs, ours)
        exec(compile(source, cell, "exec"), names)
    printed = capsys.readouterr().out
    kept, *halves = (int(count) for count in re.findall(r"^ *(\d+) tokens", printed, re.M))
    assert halves == [kept // 2, kept // 2] and f"right is {names['needle'].number}" in printed
    assert len(re.findall(r"LoudValues, \d+ tokens, (?:16|4|3) bits", printed)) == 3, printed
    assert traits_of(names["LoudValues"](n_first=6)).sink_tokens == 6
