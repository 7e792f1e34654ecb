"""`evaluate` from Python: presses in every form, the grid with one's own, results as text and as rows."""

from dataclasses import dataclass, replace

import pytest
import torch
from kvpress import ScorerPress

from quantpress.errors import CompositionError, InvalidInputError
from quantpress.evaluation import Evaluation, evaluate
from quantpress.evaluation.arms import Arm
from quantpress.evaluation.results import statistics
from quantpress.evaluation.suites import QUICK
from quantpress.presses import Knorm, SnapKV, TurboQuant
from tests.pipelines.words import ours, text
from tests.tiny_models import tiny_model

SUITE = replace(
    QUICK, documents=1, context=300, continuation=5, queries=2, grid_bits=(16, 4), grid_budgets=(1 / 4,)
)


@dataclass
class Longest(ScorerPress):
    """A press of a user, which quantpress knows nothing of."""

    recent: int = 8

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        scores = values.norm(dim=-1)
        scores[..., -self.recent :] = torch.inf
        return scores


@pytest.fixture(autouse=True)
def rough_intervals(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 20)


def run(presses=(), model=None, **how):
    return evaluate(presses, model or ours(), **{"suite": SUITE, "text": text(2000), "against": ()} | how)


def test_presses_in_every_form_become_arms(tmp_path):
    press, packed = Longest(0.5), TurboQuant(bits=4, recent_tokens=8)
    given = [press, Longest, "Knorm(0.25)", [Longest(0.25), packed], Arm("mine", lambda: Knorm(0.5), "yours")]
    found = run(given, parts=["fidelity"], against=["SnapKV(0.5)"])
    kept = {row.arm: row.bits_per_value / 32 for row in found.findings.fidelity}
    names = ["uncompressed", "SnapKV(0.5)", "Longest(0.5)", "Longest(0.0)", "Knorm(0.25)"]
    assert list(kept) == [*names, "Longest(0.25) | TurboQuant(4, recent_tokens=8)", "mine"]
    assert [kept[name] for name in names] == pytest.approx([1, 0.5, 0.5, 1, 0.75], abs=0.01)
    assert kept["mine"] == 0.5 and kept["Longest(0.25) | TurboQuant(4, recent_tokens=8)"] < 0.5
    assert press == Longest(0.5)
    assert "| Longest(0.5) |" in str(found) == found._repr_markdown_()
    assert found.as_dict()["fidelity"][2]["arm"] == "Longest(0.5)" and not found.as_dict()["grid"]
    assert [path.read_text("utf-8") for path in found.write(tmp_path / "new")] == [str(found)]


def test_ones_own_press_joins_the_grid_and_fills_the_budget():
    given = ["Knorm", Longest(recent=4), SnapKV, "StreamingLLM(n_sink=2)"]
    rows = run(parts=["grid"], grid_presses=given).findings.grid
    assert [row.arm.partition(",")[0] for row in rows[:4]] == [
        "Knorm", "Longest", "SnapKV", "StreamingLLM(n_sink=2)",
    ]  # fmt: skip
    assert len(rows) == 8 and all(0.9 * row.budget < 1 / row.ratio <= row.budget for row in rows)


def test_a_folder_keeps_results_of_one_text(tmp_path):
    first = run([Longest(0.5)], parts=["fidelity"], output=tmp_path)
    again = run([Longest(0.5), Knorm(0.5)], parts=["fidelity"], output=str(tmp_path))
    assert again.records.lines[: len(first.records.lines)] == first.records.lines
    assert again.records.settings["suite"]["context"] == 300 and len(again.records.lines) == 3
    assert isinstance(again, Evaluation)
    with pytest.raises(InvalidInputError, match="other settings"):
        run([Longest(0.5)], parts=["fidelity"], output=tmp_path, text=text(2000, seed=1))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"presses": [3]}, "press=3 is no press"),
        ({"presses": [None]}, "two arms are called 'uncompressed'"),
        ({"presses": [Longest(0.5), Longest(0.5)]}, r"two arms are called 'Longest\(0.5\)'"),
        ({"presses": ["no_such_module:Press"]}, "there is no module 'no_such_module'"),
        ({"against": ["SnapKV"]}, "there is no arm 'SnapKV'"),
        ({"parts": ["speed"]}, "there is no part 'speed'; use some of fidelity"),
        ({"document": 2}, "there is no size 'document'; use some of name, documents"),
        ({"suite": "fast"}, "there is no suite 'fast'"),
        ({"grid_presses": ["SnapKVV"]}, "did you mean 'SnapKV'"),
        ({"grid_presses": ["none"]}, "name presses that evict"),
        ({"grid_presses": [Longest, Longest()]}, "two presses of the grid are called 'Longest'"),
        ({"grid_presses": [TurboQuant()]}, "quantizes, which the grid does itself"),
        ({"grid_presses": ["SimLayerKV"]}, "SimLayerKV has no compression_ratio that can be set"),
        ({"model": tiny_model("llama")}, "a LlamaForCausalLM alone has no tokenizer; give pipeline"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(how, reason):
    def load():
        pytest.fail("the model is loaded")

    with pytest.raises(InvalidInputError, match=reason):
        run(**{"model": load} | how)


def test_presses_must_go_together():
    with pytest.raises(CompositionError, match="quantize last"):
        run([[TurboQuant, Longest]])
