"""A model that processes share by transformers' `tp_plan`: each packs its own heads, and answers stay.

Processes talk by gloo on the CPU, or by NCCL where there is a GPU for each. One start runs all programs.
"""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, Phi3Config, Qwen2Config

from tests.limits import HANG
from tests.pipelines.words import text
from tests.ranks.programs import BY_CHANCE, PACKED, RAGGED, SAVED, Place, load, outcomes, saved
from tests.tiny_models import _COMMON

pytestmark = [pytest.mark.ranks, pytest.mark.multi_gpu]

GPUS = torch.cuda.device_count()
COUNTS = [2, 4]
LOSSLESS, LOSSY = 1e-3, 0.6
"""Largest differences of a logit, where logits are of a size of 10. Processes add up in another order. That
may move single numbers to the next level of their code, and a channel's weight to the next number of
bfloat16, and with them tokens whose logits are this near."""

_HEADS: dict[str, Any] = {**_COMMON, "head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
_OTHERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
CONFIGS = {
    "llama": LlamaConfig(**_HEADS),
    "three heads": LlamaConfig(
        **{**_HEADS, "num_hidden_layers": 1, "num_attention_heads": 6, "num_key_value_heads": 3}
    ),
    "qwen2": Qwen2Config(**{**_COMMON, **_OTHERS}),
    "phi3": Phi3Config(**{**_COMMON, **_OTHERS}),
    "gpt_neox": GPTNeoXConfig(**{**_COMMON, **_OTHERS}),
}


def save_model(folder: Path, name: str) -> None:
    """Save one of the models, with random weights and biases."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
        for bias in (one for where, one in model.named_parameters() if where.endswith(".bias")):
            torch.nn.init.normal_(bias, std=0.1)
    model.save_pretrained(folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, and later everything that processes write."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in CONFIGS:
        save_model(folder, name)
    return linked(folder)


def linked(folder: Path) -> Path:
    """The folder, with a path to import from in which `kernels/` does not lie beside the tests."""
    (folder / "path").mkdir()
    for name in ("tests", "docs"):
        (folder / "path" / name).symlink_to(Path(__file__).parents[2] / name)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """What one process finds; it saves its contexts before the others start."""
    models = {name: load(folder, name).to("cuda:0" if GPUS else "cpu") for name in CONFIGS}
    place = Place(folder, models, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some presses rule out graphs
        return _alone(place)


def _alone(place: Place) -> dict[str, Any]:
    place.pipe().read(text(500), press=PACKED[RAGGED]()).save(place.context_file(RAGGED))
    return outcomes(place)


@pytest.fixture(scope="module")
def by_count(folder: Path, alone: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """What each of several processes finds, by their number; later ones load what was saved before."""
    return {count: _found(folder, count) for count in COUNTS if not GPUS or count <= GPUS}


def started(folder: Path, count: int, program: Path, *arguments: str) -> None:
    """Run a program in several processes."""
    path = os.pathsep.join([str(folder / "path"), *filter(None, [os.environ.get("PYTHONPATH")])])
    torchrun = ["-P", "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    done = subprocess.run(
        [sys.executable, *torchrun, f"--nproc-per-node={count}", str(program), str(folder), *arguments],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    if done.returncode:
        said = {path.name: path.read_text() for path in sorted(folder.glob(f"* of {count}.error"))}
        pytest.fail("\n".join([*map("{0[0]}: {0[1]}".format, said.items()), done.stderr[-3000:]]))


def _found(folder: Path, count: int) -> list[dict[str, Any]]:
    started(folder, count, Path(__file__).with_name("programs.py"), *CONFIGS)
    return [torch.load(folder / f"{index} of {count}.pt", weights_only=False) for index in range(count)]


@pytest.fixture(params=COUNTS)
def several(
    request: pytest.FixtureRequest, by_count: dict[int, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """What each process found; the test is skipped where there are fewer GPUs."""
    if request.param not in by_count:
        pytest.skip(f"{GPUS} GPUs, and {request.param} processes need one each")
    return by_count[request.param]


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """Tokens are equal up to the first whose logits are too near to tell, and so are logits up to there."""
    pairs = zip(found["tokens"], expected["tokens"], strict=True)
    same = next((step for step, (one, other) in enumerate(pairs) if one != other), len(expected["tokens"]))
    assert (found["logits"][: same + 1] - expected["logits"][: same + 1]).abs().max() < tolerance


@pytest.mark.parametrize("name", PACKED)
def test_tokens_are_those_of_one_process(name: str, several: list[Any], alone: dict[str, Any]) -> None:
    expected = alone["packed"][name]
    lossy = "bits" in name or "small" in name
    for one in several:
        found = one["packed"][name]
        assert_same(found, expected, LOSSY if lossy else LOSSLESS)
        assert found["tokens"] == several[0]["packed"][name]["tokens"]
        assert found["heads"] * len(several) == expected["heads"] == 4
    held = sum(one["packed"][name]["bytes"] for one in several)
    assert held == pytest.approx(expected["bytes"], rel=0.02)


@pytest.mark.parametrize("name", ["qwen2", "phi3", "gpt_neox"])
def test_other_plans(name: str, several: list[Any], alone: dict[str, Any]) -> None:
    expected = alone["other_plans"][name]
    for one in several:
        assert_same(one["other_plans"][name], expected, LOSSY)
        assert one["other_plans"][name]["heads"] == (4 if name == "phi3" else 4 // len(several))


def test_every_press_answers_as_in_one_process_or_is_refused(
    several: list[Any], alone: dict[str, Any]
) -> None:
    expected = {name: said for name, said in alone["every_press"].items() if name not in BY_CHANCE}
    for one in several:
        found = one["every_press"]
        assert found == several[0]["every_press"]
        assert {name: found[name] for name in expected} == expected
    assert sum(said == "refused" for said in expected.values()) < len(expected) / 2


def test_questions_samples_and_enable(several: list[Any], alone: dict[str, Any]) -> None:
    """Processes that were seeded differently draw what the first one draws."""
    assert alone["asked"]["left as it was"] and len(set(alone["asked"]["sampled"])) == 2
    for one in several:
        assert one["asked"] == alone["asked"]


def test_contexts_of_any_number_of_processes_load_in_any(
    several: list[Any], by_count: dict[int, list[dict[str, Any]]], alone: dict[str, Any]
) -> None:
    """Answers are those of the processes that saved the context: codes are the same."""
    for one in several:
        assert_loaded(one["saved"], {1, len(several)}, by_count, alone)


def test_one_process_loads_what_several_saved(
    folder: Path, by_count: dict[int, list[dict[str, Any]]], alone: dict[str, Any]
) -> None:
    place = Place(folder, {"llama": load(folder, "llama").to("cuda:0" if GPUS else "cpu")}, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_loaded(saved(place), {1, *by_count}, by_count, alone)


def assert_loaded(
    found: dict[str, str], counts: set[int], by_count: dict[int, list[dict[str, Any]]], alone: dict[str, Any]
) -> None:
    """Contexts of these numbers of processes were loaded, with the answers of those that saved them."""
    wrote = {count: each[0]["saved"] for count, each in by_count.items()} | {1: alone["saved"]}
    assert {f"{name} of {count}" for name in SAVED for count in counts} <= found.keys()
    assert f"{RAGGED} of 1" in found
    for name, said in found.items():
        saved_as, _, count = name.rpartition(" of ")
        if saved_as:
            before = wrote[int(count)]
            assert said == before.get(f"{saved_as}, before", alone["saved"][f"{RAGGED} of 1"]), name


def test_models_of_random_shards(several: list[Any]) -> None:
    for one in several:
        assert one["made"] == several[0]["made"] and one["made"][0]


REFUSED = {
    "heads": r"UnsupportedModelError: .* has 3 KV heads, which \d processes cannot share.*one of 1, 3",
    "heads, evicted": "UnsupportedModelError: LlamaForCausalLM has 3 KV heads",
    "heads, enabled": "UnsupportedModelError: LlamaForCausalLM has 3 KV heads",
    "ragged": "InvalidInputError: heads of this context keep different numbers.*save it in one process",
    "no file": "CacheFileError: .*is not a file",
    "no folder": "CacheFileError: .*cannot be written",
    "context": r"InvalidInputError: context: different in the \d processes",
    "press": r"InvalidInputError: press: different in the \d processes",
    "clock": "InvalidInputError: max_time is 5.0, and the clocks of",
    "clock, enabled": "InvalidInputError: max_time is 5.0, and the clocks of",
    "captured": "" if GPUS else "processes share the model .tp_plan. over gloo",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_every_process(name: str, several: list[Any]) -> None:
    for one in several:
        assert re.match(REFUSED[name], one["refused"][name]), one["refused"][name]
