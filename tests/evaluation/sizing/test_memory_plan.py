"""What is planned is what is measured once the context is read."""

import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from quantpress.cache import cache_memory
from quantpress.errors import InvalidInputError, UnsupportedModelError
from quantpress.evaluation.sizing.kept_tokens import described
from quantpress.evaluation.sizing.memory_plan import Planner
from quantpress.evaluation.sizing.model_outline import EXAMPLE_SHAPE, ModelOutline, outline
from quantpress.pipelines.reading.read_context import read_context
from quantpress.presses.expression import parse_press
from tests.tiny_models import prompt, tiny_model

TOKENS = 700
EXACT = (
    "none",
    "TurboQuant",
    "TurboQuant(bits=2.5, layer_bits={0: 16})",
    "TurboQuant(bits=3, detect_sinks=4)",
    "Knorm(0.3)",
    "SnapKV(0.5, window_size=16) | TurboQuant(key_bits=4, value_bits=2)",
    "StreamingLLM(0.4, n_sink=8) | TurboQuant",
    "Knorm(0.3) | StreamingLLM(0.3) | TurboQuant(bits=3)",
    "ThinK(0.5) | TurboQuant",
)


def measured(model: PreTrainedModel, press: str) -> int:
    cache = DynamicCache()
    with torch.no_grad():
        read_context(model, prompt(TOKENS), cache, parse_press(press))
    return cache_memory(cache).total_bytes


@pytest.fixture(scope="module")
def half() -> dict[str, PreTrainedModel]:
    """Tiny models in bfloat16."""
    models = {}
    for family in ("llama", "gemma3"):
        made = tiny_model(family)
        models[family] = type(made)(made.config).to(torch.bfloat16).eval()
    return models


@pytest.mark.parametrize("press", EXACT)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_plan_is_the_measurement(family: str, press: str, half: dict[str, PreTrainedModel]) -> None:
    model = half[family]
    plan = Planner(ModelOutline.of(family, model), parse_press(press)).plan(TOKENS)
    alone = press == "Knorm(0.3)" and family == "gemma3"  # kvpress itself decides about its sliding layers
    assert plan.exact != alone
    assert plan.cache.total_bytes == pytest.approx(measured(model, press), rel=0.3 if alone else 0)
    assert plan.whole_bytes == measured(model, "none")


def test_the_plan_of_a_float32_model_is_the_measurement_too() -> None:
    model = tiny_model("gemma3")
    assert model.dtype == torch.float32
    for press in ("none", "SnapKV(0.5, window_size=16) | TurboQuant(key_bits=4, value_bits=2)"):
        plan = Planner(ModelOutline.of("it", model), parse_press(press)).plan(TOKENS)
        assert plan.cache.total_bytes == measured(model, press)
        assert plan.whole_bytes == measured(model, "none")
    assert Planner(ModelOutline.of("it", model), None).plan(TOKENS).ratio == 1


def test_what_depends_on_the_text_is_about_right_or_refused(half: dict[str, PreTrainedModel]) -> None:
    model = half["llama"]
    for press in ("AdaKV(SnapKV(0.5, window_size=16)) | TurboQuant", "AdaKV(SnapKV(0.5, window_size=16))"):
        plan = Planner(ModelOutline.of("it", model), parse_press(press)).plan(TOKENS)
        assert not plan.exact
        assert plan.cache.total_bytes == pytest.approx(measured(model, press), rel=0.3)
    with pytest.raises(InvalidInputError, match=r"SimLayerKV.* depends on the text"):
        Planner(ModelOutline.of("it", model), parse_press("SimLayerKV")).plan(TOKENS)
    with pytest.raises(InvalidInputError, match="two widths"):
        Planner(ModelOutline.of("it", model), parse_press("Demote(Knorm()) | TurboQuant")).plan(TOKENS)


def test_decode_time_presses_keep_the_context(half: dict[str, PreTrainedModel]) -> None:
    known = ModelOutline.of("it", half["llama"])
    whole = Planner(known, None).plan(TOKENS).cache
    assert Planner(known, parse_press("Decoding(Knorm())")).plan(TOKENS).cache == whole
    halved = Planner(known, parse_press("PrefillDecoding(Knorm(0.5), Decoding(Knorm()))")).plan(TOKENS).cache
    assert halved == Planner(known, parse_press("Knorm(0.5)")).plan(TOKENS).cache


@pytest.mark.parametrize("press", [None, "TurboQuant(bits=3)", "SnapKV(0.5) | TurboQuant"])
def test_what_fits_fits_and_one_more_does_not(press: str | None) -> None:
    planner = Planner(outline(EXAMPLE_SHAPE), None if press is None else parse_press(press))
    capacity, context, batch = 80 * 10**9, 32768, 2
    found = planner.capacity(capacity, context, batch)
    totals = [planner.plan(found.context + more, batch).total_bytes for more in (0, 1)]
    assert totals[0] <= capacity < totals[1]
    totals = [planner.plan(context, found.batch + more).total_bytes for more in (0, 1)]
    assert totals[0] <= capacity < totals[1]
    assert planner.capacity(10**9, context, batch) == type(found)(0, 0)  # the weights alone are more


def test_room_needs_the_weights() -> None:
    with pytest.raises(InvalidInputError, match="intermediate and vocab"):
        Planner(outline("layers=2,kv_heads=2,head_dim=64"), None).capacity(10**9, 100, 1)


@pytest.mark.parametrize("counts", [{"context": 0}, {"context": 5, "batch": 0}], ids=str)
def test_counts_out_of_range_are_refused(counts: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError, match="give 1 or more"):
        Planner(outline("layers=2,kv_heads=2,head_dim=64"), None).plan(**counts)


def test_a_model_that_cannot_be_packed_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="sliding window"):
        Planner(ModelOutline.of("it", tiny_model("mistral_sliding")), parse_press("TurboQuant"))


@pytest.mark.parametrize(
    ("press", "tokens"),  # read whole; layers in chunks; attention in chunks too
    [
        ("TurboQuant", 1500),
        ("TurboQuant", 5000),
        ("ExpectedAttention(0.5)", 5000),
        ("ExpectedAttention(0.5)", 11000),
    ],
)
def test_the_work_space_is_near_what_the_profiler_sees(press: str, tokens: int, tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "head_dim": 32}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=2, num_key_value_heads=4, **shape)
    model, cache = LlamaForCausalLM(config).to(torch.bfloat16).eval(), DynamicCache()
    ids = torch.randint(64, (1, tokens))
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        read_context(model, ids, cache, parse_press(press), progress=False)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    changes = sorted((one["ts"], one["args"]["Bytes"]) for one in events if one.get("name") == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    planned = Planner(ModelOutline.of("it", model), parse_press(press)).plan(tokens)
    seen = peak - cache_memory(cache).total_bytes
    assert planned.activation_bytes is not None
    assert 0.9 * seen < planned.activation_bytes < 1.35 * seen


def test_presses_are_described_as_they_are_written() -> None:
    for text in ("TurboQuant(3)", "SnapKV(0.5) | TurboQuant(4, sink_tokens=8)", "AdaKV(SnapKV(0.5))"):
        assert described(parse_press(text)) == text
        assert described(parse_press(described(parse_press(text)))) == text
    assert described(None) == "uncompressed"
