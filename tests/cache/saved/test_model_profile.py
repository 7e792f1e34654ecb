"""Model profiles: what was saved comes back, wrong files and other models are refused with the reason."""

import copy
import json
import os
import random
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Gemma3TextConfig, LlamaConfig, PreTrainedConfig, Qwen3Config

from quantpress.cache.saved.config_fingerprint import config_fingerprint
from quantpress.cache.saved.format import read_file, write_file
from quantpress.cache.saved.model_profile import MODEL_PROFILE, ModelProfile
from quantpress.errors import CacheFileError, InvalidInputError, NonFiniteError
from quantpress.quantization.query_moments import QueryMoments
from quantpress.quantization.transform import ChannelTransform

SHAPES = {1: (2, 32), 3: (8, 64)}


def profile(config: PreTrainedConfig | None = None, **changes: Any) -> ModelProfile:
    statistics = {
        index: ChannelTransform(torch.randn(1, *shape), torch.rand(1, *shape) + 0.1)
        for index, shape in SHAPES.items()
    }
    queries = {
        3: QueryMoments(torch.randn(8, 4, 64).bfloat16().float(), torch.rand(8, 4, 64).bfloat16().float())
    }
    fingerprint = config_fingerprint(config or LlamaConfig())
    about = {"model": "m", "text": "a novel", "tokens": 4088, "piece_tokens": 2048}
    return ModelProfile(
        **{"fingerprint": fingerprint, "statistics": statistics, "queries": queries, **about, **changes}
    )


def same(one: ModelProfile, other: ModelProfile) -> bool:
    pairs = [(one.statistics[index], other.statistics[index]) for index in one.statistics]
    parts = [(a.tensors()[name], b.tensors()[name]) for a, b in pairs for name in ("mean", "weight")]
    for index, moments in one.queries.items():
        parts += zip(vars(moments).values(), vars(other.queries[index]).values(), strict=True)
    layers = (one.statistics.keys(), one.queries.keys()), (other.statistics.keys(), other.queries.keys())
    return layers[0] == layers[1] and all(torch.equal(a, b) for a, b in parts)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    profile().save(path)
    return path


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path, made = tmp_path / "a.safetensors", profile()
    size = made.save(path)
    found = ModelProfile.load(path)
    assert size == path.stat().st_size and same(made, found)
    about = ("fingerprint", "model", "text", "tokens", "piece_tokens")
    assert all(getattr(found, name) == getattr(made, name) for name in about)
    assert found.written_by is not None
    assert os.name != "posix" or stat.S_IMODE(path.stat().st_mode) == 0o644  # a server may be another user
    path.write_bytes(bytes(size))  # what was loaded does not depend on the file
    assert same(made, found)


def test_an_empty_part_is_allowed(tmp_path: Path) -> None:
    profile(statistics={}, queries={}).save(tmp_path / "a")
    found = ModelProfile.load(tmp_path / "a")
    with pytest.raises(InvalidInputError, match=r"no statistics of layer 3 \(it has: none\).*calibrate"):
        found.transform(3)


def test_a_rank_gets_its_heads() -> None:
    made = profile()
    whole = made.transform(3)
    for rank in range(4):
        own = made.transform(3, slice(2 * rank, 2 * rank + 2))
        for name, part in own.tensors().items():
            assert part.shape == (1, 2, 64) and part.is_contiguous()
            assert torch.equal(part, whole.tensors()[name][:, 2 * rank : 2 * rank + 2])
        queries = made.query_moments(3, slice(2 * rank, 2 * rank + 2))
        assert queries is not None and torch.equal(
            queries.mean, made.queries[3].mean[2 * rank : 2 * rank + 2]
        )
    part = made.query_moments(3, slice(1, 2), slice(2, 4))  # a KV head that two ranks hold
    assert part is not None and torch.equal(part.variance, made.queries[3].variance[1:2, 2:4])
    assert made.query_moments(1) is None
    with pytest.raises(InvalidInputError, match="none of the 8 KV heads"):
        made.transform(3, slice(8, 10))
    with pytest.raises(InvalidInputError, match=r"layer 2 \(it has: 1, 3\)"):
        made.transform(2)


@pytest.mark.parametrize(
    ("part", "error", "reason"),
    [
        ({"weight": torch.zeros(1, 2, 4)}, InvalidInputError, "not positive"),
        ({"weight": -torch.ones(1, 2, 4)}, InvalidInputError, "not positive"),
        ({"weight": None}, InvalidInputError, "not mean and weight"),
        ({"mean": torch.full((1, 2, 4), float("nan"))}, NonFiniteError, "mean of layer 0"),
        ({"weight": torch.full((1, 2, 4), float("inf"))}, NonFiniteError, "weight of layer 0"),
        ({"mean": torch.ones(1, 2, 4).half()}, InvalidInputError, "not float32"),
        ({"order": torch.zeros(1, 2, 4, dtype=torch.int16)}, InvalidInputError, "not mean and weight"),
    ],
)
def test_wrong_parts_are_refused_and_a_file_with_them_too(
    tmp_path: Path, part: dict[str, Any], error: type[Exception], reason: str
) -> None:
    ones = {"mean": torch.ones(1, 2, 4), "weight": torch.ones(1, 2, 4)}
    wrong = ChannelTransform(**{**ones, **part})
    with pytest.raises(error, match=reason):
        profile(statistics={0: wrong}, queries={})
    path, made = tmp_path / "a", profile()
    about = {name: getattr(made, name) for name in ("fingerprint", "model", "text", "tokens", "piece_tokens")}
    held = {f"layer.0.{name}": tensor[0] for name, tensor in wrong.tensors().items()}
    write_file(path, about, held, MODEL_PROFILE)
    with pytest.raises(CacheFileError, match=rf"{path.name} is no usable model profile.*calibrate MODEL"):
        ModelProfile.load(path)


def test_wrong_moments_of_queries_are_refused(tmp_path: Path) -> None:
    def refused(moments: QueryMoments, reason: str, error: type[Exception] = InvalidInputError) -> None:
        with pytest.raises(error, match=reason):
            profile(queries={3: moments})

    ones = torch.ones(8, 4, 64)
    refused(QueryMoments(ones[:4], ones[:4]), r"are \(4, 4, 64\), not \[Hkv, G, D\]")
    refused(QueryMoments(ones, -ones), "is negative")
    refused(QueryMoments(ones * torch.inf, ones), "NaN or infinity", NonFiniteError)
    made = profile()
    about = {name: getattr(made, name) for name in ("fingerprint", "model", "text", "tokens", "piece_tokens")}
    held = {"layer.3.mean": ones[:, 0], "layer.3.weight": ones[:, 0], "layer.3.query_mean": ones}
    write_file(tmp_path / "a", about, held, MODEL_PROFILE)
    with pytest.raises(CacheFileError, match="layer 3 has only the mean of its queries"):
        ModelProfile.load(tmp_path / "a")


@pytest.mark.parametrize(
    "change", [{"tokens": "4"}, {"fingerprint": None}, {"model": 1}, {"text": None}, {"piece_tokens": 0.5}]
)
def test_a_wrong_description_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    profile(**change).save(tmp_path / "a")
    with pytest.raises(CacheFileError, match=f"its {next(iter(change))} is"):
        ModelProfile.load(tmp_path / "a")


def test_files_with_other_tensors_are_refused(file: Path) -> None:
    about, tensors = read_file(file, kind=MODEL_PROFILE)
    known = {name: about[name] for name in ("fingerprint", "model", "text", "tokens", "piece_tokens")}
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    for name in ("layer.x.mean", "layer.0.order", "weights", "layer..mean"):
        write_file(file, known, {**copies, name: torch.ones(2, 4)}, MODEL_PROFILE)
        with pytest.raises(CacheFileError, match="holds"):
            ModelProfile.load(file)


def test_foreign_files_are_told_apart(tmp_path: Path, file: Path) -> None:
    other = tmp_path / "other"
    with pytest.raises(CacheFileError, match="not a file; give one that `quantpress calibrate` wrote"):
        ModelProfile.load(other)
    save_file({"layer.0.mean": torch.zeros(2, 4)}, other)
    with pytest.raises(CacheFileError, match="no model profile"):
        ModelProfile.load(other)
    write_file(other, {}, {"x": torch.zeros(2)})  # a saved cache
    with pytest.raises(CacheFileError, match="no model profile"):
        ModelProfile.load(other)
    with pytest.raises(CacheFileError, match="no saved cache"):
        read_file(file)
    with safe_open(file, framework="pt") as source:
        assert json.loads(source.metadata()["quantpress_profile"])["model"] == "m"


def test_damaged_files_are_refused(file: Path) -> None:
    whole, expected = file.read_bytes(), ModelProfile.load(file)
    refused = 0
    for _ in range(300):
        at = random.randrange(len(whole))
        kind = random.choice(("flip", "cut", "zeros"))
        changed = bytearray(whole)
        if kind == "flip":
            changed[at] ^= 1 << random.randrange(8)
        else:
            changed[at:] = b"" if kind == "cut" else bytes(len(whole) - at)
        file.write_bytes(changed)
        try:
            assert same(ModelProfile.load(file), expected)
        except CacheFileError as error:
            assert "quantpress calibrate MODEL" in str(error) or "no model profile" in str(error)
            refused += 1
    assert refused > 250


# Which models it is for


def test_the_same_model_is_accepted_and_another_shape_is_not(file: Path) -> None:
    found = ModelProfile.load(file)
    found.check(LlamaConfig(dtype="float16", vocab_size=7, max_position_embeddings=7))
    for changes, field in (
        ({"num_key_value_heads": 8}, "num_key_value_heads was 32, is 8"),
        ({"num_hidden_layers": 3}, "num_hidden_layers was 32, is 3"),
        ({"head_dim": 64}, "head_dim was 128, is 64"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope was .*500000"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope was .*'linear'",
        ),
    ):
        with pytest.raises(CacheFileError, match=f"{field}.*run `quantpress calibrate MODEL` again"):
            found.check(LlamaConfig(**changes))
    with pytest.raises(CacheFileError, match="model_type was 'llama', is 'qwen3'"):
        found.check(Qwen3Config())


def test_the_fingerprint_ignores_what_hosts_add() -> None:
    """vLLM and other versions of transformers put defaults into rotary parameters, and rename "type"."""
    for config in (LlamaConfig(), Gemma3TextConfig(layer_types=["sliding_attention"] * 26)):
        expected = config_fingerprint(config)
        changed = copy.deepcopy(config)
        nested = [one for one in changed.rope_parameters.values() if isinstance(one, dict)]
        for one in nested or [changed.rope_parameters]:
            one["type"] = one.pop("rope_type")
            one |= {"partial_rotary_factor": 1.0, "original_max_position_embeddings": 8, "factor": None}
        assert config_fingerprint(changed) == expected
        assert json.loads(json.dumps(expected)) == expected
