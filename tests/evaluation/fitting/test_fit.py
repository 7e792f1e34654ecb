"""Fitting: estimates are divergences, budgets are bytes, and the layer that matters gets the bits."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from quantpress.cache import WidthPlan, cache_memory, host
from quantpress.cache.saved.config_fingerprint import config_fingerprint
from quantpress.errors import EmptyContextError, InvalidInputError, UnsupportedModelError
from quantpress.evaluation.divergence.documents import Document, Pieces, make_documents
from quantpress.evaluation.divergence.probe import DivergenceProbe
from quantpress.evaluation.fitting import fit as fitting
from quantpress.evaluation.fitting.fit import Method, measure
from quantpress.evaluation.fitting.layer_by_layer import layer_by_layer
from quantpress.evaluation.fitting.measured import Measured
from quantpress.evaluation.fitting.one_pass import one_pass
from quantpress.pipelines.reading.read_context import read_context
from quantpress.presses import TurboQuant
from quantpress.quantization.budget import WHOLE_BITS
from tests.pipelines.words import text, word_tokenizer
from tests.tiny_models import HEAD_DIM, tiny_model

WINDOWS = {"recent_tokens": 16, "detect_sinks": 3}
PIECES = Pieces(2, 300, 33)


def document() -> Document:
    """A context of two pages and 33 tokens behind it."""
    return make_documents(word_tokenizer(), text(500), 1, 300, 33)[0]


def measured(model: PreTrainedModel, method: Method = "one-pass", **options: Any) -> Measured:
    """What is measured of a tiny model."""
    given = model, word_tokenizer(), {"w": text(900)}, TurboQuant(**WINDOWS), PIECES
    return measure(*given, method=method, progress=False, **options)


@pytest.fixture(scope="module")
def known() -> Measured:
    """What is measured of the heads of the tiny Llama in one pass."""
    return measured(tiny_model("llama"), by="head")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_estimates_are_divergences_where_errors_are_small(family: str) -> None:
    """At 8 bits the second order is all there is: the estimate is the KL, up to the noise of labels."""
    model, one = tiny_model(family), document()
    found = one_pass(model, one, TurboQuant(**WINDOWS), (8,), samples=48)
    probe = DivergenceProbe(model, [one])
    for index, (keys, values) in found.items():
        others = {other: 16 for other in found if other != index}
        kl = probe.over(TurboQuant(8, layer_bits=others, **WINDOWS))[0].kl
        assert sum(keys[8] + values[8]) == pytest.approx(sum(kl) / len(kl), rel=0.6)


@pytest.mark.parametrize("codebook", ["int8", "trellis"])
def test_layer_by_layer_one_side_alone_has_the_width(codebook: str) -> None:
    """As a plan with 8 bits for everything else, less a plan with 8 bits everywhere."""
    model, one = tiny_model("llama"), document()
    found = layer_by_layer(model, one, TurboQuant(codebook=codebook, **WINDOWS), [0, 1, 2], [3])
    probe = DivergenceProbe(model, [one])

    def kl(widths: dict[int, tuple[int, int]]) -> float:
        plan = WidthPlan(
            "tiny", config_fingerprint(model.config), {0: (8, 8), 1: (8, 8), 2: (8, 8), **widths}
        )
        press = TurboQuant(plan=plan, codebook=codebook, **WINDOWS)  # type: ignore[arg-type]
        tokens = probe.over(press)[0].kl
        return sum(tokens) / len(tokens)

    base = kl({})
    for side, pair in enumerate([(3, 8), (8, 3)]):
        assert found[1][side] == pytest.approx({8: 0.0, 3: kl({1: pair}) - base})


def test_errors_below_the_noise_count_as_none() -> None:
    side = {2: 0.5, 4: -0.25}
    assert fitting._mean([{0: (side, side)}, {0: ({2: 0.3, 4: 0.05}, {2: 0.1, 4: 0.45})}]) == {
        0: (pytest.approx({2: 0.4, 4: 0.0}), pytest.approx({2: 0.3, 4: 0.1}))
    }


@pytest.mark.parametrize("method", ["one-pass", "layer-by-layer"])
def test_the_layer_that_matters_gets_the_bits(method: Method) -> None:
    model = copy.deepcopy(tiny_model("llama"))
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.weight.data *= 1.0 if index == 1 else 1e-3
    found = measured(model, method, widths=WHOLE_BITS)
    sums = {
        index: [sum(by[bits] for by in sides) for bits in (1, 2, 4)] for index, sides in found.errors.items()
    }
    for others in (sums[0], sums[2]):
        assert all(own > 10 * other for own, other in zip(sums[1], others, strict=True))
    plan = found.plan(found.budget(4096).uniform(3, 3) * 8 / found.budget(4096).numbers, 4096)
    assert min(plan.widths[1]) == 4 and plan.mean_bits <= 3 and plan.method == method


@pytest.mark.parametrize("method", ["one-pass", "layer-by-layer"])
def test_the_head_that_matters_gets_the_bits(method: Method) -> None:
    """Queries of head 0 reach the output, in layer 1 alone; its KV head is 0 of 2."""
    model = copy.deepcopy(tiny_model("llama"))
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.weight.data[:, HEAD_DIM * 2 * (index == 1) :] *= 1e-3
    found = measured(model, method, widths=(2, 4), by="head")
    for by_width in found.errors[1]:
        assert isinstance(by_width[2], tuple) and by_width[2][0] > 10 * by_width[2][1]
    sums = {index: sum(map(sum, (keys[2], values[2]))) for index, (keys, values) in found.errors.items()}  # type: ignore[arg-type]
    assert sums[1] > 10 * max(sums[0], sums[2])
    budget = found.budget(4096)
    bytes_of = budget.total({index: (2, 2) if index != 1 else ((4, 2), (4, 2)) for index in range(3)})
    plan = found.plan(8 * bytes_of / budget.numbers + 1e-6, 4096, (2, 4), by="head")
    assert plan.widths == {0: (2, 2), 1: ((4, 2), (4, 2)), 2: (2, 2)}
    by_layer = found.plan(plan.bits, 4096, (2, 4))
    assert not by_layer.by_head and by_layer.errors == plan.errors == found.errors


def test_layer_by_layer_a_head_alone_has_the_width() -> None:
    """As a plan with 8 bits for every other head, less a plan with 8 bits everywhere."""
    model, one = tiny_model("llama"), document()
    heads = {0: 2, 1: 2, 2: 2}
    found = layer_by_layer(model, one, TurboQuant(**WINDOWS), [0, 1, 2], [3], heads=heads)
    probe = DivergenceProbe(model, [one])

    def kl(widths: dict[int, Any]) -> float:
        plan = WidthPlan("", {}, {0: (8, 8), 1: (8, 8), 2: (8, 8), **widths})
        tokens = probe.over(TurboQuant(plan=plan, **WINDOWS))[0].kl  # type: ignore[arg-type]
        return sum(tokens) / len(tokens)

    base = kl({})
    for side, pairs in enumerate([(((3, 8), 8), ((8, 3), 8)), ((8, (3, 8)), (8, (8, 3)))]):
        assert found[1][side][8] == (0.0, 0.0)
        assert found[1][side][3] == pytest.approx([kl({1: pair}) - base for pair in pairs])


@pytest.mark.parametrize("bits, by", [(2.6, "layer"), (3.4, "layer"), (3.4, "head")])
def test_the_budget_is_the_bytes_of_the_cache(bits: float, by: Any, known: Measured) -> None:
    model, context = tiny_model("llama"), 1100
    found, asked = known, bits + 32 * 99 / context  # with tokens in float32 beside the pages
    plan = found.plan(asked, context, WHOLE_BITS, by)
    assert plan.by_head == (by == "head")
    cache = host.empty_cache(model)
    with torch.no_grad():
        ids = torch.randint(10, 200, (1, context))
        read_context(model, ids, cache, TurboQuant(plan=plan, **WINDOWS), progress=False)
    memory = cache_memory(cache)
    assert memory.total_bytes == found.budget(context).total(dict(plan.widths))
    assert plan.bits == pytest.approx(memory.bits_per_value)
    step = 2 * (context - 23) // 128 * 128 * HEAD_DIM // 8  # one bit of the keys or values of a layer
    assert 0 <= int(asked * memory.numbers / 8) - memory.total_bytes < 4 * step


@pytest.mark.parametrize(
    "method, module, work, done, left",
    [
        ("one-pass", fitting.gradients, "one_pass", 1, 1),
        ("layer-by-layer", DivergenceProbe, "kl_over", 13, 13),  # 1 + 3 layers x 2 heads x 2 sides a piece
    ],
)
def test_a_run_that_was_interrupted_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    known: Measured,
    *,
    method: Any,
    module: Any,
    work: str,
    done: int,
    left: int,
) -> None:
    model, calls, real = tiny_model("llama"), [], getattr(module, work)
    partial = tmp_path / "plan.json.partial"
    options: dict[str, Any] = {"method": method, "by": "head", "widths": (2,)}

    def failing(*given: Any, **named: Any) -> Any:
        calls.append(given)
        if len(calls) == done + 1:
            raise KeyboardInterrupt
        return real(*given, **named)

    monkeypatch.setattr(module, work, failing)
    with pytest.raises(KeyboardInterrupt):
        measured(model, partial=partial, **options)
    resumed = measured(model, partial=partial, **options)
    assert len(calls) == done + 1 + left
    assert resumed.errors == (known if method == "one-pass" else measured(model, **options)).errors
    other = {**options, "partial": partial}
    with pytest.raises(InvalidInputError, match="holds results of other settings"):
        measure(model, word_tokenizer(), {"w": text(900, seed=2)}, pieces=PIECES, **other)


def test_a_press_fits_itself(tmp_path: Path) -> None:
    model = tiny_model("llama")
    options: dict[str, Any] = {"texts": {"w": text(900)}, "pieces": PIECES, "context": 4096}
    press = TurboQuant.fit(model, 3.5, tokenizer=word_tokenizer(), press=TurboQuant(3, **WINDOWS), **options)
    plan = press.plan
    assert isinstance(plan, WidthPlan) and plan.bits <= 3.5 and plan.text == "w"
    assert plan.method == "layer-by-layer"
    assert press == TurboQuant(plan=plan, **WINDOWS)  # type: ignore[arg-type]
    assert {bits for pair in plan.widths.values() for bits in pair} <= {2, 3, 4}
    options |= {"method": "one-pass", "by": "head"}
    windows = TurboQuant(3, **WINDOWS)
    heads: Any = TurboQuant.fit(model, 3.6, tokenizer=word_tokenizer(), press=windows, **options)
    assert isinstance(heads.plan.errors[0][0][2], tuple) and heads.plan.bits <= 3.6
    with pytest.raises(InvalidInputError, match="there is no tokenizer of the name ''"):
        TurboQuant.fit(model, 3.5)


def test_what_cannot_be_fitted_says_why(known: Measured) -> None:
    found, model, tokenizer = known, tiny_model("llama"), word_tokenizer()
    with pytest.raises(
        InvalidInputError, match=r"1\.50 bits a value are fewer than .* give [23]\.\d\d or more"
    ):
        found.plan(1.5, 32768)
    with pytest.raises(InvalidInputError, match="by is 'token'; give one of layer, head"):
        measured(model, by="token")
    with pytest.raises(InvalidInputError, match=r"measured by layer, but .* --by head` without --from"):
        replace(found, errors=found.errors_by("layer")).plan(3, by="head")
    with pytest.raises(InvalidInputError, match="bits is 0; give the bits"):
        found.plan(0)
    with pytest.raises(
        InvalidInputError, match="widths are 5; choose from those that were measured, 1, 2, 3, 4, 8, or"
    ):
        found.plan(3, widths=[5])
    with pytest.raises(InvalidInputError, match="widths are 2, 5; choose from 1, 2, 3, 4, 8"):
        measured(model, widths=(2, 5))
    with pytest.raises(InvalidInputError, match="method is 'guess'; give one of layer-by-layer, one-pass"):
        measured(model, "guess")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="layer_bits decides widths, which are to be fitted"):
        measure(model, tokenizer, {"w": text(900)}, TurboQuant(layer_bits={0: 16}), PIECES)
    with pytest.raises(InvalidInputError, match="tokens packs no page; give pieces of at least 260"):
        measure(model, tokenizer, {"w": text(900)}, TurboQuant(), Pieces(1, 200, 33))
    with pytest.raises(EmptyContextError, match="no text"):
        measure(model, tokenizer, {})
    with pytest.raises(UnsupportedModelError, match="cannot be packed"):
        measure(tiny_model("bloom", "eager"), tokenizer, {"w": text(900)}, pieces=PIECES)
