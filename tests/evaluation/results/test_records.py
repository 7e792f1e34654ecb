"""Results survive an interruption, and are never mixed with those of another run."""

import json

import pytest

from quantpress.errors import InvalidInputError
from quantpress.evaluation.results.records import Records

SETTINGS = {"model": "m", "suite": {"context": 1024, "lengths": (1, 2)}}


def test_a_run_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "folder" / "results.jsonl"
    first = Records(path, SETTINGS)
    first.add("fidelity", "a", "piece 1", kl=[0.5, 0.25])
    again = Records(path, SETTINGS)
    assert again.has("fidelity", "a", "piece 1")
    assert not again.has("fidelity", "a", "piece 2")
    assert not again.has("grid", "a", "piece 1")
    assert [line["kl"] for line in again.of("fidelity")] == [[0.5, 0.25]]
    again.add("fidelity", "b", "piece 1", kl=[1.0])
    assert [line["arm"] for line in Records(path, SETTINGS).of("fidelity")] == ["a", "b"]
    assert [line["arm"] for line in Records(path, SETTINGS).of("fidelity", "b")] == ["b"]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_that_was_cut_short_is_dropped(tmp_path, cut):
    path = tmp_path / "results.jsonl"
    records = Records(path, SETTINGS)
    records.add("tasks", "ü", "one", score=1.0)
    whole = path.read_bytes()
    records.add("tasks", "ü", "two", score=0.0)
    path.write_bytes(path.read_bytes()[:-cut])
    again = Records(path, SETTINGS)
    assert not again.has("tasks", "ü", "two")
    assert path.read_bytes() == whole
    again.add("tasks", "ü", "two", score=0.5)
    assert [json.loads(line)["score"] for line in path.read_text("utf-8").splitlines()[1:]] == [1.0, 0.5]


def test_other_settings_are_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    Records(path, SETTINGS)
    with pytest.raises(InvalidInputError, match=r"model 'm', now 'n'.*--output"):
        Records(path, {**SETTINGS, "model": "n"})


@pytest.mark.parametrize("text", ["no json\n", '{"measure": "tasks", "arm": "a", "case": "b"}\n', "[1]\n"])
def test_another_file_is_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    with pytest.raises(InvalidInputError, match="--output"):
        Records(path, SETTINGS)
    assert path.read_text() == text


def test_an_answer_may_hold_any_character(tmp_path):
    answer = "one\u2028two\u0085three\x0bfour\nfive"
    Records(tmp_path / "results.jsonl", SETTINGS).add("tasks", "a", "b", answer=answer)
    (line,) = Records(tmp_path / "results.jsonl", SETTINGS).of("tasks")
    assert line["answer"] == answer


def test_a_figure_that_is_no_number_is_not_written(tmp_path):
    records = Records(tmp_path / "results.jsonl", SETTINGS)
    with pytest.raises(ValueError, match="JSON"):
        records.add("fidelity", "a", "b", kl=[float("nan")])
    assert not Records(records.path, SETTINGS).lines
