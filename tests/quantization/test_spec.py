"""CodecSpec: what is stored, what is refused, and that it survives JSON."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpress.errors import InvalidInputError, UnsupportedBitsError, UnsupportedHeadDimError
from quantpress.quantization.budget import ChannelGroup
from quantpress.quantization.spec import CodecSpec


def spec(**changes: Any) -> CodecSpec:
    return CodecSpec(**({"head_dim": 128, "bits": 4, "role": "key"} | changes))


@pytest.mark.parametrize(
    ("changes", "bits_per_value"),
    [
        ({"bits": 1}, 1.125),
        ({"bits": 2}, 2.125),
        ({"bits": 3}, 3.125),
        ({"bits": 4}, 4.125),
        ({"bits": 8}, 8.125),
        ({"bits": 4, "head_dim": 64}, 4.25),
        ({"bits": 4, "head_dim": 80}, 4.2),
        ({"bits": 2.5}, 2.75),
        ({"bits": 2.25}, 2.5),
        ({"bits": 3.5, "head_dim": 64}, 4.0),
        ({"bits": 4, "scale_dtype": "float32"}, 4.25),
        ({"bits": 4, "scale_dtype": "bfloat16"}, 4.125),
        ({"bits": 4, "estimator": "prod"}, 4.25),
        ({"bits": 2, "estimator": "prod", "head_dim": 64, "scale_dtype": "float32"}, 3.0),
    ],
    ids=str,
)
def test_true_bits_count_codes_scales_and_sketch(changes: dict[str, Any], bits_per_value: float) -> None:
    assert spec(**changes).bits_per_value == pytest.approx(bits_per_value, abs=1e-12)


def test_the_product_estimator_takes_its_sign_bit_from_the_code() -> None:
    assert spec(bits=3, estimator="prod").groups == (ChannelGroup(128, 2),)
    assert spec(bits=3).groups == (ChannelGroup(128, 3),)
    assert spec(bits=2.5).groups == (ChannelGroup(64, 3), ChannelGroup(64, 2))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"role": "key"}, "norm_corrected"),
        ({"role": "value"}, "unbiased"),
        ({"role": "value", "scale": "norm"}, "norm"),
        ({"role": "key", "scale": "unbiased"}, "unbiased"),
        ({"role": "key", "estimator": "prod"}, "norm"),
    ],
    ids=str,
)
def test_auto_scale_follows_role_and_estimator(changes: dict[str, Any], rule: str) -> None:
    assert spec(**changes).scale_rule == rule


def test_roles_groups_and_seeds_rotate_differently() -> None:
    matrices = [
        spec(bits=2.5, role=role, seed=seed).rotation_of(group).matrix()
        for seed in (0, 1, 2)
        for role in ("key", "value")
        for group in (0, 1)
    ]
    for i, first in enumerate(matrices):
        for second in matrices[i + 1 :]:
            assert not torch.equal(first, second)


def test_rotations_and_codebooks_fit_their_group() -> None:
    split = spec(bits=2.25)
    assert [split.rotation_of(i).dim for i in (0, 1)] == [32, 96]
    assert [(split.codebook_of(i).bits, split.codebook_of(i).head_dim) for i in (0, 1)] == [(3, 32), (2, 96)]
    assert spec(rotation="haar").rotation_of(0).kind == "haar"


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_the_codebook_has_the_form_that_was_asked_for(bits: int) -> None:
    assert spec(bits=bits).codebook_of(0).form == "int8"
    assert spec(bits=bits, codebook="lloyd_max").codebook_of(0).form == "lloyd_max"


def test_the_sketch_matrix_is_gaussian_fixed_by_the_seed_and_not_the_rotation() -> None:
    prod = spec(estimator="prod")
    matrix = prod.sketch_matrix()
    assert matrix.shape == (128, 128) and matrix.dtype == torch.float64
    assert matrix.mean().abs() < 5 / 128 and abs(matrix.std().item() - 1) < 0.04
    assert torch.equal(prod.sketch_matrix(dtype=torch.float32), matrix.float())
    assert not torch.equal(matrix, spec(estimator="prod", seed=1).sketch_matrix())
    assert not torch.equal(matrix, spec(estimator="prod", role="value").sketch_matrix())


specs = st.builds(
    CodecSpec,
    head_dim=st.integers(2, 256).map(lambda n: 4 * n),
    bits=st.one_of(st.sampled_from([1, 2, 3, 4, 8]), st.floats(1.01, 3.99)),
    role=st.sampled_from(["key", "value"]),
    rotation=st.sampled_from(["hadamard", "haar", "identity"]),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from(["auto", "norm_corrected", "unbiased", "norm"]),
    codebook=st.sampled_from(["int8", "lloyd_max"]),
    scale_dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
)


@settings(deadline=None)
@given(specs)
def test_a_spec_survives_json(original: CodecSpec) -> None:
    restored = CodecSpec.from_dict(json.loads(json.dumps(original.to_dict())))
    assert restored == original and hash(restored) == hash(original)
    assert restored.bits_per_value == original.bits_per_value
    assert restored.rotation_of(0) == original.rotation_of(0)


def test_defaults_may_be_absent_from_json() -> None:
    assert CodecSpec.from_dict({"head_dim": 64, "bits": 3, "role": "value"}) == CodecSpec(64, 3, "value")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"head_dim": 64, "bits": 4}, r"missing fields \['role'\]"),
        ({"head_dim": 64, "bits": 4, "role": "key", "trellis": 8}, r"unknown fields \['trellis'\]"),
    ],
    ids=["missing", "unknown"],
)
def test_json_of_another_version_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        CodecSpec.from_dict(data)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bits": 5}, UnsupportedBitsError, "bits=5 cannot be stored; allowed are"),
        ({"head_dim": 66}, UnsupportedHeadDimError, "head_dim 66 cannot be packed"),
        ({"role": "query"}, InvalidInputError, "role='query' is unknown; use one of key, value"),
        ({"rotation": "dct"}, InvalidInputError, "rotation='dct' is unknown; use one of hadamard"),
        ({"scale": "max"}, InvalidInputError, "scale='max' is unknown; use one of auto"),
        ({"codebook": "nf4"}, InvalidInputError, "codebook='nf4' is unknown; use one of int8"),
        ({"estimator": "qjl"}, InvalidInputError, "estimator='qjl' is unknown; use one of mse, prod"),
        (
            {"scale_dtype": "float8"},
            InvalidInputError,
            "scale_dtype='float8' is unknown; use one of auto, float16",
        ),
        ({"seed": -1}, InvalidInputError, "0 to 2\\*\\*32 - 1, got -1"),
        ({"seed": 1.5}, InvalidInputError, "got 1.5"),
        ({"estimator": "prod", "bits": 1}, UnsupportedBitsError, "got 1; use one of them or estimator='mse'"),
        ({"estimator": "prod", "bits": 2.5}, UnsupportedBitsError, "got 2.5; use one of them"),
        ({"estimator": "prod", "bits": 8}, UnsupportedBitsError, "got 8; use one of them"),
    ],
    ids=str,
)
def test_wrong_fields_are_named_with_the_remedy(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        spec(**changes)
