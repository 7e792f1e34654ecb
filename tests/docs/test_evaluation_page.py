"""What docs/evaluation.md says to type can be typed."""

import re
import shlex
import sys
import types
from pathlib import Path

import pytest
from typer.main import get_command

from quantpress import cli
from quantpress.evaluation.adapters import kvpress_evaluation, lm_eval_model
from quantpress.presses import TurboQuant
from quantpress.presses.expression import parse_press

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
LINES = [
    shlex.split(line.partition("#")[0])
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    for line in block.replace("\\\n", " ").splitlines()
]


@pytest.mark.parametrize("words", [words for words in LINES if words[0] == "quantpress"], ids=" ".join)
def test_a_command_takes_its_options(words: list[str]) -> None:
    command = get_command(cli.app).commands[words[1]]  # type: ignore[attr-defined]
    given = command.make_context(words[1], words[2:]).params  # what it cannot parse raises
    for press in given["press"] or ():
        parse_press(press)


def test_the_evaluation_of_kvpress_is_where_it_says() -> None:
    (words,) = [words for words in LINES if words[0] == "python"]
    assert words[1:3] == ["-m", kvpress_evaluation.__name__]
    assert kvpress_evaluation.quantizer_of(words[words.index("--press_name") + 1]) is not None
    named = re.findall(r"`\+(turboquant\w+)`", PAGE)
    assert sorted(named) == sorted(kvpress_evaluation.QUANTIZERS)


def test_the_snippet_of_the_harness_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    harness = types.ModuleType("lm_eval")
    harness.simple_evaluate = lambda model, tasks: made.append(model)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", harness)
    monkeypatch.setattr(lm_eval_model, "lm_eval_model", lambda pipe, press: (pipe, press))
    (block,) = re.findall(r"```python sketch\n(.*?)```", PAGE, re.S)
    press = TurboQuant()
    exec(block, {"pipe": "pipe", "press": press})
    assert made == [("pipe", press)]
