"""The fidelity report: exact for a lossless codec, and what torch computes by itself for one that loses."""

import json
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from quantpress.codecs.raw import RawPages
from quantpress.errors import InvalidInputError
from quantpress.evaluation.attention_fidelity import attention_fidelity
from quantpress.presses import TurboQuant
from tests.tiny_models import prompt, tiny_model

TOKENS = 400


def lossless(head_dim: int, role: str, layer: int) -> RawPages:
    return RawPages(head_dim, 32)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_lossless_codec_changes_nothing(family: str) -> None:
    report = attention_fidelity(tiny_model(family), prompt(TOKENS), TurboQuant(codec=lossless))
    assert [layer.layer for layer in report.layers] == ([1, 2] if family == "gemma3" else [0, 1, 2])
    for layer in report.layers:
        assert layer.packed_tokens == 256
        assert layer.cosine == pytest.approx(1, abs=1e-5) == layer.worst_cosine
        assert (layer.top1, layer.top5) == (1, 1) and layer.output_error < 1e-5


def test_more_bits_are_nearer_and_figures_are_in_order() -> None:
    reports = [
        attention_fidelity(tiny_model("llama"), prompt(TOKENS), TurboQuant(bits=bits, recent_tokens=0))
        for bits in (1, 2, 4, 8)
    ]
    for name, sign in (("cosine", 1), ("top1", 1), ("top5", 1), ("output_error", -1)):
        figures = [sign * report.mean(name) for report in reports]
        assert figures == sorted(figures), (name, figures)
    for report in reports:
        for layer in report.layers:
            assert layer.worst_cosine <= layer.cosine and layer.top1 <= layer.top5
    assert reports[-1].mean("cosine") > 0.9999 and reports[0].mean("output_error") > 0.05


@torch.no_grad()
def test_the_figures_are_those_of_the_models_own_attention() -> None:
    """Exact weights and outputs from the eager model itself; those over packed keys by hand."""
    model, queries, ids = tiny_model("llama", "eager"), 5, prompt(TOKENS)
    press = TurboQuant(bits=2)
    report = attention_fidelity(model, ids, press, queries)
    first = report.layers[0]
    packed, exact = DynamicCache(), DynamicCache()
    captured: list[torch.Tensor] = []
    with torch.no_grad():
        hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
            lambda module, inputs: captured.append(inputs[0])
        )
        try:
            weights = model(ids, past_key_values=exact, output_attentions=True).attentions[0]
        finally:
            hook.remove()
        with press(model):
            model(ids, past_key_values=packed)
        keys, values = (states.clone() + 0 for states in (packed.layers[0].keys, packed.layers[0].values))
    best = weights[:, :, -queries:].argmax(-1)
    attention = model.model.layers[0].self_attn
    hidden = model.model.embed_tokens(ids)
    normed = model.model.layers[0].input_layernorm(hidden)
    cos, sin = model.model.rotary_emb(normed, torch.arange(TOKENS)[None])
    query = attention.q_proj(normed).view(1, TOKENS, 4, 32).transpose(1, 2)
    half = torch.cat([-query[..., 16:], query[..., :16]], dim=-1)
    query = (query * cos + half * sin)[:, :, -queries:]
    scores = query @ keys.repeat_interleave(2, dim=1).mT * attention.scaling
    hidden_tokens = torch.ones(queries, TOKENS, dtype=torch.bool).triu(TOKENS - queries + 1)
    near = scores.masked_fill(hidden_tokens, -torch.inf).softmax(-1)
    assert first.top1 == pytest.approx(float((near.argmax(-1) == best).double().mean()))
    among = (near.topk(5, dim=-1).indices == best.unsqueeze(-1)).any(-1)
    assert first.top5 == pytest.approx(float(among.double().mean()))
    out = (near @ values.repeat_interleave(2, dim=1)).transpose(1, 2)
    expected = captured[0][:, -queries:].view(1, queries, 4, 32)
    error = ((out - expected).norm(dim=-1) / expected.norm(dim=-1)).mean()
    assert first.output_error == pytest.approx(float(error), rel=1e-3)


def test_the_report_is_json_and_a_table() -> None:
    report = attention_fidelity(tiny_model("llama"), prompt(300), TurboQuant(bits=3), queries=3)
    found: Any = json.loads(json.dumps(report.as_dict()))
    assert found["tokens"] == 300 and len(found["layers"]) == 3
    assert found["mean"]["cosine"] == pytest.approx(sum(one["cosine"] for one in found["layers"]) / 3)
    assert len(report.__rich__().rows) == 3


def test_layers_that_are_not_packed_are_left_out() -> None:
    report = attention_fidelity(tiny_model("llama"), prompt(300), TurboQuant(layer_bits={1: 16}))
    assert [layer.layer for layer in report.layers] == [0, 2]


@pytest.mark.parametrize(
    ("tokens", "options", "reason"),
    [
        (100, {}, "none of the 100 tokens was packed.*at least 260"),
        (300, {"queries": 0}, "queries is 0"),
        (300, {"queries": 301}, "1 to 300"),
        (300, {"press": TurboQuant(detect_sinks=3)}, "detect_sinks=0"),
        (
            300,
            {"press": "SnapKV(0.5) | TurboQuant"},
            r"press is Compose\(SnapKV.*give a TurboQuant",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_refused(tokens: int, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidInputError, match=reason):
        attention_fidelity(tiny_model("llama"), prompt(tokens), **options)


def test_a_press_may_be_a_class_or_text() -> None:
    model, ids = tiny_model("llama"), prompt(300)
    expected = attention_fidelity(model, ids)
    for press in (TurboQuant, "TurboQuant(4)", [TurboQuant]):
        assert attention_fidelity(model, ids, press) == expected


def test_what_is_no_token_ids_and_no_figure_is_named() -> None:
    model = tiny_model("llama")
    for given, shown in ((prompt(300)[0], r"\[300\]"), ("text", "str")):
        with pytest.raises(InvalidInputError, match=f"input_ids is .*{shown}.*; give a tensor of token ids"):
            attention_fidelity(model, given)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="no figure 'top_1'; did you mean 'top1'"):
        attention_fidelity(model, prompt(300)).mean("top_1")
