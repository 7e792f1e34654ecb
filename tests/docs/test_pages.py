"""Every page: its blocks run, and its commands are there. `make docs` follows its links."""

import re
import shlex
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sybil import Example
from typer.main import get_command
from typer.testing import CliRunner

from quantpress import cli
from quantpress.cache import WidthPlan
from quantpress.cache.saved.config_fingerprint import config_fingerprint
from quantpress.evaluation.adapters import kvpress_evaluation, lm_eval_model
from quantpress.evaluation.results import statistics
from quantpress.pipelines import arguments
from quantpress.presses import TurboQuant
from quantpress.presses.expression import parse_press
from tests.docs import commands
from tests.docs.markdown import ROOT, blocks, fence, pages, run, why_not_run
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
    """A folder as the pages' readers have it: README.md, book.txt, a model, its config.json and a plan."""
    for module in ("quantpress.cli.loading", "quantpress.pipelines.default_model.lazy"):
        monkeypatch.setattr(f"{module}.ensure_default_model", lambda *_: tiny_folder)
    monkeypatch.setattr(statistics, "RESAMPLES", 20)
    monkeypatch.setattr(arguments, "DEFAULT_NEW_TOKENS", 8)  # of a model whose answers never end
    for name in ("README.md", "book.txt"):
        (tmp_path / name).write_text(text(600), encoding="utf-8")
    for name in ("my-model-folder", "MODEL"):
        (tmp_path / name).symlink_to(tiny_folder)
    (tmp_path / "config.json").symlink_to(tiny_folder / "config.json")
    fingerprint = config_fingerprint(tiny_model("llama").config)
    WidthPlan("my-model", fingerprint, {0: (4, 2), 1: (3, 2), 2: (2, 2)}).save(tmp_path / "plan.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("error:nothing of this context was packed")
@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
@pytest.mark.parametrize("page", pages())
def test_every_block_does_what_it_says(page: str, reader: Path) -> None:
    found = blocks(ROOT / page)
    run([block for block in found if page not in OWN_TEST or fence(block)[0] != "python"])


def test_pages_with_tests_of_their_own_have_them() -> None:
    for page, test in OWN_TEST.items():
        assert page in pages() and (Path(__file__).parent / test).is_file()


@pytest.fixture
def page(tmp_path: Path) -> Callable[..., list[Example]]:
    """Makes a page of blocks, each with what its fence says."""

    def write(*fenced: tuple[str, str]) -> list[Example]:
        path = tmp_path / "page.md"
        path.write_text("\n\n".join(f"```{fence}\n{code}\n```" for fence, code in fenced), encoding="utf-8")
        return blocks(path, model=types.SimpleNamespace())

    return write


def test_a_wrong_block_is_noticed_at_its_line(page: Callable[..., list[Example]]) -> None:
    assert run(page(("python", "a = 1"), ("python", "b = a + 1")))[-1]["b"] == 2
    with pytest.raises(NameError) as raised:
        run(page(("python", "c = 1"), ("python", "d = 1\nmissing(c)")))
    assert raised.traceback[-1].lineno == 6  # counted from 0: line 7 of the page
    for wrong in (("python gpuu", ""), ("pyhton", ""), ("bash", "rm -rf somewhere")):
        with pytest.raises(AssertionError):
            run(page(wrong))
    with pytest.raises(SyntaxError):
        run(page(("python other", "this is no python")))
    run(page(("python other", "missing()"), ("", "output"), ("console", "$ rm -rf somewhere")))


def test_marks_say_where_a_block_runs(page: Callable[..., list[Example]]) -> None:
    plain, other, sketch, gpu = map(
        why_not_run, page(("python", ""), ("python other", ""), ("python sketch", ""), ("python gpu", ""))
    )
    assert plain is None and other == sketch is not None
    assert (gpu is None) == torch.cuda.is_available()


@pytest.mark.parametrize(
    "line",
    [
        "quantpress runn book.txt",
        "quantpress demo --tokenz 3",
        "make such_a_target_is_not_there",
        "python benchmarks/not_there.py",
        "python benchmarks/attention.py --not-an-option",
        "python -m quantpress.not_there",
        "vllm serve MODEL --kv-cache-dtype quantpress_5bit --attention-backend QUANTPRESS --max-num-seqs 8",
        'ln -s "$PWD/examples/not_there" elsewhere',
    ],
)
def test_a_wrong_command_is_noticed(line: str) -> None:
    (words,) = commands.commands(line)
    with pytest.raises((AssertionError, OSError, ModuleNotFoundError)):
        commands.check(words)


def test_what_fits_in_vllm_is_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")
    (command, shown), *_ = re.findall(
        r"```bash\n(quantpress memory .*)\n```\n\n```console\n(.*?)```", page, re.S
    )
    monkeypatch.setenv("COLUMNS", "120")
    printed = CliRunner().invoke(cli.app, shlex.split(command)[1:]).output
    assert shown.split() == printed.split()[: len(shown.split())]


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
