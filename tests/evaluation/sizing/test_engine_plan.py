"""What fits in vLLM: the sums over layers, what is left for blocks, and which models are refused."""

import pytest

from quantpress.cache import WidthPlan
from quantpress.errors import CacheFileError, InvalidInputError, UnsupportedModelError
from quantpress.evaluation.sizing.engine_plan import EngineAsked, engine_plans
from quantpress.evaluation.sizing.model_outline import EXAMPLE_SHAPE, ModelOutline, outline
from tests.tiny_models import tiny_model

DTYPES = ("quantpress_4bit", "quantpress_k4v2")


def test_sums_of_an_eight_billion_model() -> None:
    asked = EngineAsked(context=1000, batch=3, requests=16, available=40 * 10**9)
    own, four, pair = engine_plans(outline("llama-3.1-8b"), DTYPES, asked)
    assert [plan.token_bytes for plan in (own, four, pair)] == [32 * 8 * size for size in (512, 136, 104)]
    assert four.pages_bytes == 3 * 8 * 128 * 32 * 8 * 136  # 1000 tokens take 8 blocks
    assert own.fixed_bytes == 0 and own.total_bytes == own.pages_bytes
    token = 32 * 8 * 256 * 2
    assert four.recent_bytes == 17 * 256 * token and four.request_bytes == 256 * token
    assert four.sink_bytes == 1025 * 4 * token
    assert four.statistics_bytes == 32 * (8 + 32) * 128 * 8  # of keys and queries
    weights = outline("llama-3.1-8b").weights_bytes or 0
    for plan in (own, four, pair):
        left = 40 * 10**9 - weights - plan.fixed_bytes
        blocks = (plan.tokens or 0) // 128
        assert blocks * plan.block_bytes <= left < (blocks + 1) * plan.block_bytes


def test_without_memory_or_weights() -> None:
    shape = outline("layers=2,kv_heads=2,head_dim=64")
    assert engine_plans(shape, (), EngineAsked(128, 1))[0].tokens is None
    with pytest.raises(InvalidInputError, match="--weights"):
        engine_plans(shape, DTYPES, EngineAsked(128, 1, available=10**9))
    full = engine_plans(outline(EXAMPLE_SHAPE), DTYPES, EngineAsked(128, 1, available=10**9))
    assert [plan.tokens for plan in full] == [0, 0, 0]


def test_layers_with_the_widths_of_a_plan() -> None:
    shape, asked = outline("layers=2,kv_heads=2,head_dim=64"), EngineAsked(128, 1)
    found = engine_plans(shape, DTYPES[:1], asked, WidthPlan("tiny", {}, {0: (4, 4), 1: (3, 2)}))
    assert [plan.dtype for plan in found[1:]] == ["quantpress_4bit", "plan"]
    assert [plan.token_bytes for plan in found[1:]] == [2 * 2 * 70, 2 * (70 + 46)]
    for given, message in (({0: (4, 4)}, "no widths of layer 1"), ({0: (2, 8), 1: (2, 2)}, "--widths 2,3,4")):
        with pytest.raises(InvalidInputError, match=message):
            engine_plans(shape, DTYPES, asked, WidthPlan("tiny", {}, given))
    with pytest.raises(CacheFileError, match="num_hidden_layers was 3, is 2"):
        engine_plans(shape, DTYPES, asked, WidthPlan("other", {"num_hidden_layers": 3}, {0: (4, 4)}))


def test_blocks_of_other_head_dims() -> None:
    """An engine counts whole bytes a token: 64 bytes of a page are empty at 80, none at 96."""
    for dim, bytes_a_token in ((80, 87), (96, 103), (192, 202)):
        shape = outline(f"layers=2,kv_heads=2,head_dim={dim}")
        (_, four) = engine_plans(shape, DTYPES[:1], EngineAsked(128, 1))
        assert four.block_bytes == 2 * 2 * 128 * bytes_a_token


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("gemma-3-4b", "sliding windows"),
        (
            "layers=2,kv_heads=2,head_dim=72",
            "head_dim is 72, and the kernels have multiples of 16 from 48 to 256",
        ),
        ("deepseek_v3", "latents"),
        ("bloom", "no attention with a cache|keep something else"),
    ],
)
def test_models_that_the_plugin_refuses(model: str, reason: str) -> None:
    tiny = ModelOutline.of(model, tiny_model(model, "eager")) if "_v3" in model or model == "bloom" else None
    with pytest.raises(UnsupportedModelError, match=reason):
        engine_plans(tiny or outline(model), DTYPES, EngineAsked(128, 1))
