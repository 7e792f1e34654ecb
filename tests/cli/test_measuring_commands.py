"""The commands that measure: what they print is what was measured, on a tiny model saved to a folder."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.nemotron import modeling_nemotron
from typer.testing import CliRunner

from quantpress import cli
from quantpress.cache import cache_memory, host
from quantpress.cli import bench, compare, inspect, loading, validate
from quantpress.cli.inspect import CANDIDATES, Candidate, suggested
from quantpress.codecs import turboquant as codec
from quantpress.evaluation.measuring import TokenClock, machine
from quantpress.evaluation.tasks.haystack import book_piece
from tests.pipelines.words import model_folder, ours, text, word_tokenizer

CONTEXT = text(500)
QUESTIONS = ("w1 w2", "w7")
PRESSES = ("TurboQuant(bits=8)", "SnapKV(0.5, window_size=16) | TurboQuant(bits=2)")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with model and tokenizer."""
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def file(tmp_path: Path) -> str:
    """A text file."""
    (tmp_path / "text.txt").write_text(CONTEXT, encoding="utf-8")
    return str(tmp_path / "text.txt")


def invoke(*arguments: str, status: int = 0) -> Any:
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result


def given(option: str, values: tuple[str, ...]) -> list[str]:
    return [part for value in values for part in (option, value)]


def test_compare_gives_the_pipelines_answers_and_their_agreement(model: str, file: str) -> None:
    options = [*given("-q", QUESTIONS), *given("-p", PRESSES), "-m", model, "--device", "cpu"]
    found = json.loads(invoke("compare", file, *options, "--max-new-tokens", "9", "--json").stdout)
    rows = found["presses"]
    assert [row["press"] for row in rows] == ["uncompressed", "TurboQuant(8)", rows[2]["press"]]
    plain: list[list[int]] = []
    for row, press in zip(rows, ("none", *PRESSES), strict=True):
        clock = TokenClock()
        asked = {"questions": list(QUESTIONS), "press": press, "max_new_tokens": 9}
        expected = ours()(CONTEXT, report=True, streamer=clock, **asked)
        plain = plain or clock.tokens
        assert [answer["text"] for answer in row["answers"]] == expected["answers"]
        assert row["report"]["resident_bytes"] == expected["report"].resident_bytes
        for answer, ids, whole in zip(row["answers"], clock.tokens, plain, strict=True):
            differ = [a != b for a, b in zip(ids, whole, strict=True)]
            same = differ.index(True) if True in differ else 9
            assert (answer["same_tokens"], answer["tokens"]) == (same, 9)
            assert answer["agreement"] == pytest.approx(same / 9)
    assert all(answer["agreement"] == 1 for answer in rows[0]["answers"])
    assert any(answer["agreement"] < 1 for answer in rows[2]["answers"])


def test_compare_says_what_a_press_cannot_do_and_goes_on(model: str, file: str) -> None:
    presses = ("SnapKV(0.5, window_size=5000)", "Knorm(0.5)")
    options = [*given("-p", presses), "-q", "w1", "-m", model, "--device", "cpu"]
    found = json.loads(invoke("compare", file, *options, "--json", status=2).stdout)
    assert "501 tokens" in found["presses"][1]["refusal"] and found["presses"][1]["answers"] == []
    assert found["presses"][2]["refusal"] is None and found["presses"][2]["report"]["tokens_kept"] == 250
    shown = " ".join(invoke("compare", file, *options, status=2).stdout.split())
    assert "refused" in shown and "Knorm(0.5)" in shown


def test_compare_without_a_text_asks_for_a_hidden_number(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def ask(pipe: Any, read: str, questions: list[str], *_: Any) -> Any:
        asked.append((read, questions))
        return compare.Compared("uncompressed"), [[1]]

    monkeypatch.setattr(loading, "load_pipeline", lambda *_: ours())
    monkeypatch.setattr(compare, "_ask", ask)
    compare.compare(press=["none"], tokens=300)
    ((read, (question,)),) = asked
    city = question.split("for ")[1].split(" mentioned")[0]
    assert f"special magic number for {city} is: " in read


def test_bench_measures_every_side(model: str) -> None:
    options = ["--tokens", "300", "--new-tokens", "8", "--repeats", "1", "-m", model, "--device", "cpu"]
    found = json.loads(invoke("bench", *options, *given("-p", PRESSES[:1]), "--json").stdout)
    plain, packed = found["presses"]
    assert (plain["press"], packed["press"]) == ("uncompressed", "TurboQuant(8)")
    assert found["new_tokens"] == plain["report"]["new_tokens"] == packed["report"]["new_tokens"] == 8
    for row in (plain, packed):
        assert 0 < row["report"]["prefill_s"] < row["first_token_s"]
        assert row["tokens_per_s"] > 0 and row["peak_bytes"] >= 0
        assert row["speed_ratio"] == pytest.approx(row["tokens_per_s"] / plain["tokens_per_s"])
    cache = ours().read(book_piece(word_tokenizer(), 300), press=None).cache
    assert plain["report"]["resident_bytes"] == cache_memory(cache).total_bytes
    assert found["machine"]["device"] == "cpu"


def test_bench_answers_are_as_long_as_asked_although_the_model_would_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = ours()
    # every token but one would end the answer
    monkeypatch.setattr(pipe.model.generation_config, "eos_token_id", list(range(2, 256)))
    _, speed, _, report = bench._timed(pipe, CONTEXT, None, 8)
    assert report.new_tokens == 8 and speed > 0


def test_bench_shows_a_table(model: str) -> None:
    options = ["--tokens", "200", "--new-tokens", "6", "--repeats", "1", "-m", model, "--device", "cpu"]
    shown = invoke("bench", *options).stdout
    for words in (
        "uncompressed",
        "TurboQuant(4)",
        "tokens/s",
        "token",
        "peak",
        "1.00x",
        "medians of 1",
    ):
        assert words in shown


def test_inspect_names_packed_layers_and_suggests_a_press(model: str) -> None:
    found = json.loads(invoke("inspect", model, "--tokens", "400", "--device", "cpu", "--json").stdout)
    assert [layer["packed"] for layer in found["layers"]] == [True] * 3
    assert all(0 <= layer["keys"]["mean_energy"] <= 1 for layer in found["layers"])
    assert [one["press"] for one in found["candidates"]] == list(CANDIDATES)
    errors = [one["output_error"] for one in found["candidates"]]
    assert errors[0] > errors[-1] > 0
    assert found["suggestion"] in CANDIDATES and found["refusal"] is None
    shown = invoke("inspect", model, "--tokens", "400", "--device", "cpu").stdout
    shown = " ".join(shown.split())  # lines are wrapped
    assert "3 of 3 layers are packed" in shown and "Suggested: --press" in shown


@pytest.mark.parametrize(
    ("family", "packed", "why"),
    [
        ("gemma3", [False, True, True], "a sliding window"),
        ("mistral_sliding", [False] * 3, "a sliding window"),
        (
            "nemotron",
            [hasattr(modeling_nemotron, "ALL_ATTENTION_FUNCTIONS")] * 3,
            "this model's cache cannot be packed",
        ),
        ("falcon_h1", [host.HOLDS_STATES] * 3, "this model's cache cannot be packed"),
        ("lfm2", [host.HOLDS_STATES] * 2, "this model's cache cannot be packed"),
    ],
)
def test_inspect_says_why_a_layer_is_not_packed(
    family: str, packed: list[bool], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_pipeline", lambda *_: ours(family))
    found = inspect.inspect(tokens=300)
    assert [layer.packed for layer in found.layers] == packed
    assert [layer.reason for layer in found.layers] == ["" if one else why for one in packed]
    assert (found.suggestion is None) == (not any(packed)) == (found.refusal is not None)


def test_inspect_of_a_short_text_says_that_nothing_could_be_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "short.txt").write_text(text(100), encoding="utf-8")
    monkeypatch.setattr(loading, "load_pipeline", lambda *_: ours())
    found = inspect.inspect(file=str(tmp_path / "short.txt"))
    assert (found.candidates, found.suggestion) == ((), "TurboQuant")
    assert "none of the 100 tokens was packed" in str(found.refusal)


def test_the_smallest_setting_that_is_enough_is_suggested() -> None:
    tried = [Candidate(press, 3.0, top1, 0.5, 0.1) for press, top1 in (("a", 0.7), ("b", 0.91), ("c", 0.99))]
    assert suggested(tried) == "b"
    assert suggested([replace(one, top1=0.5) for one in tried]) == "c"
    assert suggested([]) == "TurboQuant"


def test_validate_passes_and_shows_every_codec() -> None:
    options = ["--bits", "3", "--bits", "2.5", "--head-dim", "64", "--samples", "512"]
    found = json.loads(invoke("validate", *options, "--json").stdout)
    assert found["ok"] and len(found["codecs"]) == 4
    for row in found["codecs"]:
        assert row["shannon"] <= row["distortion"] <= row["paper_bound"]
    assert invoke("validate", *options).stdout.count(" ok ") == 4


@pytest.mark.parametrize(("bits", "estimator"), [(3, "prod"), (8, "mse")])
def test_validate_covers_what_the_papers_bound_does_not(bits: int, estimator: str) -> None:
    found = validate.validate(bits=[bits], head_dim=[64], samples=512, estimator=estimator)
    assert not found.exit_status and all(check.report.paper_bound is None for check in found.checks)


@pytest.mark.parametrize("factor", [1.2, 0.5])
def test_validate_exits_1_when_a_codec_is_not_what_it_says(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = codec.decode_pages
    monkeypatch.setattr(codec, "decode_pages", lambda *arguments: factor * whole(*arguments))
    result = invoke("validate", "--bits", "4", "--head-dim", "64", "--samples", "256", status=1)
    assert result.stdout.count("FAILED") == 2


def test_a_codec_that_is_better_than_possible_fails_too() -> None:
    (check, *_) = validate.validate(bits=[2], head_dim=[64], samples=512).checks
    assert check.ok
    for distortion in (0.9 * check.report.shannon, 1.1 * float(check.report.paper_bound or 0)):
        report = replace(check.report, distortion=distortion, expected=distortion)
        assert report.ok and not replace(check, report=report).ok


def test_what_libraries_print_stays_out_of_the_json(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(*arguments: Any) -> Any:
        print("a library says hello")
        return ours()

    monkeypatch.setattr(loading, "load_pipeline", noisy)
    options = ["--tokens", "100", "--new-tokens", "6", "--repeats", "1", "--json"]
    result = invoke("bench", *options)
    assert json.loads(result.stdout)["presses"]
    assert "hello" in result.stderr


def test_the_machine_of_a_pipeline_is_named() -> None:
    found = machine(ours())
    assert (found["device"], found["dtype"], found["torch"]) == ("cpu", "float32", torch.__version__)


def test_a_piece_of_the_book_has_the_length_that_was_asked_for() -> None:
    piece = book_piece(word_tokenizer(), 100)
    assert 98 <= len(word_tokenizer().encode(piece)) <= 100
