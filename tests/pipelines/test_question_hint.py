"""The hint comes once for each kind of press that evicts by an unseen question, and never otherwise."""

import json
import logging
from pathlib import Path

import pytest

from quantpress.pipelines import question_hint
from quantpress.pipelines.question_hint import CASES, CHUNKKV, DEMOTE, SNAPKV
from tests.pipelines.cases import LONG_CONTEXT
from tests.pipelines.words import ours

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "question_in_view.json"
SNAP = "SnapKV(0.5, window_size=16)"


@pytest.fixture
def hints(caplog, monkeypatch):
    monkeypatch.setattr(question_hint, "_hinted", set())
    caplog.set_level(logging.WARNING)

    def named() -> list[str]:
        found = [one.getMessage() for one in caplog.records if one.name == question_hint.__name__]
        caplog.clear()
        return found

    return named


def test_it_comes_once_for_each_kind_of_press(hints):
    pipe = ours(max_new_tokens=1)
    pipe(LONG_CONTEXT, question="w1", press=f"{SNAP} | TurboQuant(4)")
    (hint,) = hints()
    assert hint.startswith("SnapKV(0.5, window_size=16) keeps what") and "kept 0 of 10" in hint
    assert "question_aware=True (--question-aware) with ChunkKV(SnapKV(0.5)), which kept 9 of 10" in hint
    pipe(LONG_CONTEXT, question="w1", press=f"{SNAP} | TurboQuant(3)")
    assert not hints()
    read = pipe.read(LONG_CONTEXT, press=f"ChunkKV({SNAP}) | TurboQuant(4)")
    assert not hints()
    pipe(read, questions=["w1", "w2"])
    (hint,) = hints()
    assert "kept 4 of 10" in hint


@pytest.mark.parametrize(
    ("press", "asked"),
    [
        (f"{SNAP} | TurboQuant(4)", {"question": "w1", "question_aware": True}),
        (f"{SNAP} | TurboQuant(4)", {}),
        (SNAP, {"question": "w1"}),
        (f"Chunk({SNAP}, chunk_length=64) | TurboQuant(4)", {"question": "w1"}),
        (f"Demote({SNAP}) | TurboQuant(4)", {"question": "w1"}),
        ("KeyDiff(0.5) | TurboQuant(4)", {"question": "w1"}),
        ("ExpectedAttention(0.5) | TurboQuant(4)", {"question": "w1"}),
        ("TurboQuant(4)", {"question": "w1"}),
    ],
)
def test_it_does_not_come(hints, press, asked):
    ours(max_new_tokens=1)(LONG_CONTEXT, press=press, **asked)
    assert not hints()


def test_its_figures_are_measured():
    rows = {row["cache"]: row for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]}
    for kept in (SNAPKV, CHUNKKV, DEMOTE):
        row = rows[f"{kept.press} | TurboQuant(4)"]
        assert (row["cases"], row["blind"], row["in view"]) == (CASES, kept.blind, kept.in_view)
