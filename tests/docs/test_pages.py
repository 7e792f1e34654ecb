"""Every page: its blocks run, its commands are there, its links lead somewhere."""

import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from quantpress import cli
from quantpress.evaluation.adapters import kvpress_evaluation, lm_eval_model
from quantpress.evaluation.results import statistics
from quantpress.presses import TurboQuant
from quantpress.presses.expression import parse_press
from tests.docs import commands
from tests.docs.markdown import (
    LANGUAGES,
    MARKS,
    ROOT,
    Block,
    anchors,
    blocks,
    links,
    pages,
    run,
    shared_names,
    why_not_run,
)
from tests.pipelines.words import text, word_tokenizer
from tests.tiny_models import tiny_model

OWN_TEST = {"docs/migration.md": "test_migration.py"}


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and tokenizer in the place of the default model."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def reader(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the pages' readers have it: a README.md, a book.txt, a model and its config.json."""
    for module in ("quantpress.cli.loading", "quantpress.pipelines.default_model.lazy"):
        monkeypatch.setattr(f"{module}.ensure_default_model", lambda *_: tiny_folder)
    monkeypatch.setattr(statistics, "RESAMPLES", 20)
    for name in ("README.md", "book.txt"):
        (tmp_path / name).write_text(text(600), encoding="utf-8")
    for name in ("my-model-folder", "MODEL"):
        (tmp_path / name).symlink_to(tiny_folder)
    (tmp_path / "config.json").symlink_to(tiny_folder / "config.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("error:nothing of this context was packed")
@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
@pytest.mark.parametrize("page", [page for page in pages() if page not in OWN_TEST])
def test_python_blocks_run(page: str, reader: Path) -> None:
    run(blocks(page), shared_names())


@pytest.mark.filterwarnings("error:nothing of this context was packed")
@pytest.mark.parametrize("page", pages())
def test_commands_are_right(page: str, reader: Path) -> None:
    for block in blocks(page):
        if block.language == "bash":
            for words in commands.commands(block.code):
                commands.check(words)


@pytest.mark.parametrize("page", pages())
def test_every_block_says_what_it_is(page: str) -> None:
    for one in blocks(page):
        assert one.language in LANGUAGES, f"{page}:{one.line}: write python, bash, or nothing for output"
        assert one.mark in MARKS, f"{page}:{one.line}: a fence is marked {sorted(MARKS)}"


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page: str) -> None:
    for link in links(page):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        path = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        assert path.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(path.relative_to(ROOT).as_posix()), f"{page}: {link}"


def test_pages_with_tests_of_their_own_have_them() -> None:
    for page, test in OWN_TEST.items():
        assert page in pages() and (Path(__file__).parent / test).is_file()


def block(code: str, language: str = "python", mark: str = "") -> Block:
    return Block("page.md", "", 7, language, mark, code)


def test_a_wrong_block_is_noticed_at_its_line() -> None:
    names = shared_names()
    assert run([block("a = 1"), block("b = a + 1")], names)[-1]["b"] == 2
    with pytest.raises(NameError) as raised:
        run([block("c = 1\nmissing(c)")], names)
    assert raised.traceback[-1].lineno == 7  # counted from 0: line 8 of the page
    with pytest.raises(SyntaxError):
        run([block("this is no python", mark="other")], names)
    run([block("missing()", mark="other"), block("output", language="")], names)


def test_marks_say_where_a_block_runs() -> None:
    assert why_not_run(block("")) is None
    assert why_not_run(block("", mark="other")) == why_not_run(block("", mark="sketch")) is not None
    assert (why_not_run(block("", mark="gpu")) is None) == torch.cuda.is_available()


@pytest.mark.parametrize(
    "line",
    [
        "quantpress runn book.txt",
        "quantpress demo --tokenz 3",
        "make such_a_target_is_not_there",
        "python benchmarks/not_there.py",
        "python benchmarks/attention.py --not-an-option",
        "python -m quantpress.not_there",
        'ln -s "$PWD/examples/not_there" elsewhere',
        "rm -rf somewhere",
    ],
)
def test_a_wrong_command_is_noticed(line: str) -> None:
    (words,) = commands.commands(line)
    with pytest.raises((AssertionError, OSError, ModuleNotFoundError)):
        commands.check(words)


EVALUATION = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
EVALUATION_LINES = [
    shlex.split(line.partition("#")[0])
    for block in re.findall(r"```bash\n(.*?)```", EVALUATION, re.S)
    for line in block.replace("\\\n", " ").splitlines()
]


@pytest.mark.parametrize(
    "words", [words for words in EVALUATION_LINES if words[0] == "quantpress"], ids=" ".join
)
def test_a_command_takes_its_options(words: list[str]) -> None:
    command = get_command(cli.app).commands[words[1]]  # type: ignore[attr-defined]
    given = command.make_context(words[1], words[2:]).params  # what it cannot parse raises
    for press in given["press"] or ():
        parse_press(press)


def test_the_evaluation_of_kvpress_is_where_it_says() -> None:
    (words,) = [words for words in EVALUATION_LINES if words[0] == "python"]
    assert words[1:3] == ["-m", kvpress_evaluation.__name__]
    assert kvpress_evaluation.quantizer_of(words[words.index("--press_name") + 1]) is not None
    named = re.findall(r"`\+(turboquant\w+)`", EVALUATION)
    assert sorted(named) == sorted(kvpress_evaluation.QUANTIZERS)


def test_the_snippet_of_the_harness_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    harness = types.ModuleType("lm_eval")
    harness.simple_evaluate = lambda model, tasks: made.append(model)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", harness)
    monkeypatch.setattr(lm_eval_model, "lm_eval_model", lambda pipe, press: (pipe, press))
    (block,) = re.findall(r"```python sketch\n(.*?)```", EVALUATION, re.S)
    press = TurboQuant()
    exec(block, {"pipe": "pipe", "press": press})
    assert made == [("pipe", press)]
