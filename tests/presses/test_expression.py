"""Presses written as text: the same objects as in Python, nothing that runs, errors that help."""

import sys
from pathlib import Path
from typing import Any

import kvpress
import pytest

from quantpress.errors import CompositionError, InvalidInputError
from quantpress.presses import AdaKV, ChunkKV, Compose, KeyRerotation, Knorm, SnapKV, StreamingLLM, TurboQuant
from quantpress.presses.expression import parse_press

OWN = """
from kvpress import ScorerPress
from own_norms import negative

class Mine(ScorerPress):
    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return negative(keys.norm(dim=-1))

def mild(ratio=0.1):
    return Mine(ratio)

def nothing():
    return 3

number = 3
"""


@pytest.mark.parametrize(
    ("text", "press"),
    [
        ("SnapKV", SnapKV()),
        (" SnapKV() ", SnapKV()),
        ("SnapKV(0.3)", SnapKV(0.3)),
        ("SnapKV(compression_ratio=0.3, window_size=8)", SnapKV(0.3, window_size=8)),
        (
            "TurboQuant(bits=3, layer_bits={0: 16, -1: (4, 2.5)})",
            TurboQuant(3, layer_bits={0: 16, -1: (4, 2.5)}),
        ),
        ("TurboQuant(mean_key=False, key_bits=None)", TurboQuant(mean_key=False)),
        ("TurboQuant.preset('small', seed=7)", TurboQuant.preset("small", seed=7)),
        (
            "Compose.preset('question_aware', 0.3, bits=3)",
            Compose([ChunkKV(SnapKV(0.3)), TurboQuant(3)]),
        ),
        ("AdaKV(SnapKV(0.2))", AdaKV(SnapKV(0.2))),
        ("AdaKV(press=SnapKV)", AdaKV(SnapKV())),
        ("SnapKVPress(0.3)", kvpress.SnapKVPress(0.3)),
        ("SnapKV | TurboQuant", Compose([SnapKV, TurboQuant])),
        ("Compose([SnapKV(0.5), TurboQuant])", Compose([SnapKV(0.5), TurboQuant])),
        ("Knorm(0.1)|KeyRerotation(StreamingLLM)|TurboQuant(2)", None),
        ("ComposedPress([KnormPress(0.1), SnapKVPress(0.2)])", None),
    ],
)
def test_text_makes_what_python_makes(text: str, press: Any) -> None:
    found = parse_press(text)
    if press is None:
        press = eval(text, {**vars(kvpress), **_names()})  # the tests know what they run
    assert type(found) is type(press) and found == press


def _names() -> dict[str, Any]:
    return {
        "Knorm": Knorm,
        "KeyRerotation": _Rerotate,
        "StreamingLLM": StreamingLLM(),
        "TurboQuant": TurboQuant,
    }


def _Rerotate(press: Any) -> KeyRerotation:  # noqa: N802
    return KeyRerotation(press)


def test_none_is_no_press() -> None:
    assert parse_press("none") is None and parse_press(" None ") is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("SnapVK(0.3)", "SnapKV"),
        ("snapkv", "SnapKV"),
        ("TurboQaunt", "did you mean 'TurboQuant'"),
        ("balanced", r"write TurboQuant.preset\('balanced'\)"),
        ("SnapKV | blanced", r"write TurboQuant.preset\('balanced'\)"),
        ("question_aware", r"write Compose.preset\('question_aware'\)"),
        ("SnapKV(window=3)", r"no argument 'window'; did you mean 'window_size'"),
        ("SnapKV(1, 2, 3, 4, 5)", "its arguments are compression_ratio, window_size, kernel_size"),
        ("", "is no press"),
        ("SnapKV(", "is no press"),
        ("SnapKV)", "is no press"),
        ("3", "is no press"),
        ("SnapKV & TurboQuant", "is no press"),
        ("SnapKV(0.5) || TurboQuant", "is no press"),
        ("SnapKV(**{})", r"\*\*"),
        ("SnapKV(*[1])", "neither"),
        ("SnapKV(x)", "neither a plain value nor a press"),
        ("SnapKV(1.5)", "compression_ratio is 1.5"),
        ("SnapKV(lambda: 0)", "neither"),
        ("3(4)", "is no press"),
        ("__import__('os').system('true')", "is no press"),
        ("SnapKV.__init__(1)", "write its name alone"),
        ("TurboQuant.preset('huge')", "huge"),
        ("Compose.preset('huge')", "no composition 'huge'; use one of question_aware"),
        ("Compose.preset('question_aware', 2)", "compression_ratio is 2"),
        ("SnapKV(open('/etc/passwd'))", "no press 'open'"),
        ("(lambda: SnapKV)()", "is no press"),
        ("[SnapKV, TurboQuant]", "is no press"),
        ("TurboQuant(codec=print)", "neither"),
        ("(" * 1500 + "SnapKV" + ")" * 400, "is no press"),
        ("SnapKV" * 1000, "6000 characters"),
    ],
)
def test_anything_else_is_refused_with_a_remedy(text: str, reason: str) -> None:
    with pytest.raises(InvalidInputError, match=reason):
        parse_press(text)


def test_presses_must_still_go_together() -> None:
    with pytest.raises(CompositionError, match="quantize last"):
        parse_press("TurboQuant | SnapKV")


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with presses of a user in two modules that nothing else finds."""
    package = tmp_path / "own_package"
    package.mkdir()
    for file in (tmp_path / "own_presses.py", package / "presses.py"):
        file.write_text(OWN)
    (tmp_path / "own_norms.py").write_text("def negative(norms):\n    return -norms\n")
    (tmp_path / "own_broken.py").write_text("1 / 0")
    (tmp_path / "own_needy.py").write_text("import not_there")
    monkeypatch.chdir(tmp_path)
    for name in ("own_presses", "own_norms", "own_package", "own_package.presses", "own_broken", "own_needy"):
        monkeypatch.setitem(sys.modules, name, sys)  # so that the entry goes when the test ends
        del sys.modules[name]
    return tmp_path


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("own_presses:Mine", "Mine(compression_ratio=0.0)"),
        ("own_presses:Mine(0.5) | TurboQuant(bits=3)", "Compose(Mine(0.5) | TurboQuant(3))"),
        ("AdaKV(press=own_package.presses:Mine(compression_ratio=0.25))", "Mine(compression_ratio=0.25)"),
        ("own_presses:mild", "Mine(compression_ratio=0.1)"),
        ("own_presses:mild(ratio=0.2)", "Mine(compression_ratio=0.2)"),
        ("kvpress.presses.snapkv_press:SnapKVPress(0.3)", "SnapKVPress(compression_ratio=0.3"),
    ],
)
def test_a_press_of_ones_own_is_named_with_its_module(own_folder: Path, text: str, shown: str) -> None:
    path = list(sys.path)
    assert shown in repr(parse_press(text))
    assert parse_press(text) == parse_press(text) and sys.path == path


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("own_pressses:Mine", "there is no module 'own_pressses' .* go to the folder of own_pressses.py"),
        ("own_presses.py:Mine", "there is no module 'own_presses.py'"),
        ("own_presses:Mime", "has no 'Mime'; did you mean 'Mine'"),
        ("own_norms:norm", "has no 'norm'; there are negative"),
        ("own_presses:number", "own_presses:number in .* is no press; name a press class"),
        ("os:system('true')", "os:system in .* is no press"),
        ("own_presses:nothing()", "made 3, which is no press"),
        ("own_presses:Mine(1.5)", "cannot be made so .*; its arguments are compression_ratio"),
        ("own_presses:mild(ration=1)", "has no argument 'ration'; did you mean 'ratio'"),
        ("own_broken:Mine", "own_broken in .* cannot be imported .ZeroDivisionError"),
        ("own_needy:Mine", "own_needy in .* cannot be imported .*not_there"),
        ("own_presses:Mine.score(1)", "write its name alone"),
        ("own_presses: Mine", "is no press; write something like"),
    ],
)
def test_a_press_that_is_not_there_is_refused(own_folder: Path, text: str, reason: str) -> None:
    with pytest.raises(InvalidInputError, match=reason):
        parse_press(text)


def test_a_text_in_quotes_may_have_a_colon() -> None:
    with pytest.raises(InvalidInputError, match="'own:preset'"):
        parse_press("TurboQuant.preset('own:preset')")
