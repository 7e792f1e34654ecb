"""Presses written as text: the same objects as in Python, nothing that runs, errors that help."""

from typing import Any

import kvpress
import pytest

from quantpress.errors import CompositionError, InvalidInputError
from quantpress.presses import AdaKV, Compose, KeyRerotation, Knorm, SnapKV, StreamingLLM, TurboQuant
from quantpress.presses.expression import parse_press


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
