"""A run computes what is missing, once, and goes on after an interruption."""

import shutil
from dataclasses import replace

import pytest

from quantpress.errors import InvalidInputError
from quantpress.evaluation import runner as module
from quantpress.evaluation.arms import Arm, every_arm, uncompressed
from quantpress.evaluation.divergence.probe import DivergenceProbe
from quantpress.evaluation.results.records import REFUSED, Records
from quantpress.evaluation.runner import Runner, run_settings
from quantpress.evaluation.suites import FULL, QUICK, suite_by_name
from quantpress.presses import SnapKV, TurboQuant
from tests.pipelines.words import ours, text

SUITE = replace(
    QUICK,
    documents=3,
    context=300,
    continuation=9,
    queries=2,
    lengths=(200,),
    depths=(0.5,),
    task_tokens=300,
    tasks=("multi_key",),
    task_arms=(),
    grid_presses=("Knorm",),
    grid_bits=(16, 4),
    grid_budgets=(1 / 2,),
)
ARMS = [uncompressed(), Arm("TurboQuant", lambda: TurboQuant(bits=4, recent_tokens=8), "quantizer")]


def run(path, arms=ARMS, suite=SUITE, parts=("fidelity", "grid", "tasks")):
    pipe = ours()
    records = Records(path, run_settings(pipe, "tiny", suite, 0))
    Runner(pipe, suite, arms, records, text=text(2000)).run(parts)
    return records


def without_seconds(records):
    return [{name: value for name, value in line.items() if name != "seconds"} for line in records.lines]


def test_every_arm_meets_every_case(whole):
    records = whole
    assert [(line["arm"], line["case"]) for line in records.of("fidelity")] == [
        (arm.name, f"piece {i}") for i in (1, 2, 3) for arm in ARMS
    ]
    assert len(list(records.of("grid"))) == 2 * 3
    assert {line["arm"] for line in records.of("tasks")} == {arm.name for arm in ARMS}
    assert {line["task"] for line in records.of("tasks")} == {"needle", "multi_key"}
    assert all(line["attention"]["output"] for line in records.of("fidelity"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The records of a run that nothing interrupted."""
    return run(tmp_path_factory.mktemp("whole") / "whole.jsonl")


@pytest.mark.parametrize("after", [1, 4, 7])
def test_an_interrupted_run_goes_on(whole, tmp_path, monkeypatch, after):
    add, calls = Records.add, []

    def interrupted(self, *args, **kwargs):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(args)
        add(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Records, "add", interrupted)
        run(tmp_path / "parts.jsonl")
    over, measured = DivergenceProbe.over, []
    monkeypatch.setattr(
        DivergenceProbe, "over", lambda *args, **how: measured.append(1) or over(*args, **how)
    )
    again = run(tmp_path / "parts.jsonl")
    assert without_seconds(again) == without_seconds(whole)
    assert len(measured) == sum(line["measure"] in ("fidelity", "grid") for line in whole.lines) - min(
        after, 12
    )


def test_what_is_done_is_not_done_again(whole, tmp_path, monkeypatch):
    shutil.copy(whole.path, tmp_path / "results.jsonl")
    for name in ("DivergenceProbe", "ask"):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: pytest.fail("computed again"))
    assert run(tmp_path / "results.jsonl").lines == whole.lines


def test_a_new_arm_joins_an_old_run(tmp_path):
    run(tmp_path / "results.jsonl", parts=("fidelity",))
    more = [*ARMS, Arm("2 bits", lambda: TurboQuant(bits=2, recent_tokens=8), "yours")]
    records = run(tmp_path / "results.jsonl", more, parts=("fidelity",))
    assert [line["arm"] for line in records.lines] == [*[arm.name for arm in ARMS] * 3, *["2 bits"] * 3]


def test_other_sizes_are_another_run(tmp_path):
    run(tmp_path / "results.jsonl", parts=())
    with pytest.raises(InvalidInputError, match="other settings"):
        run(tmp_path / "results.jsonl", suite=replace(SUITE, context=200), parts=())


def test_a_press_that_refuses_is_noted_once_and_the_rest_goes_on(tmp_path):
    wide = Arm("wide", lambda: SnapKV(0.5, window_size=400), "eviction")
    records = run(tmp_path / "results.jsonl", [uncompressed(), wide, ARMS[1]], parts=("fidelity",))
    assert {line["arm"] for line in records.of("fidelity")} == {"uncompressed", "TurboQuant"}
    (refused,) = records.of(REFUSED)
    assert (refused["arm"], refused["case"]) == ("wide", "fidelity")
    assert "window" in refused["reason"]


def test_without_the_uncompressed_cache_there_is_no_run(tmp_path, monkeypatch):
    with pytest.raises(InvalidInputError, match="uncompressed"):
        run(tmp_path / "results.jsonl", ARMS[1:])
    with pytest.raises(InvalidInputError, match="'TurboQuant'"):
        run(tmp_path / "results.jsonl", [*ARMS, ARMS[1]])

    def fails(self, press, **how):
        raise InvalidInputError("the model is broken")

    monkeypatch.setattr(DivergenceProbe, "over", fails)
    with pytest.raises(InvalidInputError, match="broken"):
        run(tmp_path / "results.jsonl", parts=("fidelity",))


def test_suites_name_arms_that_exist():
    names = {arm.name for arm in every_arm()}
    assert len(names) == len(every_arm())
    for suite in (QUICK, FULL):
        assert suite_by_name(suite.name) is suite
        assert set(suite.task_arms) <= names
    with pytest.raises(InvalidInputError, match="'fast'"):
        suite_by_name("fast")


def test_only_the_named_arms_and_ones_own_answer_tasks(tmp_path):
    own = Arm("mine", lambda: TurboQuant(bits=2), "yours")
    few = replace(SUITE, task_arms=("uncompressed",))
    records = run(tmp_path / "results.jsonl", [*ARMS, own], few, ("tasks",))
    assert {line["arm"] for line in records.of("tasks")} == {"uncompressed", "mine"}
