"""The commands that need a model, on a tiny one that was saved to a folder."""

import json
import os
import stat
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from quantpress import cli
from quantpress.cache import ModelProfile
from quantpress.cli import loading
from quantpress.cli.loading import load_pipeline
from quantpress.errors import InvalidInputError
from quantpress.evaluation.measuring import device_names, devices_of
from tests.pipelines.words import model_folder, ours, text
from tests.tiny_models import tiny_model

CONTEXT = text(500)
QUESTIONS = ["w1 w2", "w7"]
PRESS = "SnapKV(0.5, window_size=16) | TurboQuant(bits=3)"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with model and tokenizer."""
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def context(tmp_path: Path) -> str:
    """A text file."""
    path = tmp_path / "text.txt"
    path.write_text(CONTEXT, encoding="utf-8")
    return str(path)


def invoke(*arguments: str, **options: Any) -> Any:
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False, **options)
    assert result.exit_code == 0, result.output
    return result


def asked() -> list[str]:
    return [part for question in QUESTIONS for part in ("-q", question)]


def answers(result: Any) -> list[str]:
    return [entry["answer"] for entry in json.loads(result.stdout)["answers"]]


def test_pack_then_run_answers_as_run_does_and_as_the_pipeline_does(
    model: str, context: str, tmp_path: Path
) -> None:
    options = ["-m", model, "--device", "cpu"]
    direct = invoke("run", context, *asked(), "-p", PRESS, *options, "--max-new-tokens", "9", "--json")
    expected = ours()(CONTEXT, questions=QUESTIONS, press=PRESS, max_new_tokens=9)["answers"]
    assert answers(direct) == expected
    output = str(tmp_path / "out" / "..") + "/packed"
    os.makedirs(tmp_path / "out")
    packed = json.loads(invoke("pack", context, "-p", PRESS, "-o", output, *options, "--json").stdout)
    assert packed["file_bytes"] == Path(output).stat().st_size > packed["resident_bytes"]
    assert stat.S_IMODE(Path(output).stat().st_mode) == 0o600
    loaded = invoke("run", "--cache", output, *asked(), "--max-new-tokens", "9", "--json")
    assert answers(loaded) == expected
    found = json.loads(loaded.stdout)
    assert found["report"]["resident_bytes"] == packed["resident_bytes"]
    assert found["press"] == packed["press"] and found["model"] == model


def test_a_context_is_packed_and_asked_elsewhere(model: str, context: str) -> None:
    url, options = "memory://bucket/packed", ["-m", model, "--device", "cpu"]
    direct = invoke("run", context, *asked(), "-p", PRESS, *options, "--json")
    packed = json.loads(invoke("pack", context, "-p", PRESS, "-o", url, *options, "--json").stdout)
    assert packed["file"] == url
    loaded = invoke("run", "--cache", url, *asked(), "--json")
    assert answers(loaded) == answers(direct) and json.loads(loaded.stdout)["model"] == model
    for command in (["pack", context, "-o", "s4://b/a"], ["run", "--cache", "s4://b/a"]):
        with pytest.raises(InvalidInputError, match=r"Protocol not known: s4.*did you mean 's3'"):
            invoke(*command, "-m", "a/model/that/is/not/there")


def test_the_question_in_view(model: str, context: str) -> None:
    how = [*asked(), "-p", PRESS, "-m", model, "--device", "cpu", "--max-new-tokens", "9", "--json"]
    expected = ours()(CONTEXT, questions=QUESTIONS, press=PRESS, max_new_tokens=9, question_aware=True)
    found = invoke("run", context, *how, "--question-aware")
    assert answers(found) == expected["answers"] and json.loads(found.stdout)["question_aware"]
    compared = json.loads(invoke("compare", context, *how, "--question-aware").stdout)
    texts = [answer["text"] for answer in compared["presses"][1]["answers"]]
    assert texts == expected["answers"] and compared["question_aware"]
    with pytest.raises(InvalidInputError, match="packed was read without a question"):
        invoke("run", "--cache", "packed", "--question-aware")


def test_text_comes_from_the_standard_input(model: str, context: str, tmp_path: Path) -> None:
    piped = invoke("run", "-", "-q", "w1", "-m", model, "--device", "cpu", "--json", input=CONTEXT)
    named = invoke("run", context, "-q", "w1", "-m", model, "--device", "cpu", "--json")
    assert answers(piped) == answers(named)
    with pytest.raises(InvalidInputError, match="--output"):
        invoke("pack", "-", "-m", model, input=CONTEXT)


def test_a_model_is_calibrated_and_its_profile_shown(model: str, tmp_path: Path) -> None:
    for seed in (0, 1):
        (tmp_path / f"{seed}.txt").write_text(text(700, seed=seed), encoding="utf-8")
    output, texts = str(tmp_path / "profile"), [str(tmp_path / f"{seed}.txt") for seed in (0, 1)]
    options = ["--text", texts[0], "--text", texts[1], "--tokens", "1200", "--device", "cpu", "-o", output]
    found = json.loads(invoke("calibrate", model, *options, "--json").stdout)
    assert found["file_bytes"] == Path(output).stat().st_size
    assert (found["layers"], found["tokens"], found["model"]) == (3, 2 * (601 - 4), Path(model).name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ModelProfile.load(output).check(tiny_model("llama").config)
    shown = json.loads(invoke("inspect", output, "--json").stdout)
    assert shown["text"] == ", ".join(texts) and len(shown["layers"]) == 3
    words = " ".join(invoke("inspect", output).stdout.split())
    assert "num_hidden_layers 3" in words and "1,194 tokens" in words


def test_a_model_is_fitted_and_the_plan_is_used(model: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(text(900), encoding="utf-8")
    files = [str(tmp_path / name) for name in ("plan.json", "wide.json", "text")]
    options = ["--text", files[2], "--pieces", "2", "--piece-tokens", "300", "--device", "cpu", "--json"]
    size = ["--context", "4096", "--press", "TurboQuant(recent_tokens=16)"]
    found = json.loads(invoke("fit", model, "-b", "3.6", "-o", files[0], *size, *options).stdout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "text"]
    assert (
        found["use"] == f"TurboQuant(recent_tokens=16, plan={files[0]!r})"
        and found["model"] == Path(model).name
    )
    assert 3 < found["bits"] <= 3.6 and {bits for pair in found["widths"].values() for bits in pair} <= {
        2,
        3,
        4,
    }
    planned = json.loads(invoke("memory", model, "-c", "4096", "-p", found["use"], "--json").stdout)
    assert planned["presses"][1]["cache"]["bits_per_value"] == pytest.approx(found["bits"])
    again = ["--from", files[0], "-b", "3.5", "-c", "4096", "--widths", "2,3,4,8", "-o", files[1]]
    shown = invoke("fit", model, *again).stdout
    assert f"TurboQuant(recent_tokens=16, plan={files[1]!r})" in " ".join(shown.split())
    assert json.loads(invoke("inspect", files[1], "--json").stdout)["bits"] <= 3.5
    assert invoke("inspect", files[1]).stdout == shown
    one_pass = ["--method", "one-pass", "--by", "head", "-o", files[0], "-b", "3.6"]
    found = json.loads(invoke("fit", model, *one_pass, *options).stdout)
    assert any(isinstance(bits, list) for pair in found["widths"].values() for bits in pair)
    words = invoke("inspect", files[0]).stdout
    assert "keys 1" in words and "values 0" in words
    assert found["method"] == "one-pass" and "method layer-by-layer" in " ".join(shown.split())


def test_a_model_spread_over_all_devices_answers_the_same(
    model: str, context: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one device, as here, all of it is there; tests with two GPUs spread one by hand."""
    options = ["run", context, "-q", "w1", "-m", model, "--json"]
    expected, devices = answers(invoke(*options)), []
    make: Any = loading.transformers.pipeline

    def noted(*args: Any, **kwargs: Any) -> Any:
        devices.append((kwargs.get("device"), kwargs.get("device_map")))
        return make(*args, **kwargs)

    monkeypatch.setattr(loading.transformers, "pipeline", noted)
    assert answers(invoke(*options, "--device", "auto")) == expected
    assert devices == [(None, "auto")]
    assert load_pipeline(model, "auto").device == load_pipeline(model).device


def test_people_get_answers_and_a_table(model: str, context: str) -> None:
    shown = invoke("run", context, "-q", "w1 w2", "-m", model, "--device", "cpu").stdout
    assert shown.startswith("w1 w2\n") and "resident" in shown and "bits per value" in shown
    packed = " ".join(
        invoke("pack", context, "-m", model, "--device", "cpu").stdout.split()
    )  # lines are wrapped
    assert "contains the text" in packed and Path(f"{context}.kv.safetensors").exists()


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("run TEXT -m no-such/model", "no-such/model.* cannot be loaded"),
        ("memory MODEL --gpu lots", "80GB"),
        ("memory MODEL -p SimLayerKV", "depends on the text"),
    ],
)
def test_what_cannot_be_done_is_one_clear_error(command: str, reason: str, model: str, context: str) -> None:
    words = [{"TEXT": context, "MODEL": model}.get(word, word) for word in command.split()]
    with pytest.raises(InvalidInputError, match=reason):
        CliRunner().invoke(cli.app, words, catch_exceptions=False)


@pytest.mark.parametrize(
    ("places", "named"),
    [
        (["cuda:0", "cuda:0"], "H100"),
        (["cuda:0", "cuda:1", "meta"], "2 x H100"),
        (["cuda:1", "cpu", "cuda:2"], "H100 + A100"),
        (["cpu", "meta"], "cpu"),
    ],
)
def test_devices_of_a_model_count_once(
    places: list[str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = [SimpleNamespace(device=torch.device(place), is_meta=place == "meta") for place in places]
    on = torch.device("cuda" if "cuda" in places[0] else "cpu")  # transformers leaves the number out
    pipe: Any = SimpleNamespace(device=on, model=SimpleNamespace(parameters=lambda: weights))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda one: "A100" if one.index == 2 else "H100")
    assert device_names(pipe) == named
    assert devices_of(pipe) == [torch.device(one) for one in dict.fromkeys(places) if one != "meta"]
