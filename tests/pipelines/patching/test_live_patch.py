"""`patch_attention`: what a code width does inside attention, with no cache touched."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantpress.errors import InvalidInputError, NotAppliedError, UnsupportedBitsError, UnsupportedModelError
from quantpress.pipelines.enabling.enable import enable
from quantpress.pipelines.patching.live_patch import patch_attention
from quantpress.pipelines.patching.round_trip import RoundTrip
from tests.tiny_models import FAMILIES, prompt, tiny_model

IDS = prompt(200)


class SelfAttention(nn.Module):
    """What diffusion models and others do: heads split by hand, and torch's own attention."""

    def __init__(self, channels: int = 64, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        self.seen.append((q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


def relative(exact: Tensor, got: Tensor) -> float:
    return float((exact - got).detach().square().sum() / exact.detach().square().sum())


def functions() -> tuple[Any, dict[str, Any]]:
    return F.scaled_dot_product_attention, dict(ALL_ATTENTION_FUNCTIONS.items())


def test_record_says_what_was_done() -> None:
    """Every figure against the same arithmetic by hand."""
    model, x = SelfAttention(), torch.randn(3, 256, 64)
    exact = model(x)
    before = functions()
    with patch_attention(model, bits=3) as patch:
        got = model(x)
    assert functions() == before
    (call,) = patch.record.calls
    assert call.query_shape == call.key_shape == call.value_shape == (3, 2, 256, 32)
    q, k, v = model.seen[-1]
    trip = RoundTrip(bits=3, measure=False)
    by_hand = []
    trip.attend(q, k, v, lambda keys, values: by_hand.extend([keys, values]) or q)
    keys, values = by_hand
    assert torch.equal(got, F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(-2))
    assert call.key_error == pytest.approx(relative(k, keys), rel=1e-4)
    assert call.value_error == pytest.approx(relative(v, values), rel=1e-4)
    assert call.output_error == pytest.approx(relative(exact, got), rel=1e-4)
    assert 0.01 < call.value_error < 0.06  # about .034 for unit vectors
    assert call.dense_bytes == 2 * 3 * 2 * 256 * 32 * 4
    # 2 pages a head: 3-bit codes and a 16-bit scale a vector; mean and weight of the keys in 32 bits
    assert call.packed_bytes == 6 * (2 * 256 * (32 * 3 // 8 + 2) + 2 * 32 * 4)
    assert patch.record.bits_per_value == pytest.approx(8 * call.packed_bytes / call.values)
    assert patch.record.potential_bytes_saved == call.dense_bytes - call.packed_bytes
    assert "potential saving" in str(patch.record)


def test_more_bits_less_error() -> None:
    model, x, errors = SelfAttention(), torch.randn(1, 300, 64), []
    for bits in (2, 3, 4, 8):
        with patch_attention(model, bits) as patch:
            model(x)
        errors.append(patch.record.output_error)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_call_of_a_transformers_model(family: str, attention: str) -> None:
    model = tiny_model(family, attention)
    with torch.inference_mode():
        exact = model(IDS).logits
        with patch_attention(model, key_bits=8, value_bits=8) as patch:
            got = model(IDS).logits
    assert len(patch.record.calls) == model.config.num_hidden_layers
    assert {call.key_shape for call in patch.record.calls} == {(1, 2, 200, 32)}
    assert {call.name for call in patch.record.calls} == {type(model.model.layers[0].self_attn).__name__}
    assert not torch.equal(got, exact) and relative(exact, got) < 0.1
    assert max(call.output_error or 1 for call in patch.record.calls) < 1e-3


def test_the_cache_keeps_what_it_keeps() -> None:
    """The first layer's keys do not depend on attention: after the patch they are the same numbers."""
    model, plain, cache = tiny_model("llama"), DynamicCache(), DynamicCache()
    with torch.inference_mode():
        model(IDS, past_key_values=plain)
        with patch_attention(model, 2) as patch:
            model(IDS, past_key_values=cache)
            model(prompt(1, seed=2), past_key_values=cache)
            model(prompt(1, seed=3), past_key_values=cache)
    assert type(cache.layers[0]).__name__ == "DynamicLayer"
    assert torch.equal(cache.layers[0].keys[:, :, :200], plain.layers[0].keys)
    assert torch.equal(cache.layers[0].values[:, :, :200], plain.layers[0].values)
    assert [call.key_shape[2] for call in patch.record.calls] == [200] * 3 + [201] * 3 + [202] * 3


def test_generate_under_a_patch() -> None:
    model = tiny_model("llama")
    exact = model.generate(IDS, max_new_tokens=6, do_sample=False)
    with patch_attention(model, 8, measure=False) as patch:
        got = model.generate(IDS, max_new_tokens=6, do_sample=False)
    assert got[0, 200] == exact[0, 200]
    assert len(patch.record.calls) == 18 and math.isnan(patch.record.output_error)


def test_torch_s_own_multi_head_attention() -> None:
    """It calls attention inside another function of torch."""
    for training in (False, True):
        layer = nn.TransformerEncoderLayer(64, 4, dropout=0.0, batch_first=True).train(training)
        with torch.set_grad_enabled(training), patch_attention(layer, 4) as patch:
            layer(torch.randn(2, 130, 64))
        assert [call.key_shape for call in patch.record.calls] == [(2, 4, 130, 16)]


def test_keywords_masks_and_other_numbers_of_dimensions() -> None:
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            return F.scaled_dot_product_attention(query=q, key=k, value=v, **options)

    model = Model()
    for shape, options in (
        ((2, 4, 140, 32), {"is_causal": True, "scale": 0.3}),
        ((3, 140, 32), {"attn_mask": torch.rand(140, 140) > 0.3}),
        ((2, 3, 4, 140, 32), {}),
        ((140, 32), {}),
    ):
        q, k, v = torch.randn(3, *shape)
        exact = model(q, k, v, **options)
        with patch_attention(model, 8) as patch:
            got = model(q, k, v, **options)
        assert got.shape == exact.shape and 0 < relative(exact, got) < 1e-3
        assert patch.record.calls[0].output_error == pytest.approx(relative(exact, got), rel=1e-3)
    q, k, v = torch.randn(1, 8, 9, 32), torch.randn(1, 2, 140, 32), torch.randn(1, 2, 140, 64)
    with patch_attention(model, 8) as patch:
        assert model(q, k, v, enable_gqa=True).shape == (1, 8, 9, 64)
    assert patch.record.calls[0].value_shape == (1, 2, 140, 64)


def test_gradients_reach_the_queries() -> None:
    model, x = SelfAttention(), torch.randn(1, 130, 64, requires_grad=True)
    with patch_attention(model, 4):
        model(x).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


# Leaving things as they were


def test_disabled_leaves_the_model_untouched() -> None:
    model = SelfAttention()
    before = dict(vars(model))
    with patch_attention(model, enabled=False) as patch:
        assert vars(model) == before and not patch.active
        model(torch.randn(1, 128, 64))
    assert not patch.record.calls


def test_removed_exactly_also_after_an_exception() -> None:
    model = tiny_model("llama")
    before, held = functions(), dict(vars(model))
    with pytest.raises(RuntimeError, match="on purpose"), patch_attention(model):
        handle = model.model.layers[1].mlp.register_forward_hook(_fail)
        try:
            model(IDS)
        finally:
            handle.remove()
    assert vars(model) == held and functions() == before
    patch = patch_attention(model)
    patch.remove()
    patch.remove()
    assert vars(model) == held


def _fail(*_: Any) -> None:
    raise RuntimeError("on purpose")


def test_models_and_copies_are_independent() -> None:
    first, second, x = SelfAttention(), SelfAttention(), torch.randn(1, 128, 64)
    with patch_attention(first, 2) as two, patch_attention(second, 8) as eight:
        other = copy.deepcopy(first)
        other(x)
        assert not two.record.calls
        first(x), second(x), second(x)
    assert (len(two.record.calls), len(eight.record.calls)) == (1, 2)
    assert two.record.output_error > eight.record.output_error
    assert "forward" in vars(other) and "forward" not in vars(first)
    two.record.clear()
    assert not two.record.seen


def test_a_part_with_a_patch_of_its_own() -> None:
    """Calls inside the part are the part's; those before and after it are the whole's."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.part, self.last = SelfAttention(), SelfAttention(), SelfAttention()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.part(self.first(x)))

    whole, x = Whole(), torch.randn(1, 128, 64)
    with patch_attention(whole, 2) as outer, patch_attention(whole.part, 8) as inner:
        whole(x)
        assert (len(outer.record.calls), len(inner.record.calls)) == (2, 1)
    assert outer.record.bits_per_value < inner.record.bits_per_value


# Refusals


class NoAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-1)


def run_patched(model: nn.Module, x: Tensor | None = None) -> None:
    with patch_attention(model):
        if x is not None:
            model(x)


def test_incompatible() -> None:
    with pytest.raises(UnsupportedModelError, match=r"model incompatible: a forward of NoAttention"):
        run_patched(NoAttention(), torch.zeros(1))
    with pytest.raises(UnsupportedModelError, match=r"model incompatible: .*made no attention call"):
        run_patched(tiny_model("bloom", "eager"), IDS)
    with pytest.raises(UnsupportedModelError, match=r"model incompatible: a str is no torch\.nn\.Module"):
        patch_attention("model")  # type: ignore[arg-type]
    assert "forward" not in vars(tiny_model("bloom", "eager"))


def test_not_applied() -> None:
    with pytest.raises(NotAppliedError, match=r"compression not applied: .*run the model"):
        run_patched(SelfAttention())
    with pytest.raises(NotAppliedError, match=r"not applied: .*SelfAttention.*1 calls: head_dim 6"):
        run_patched(SelfAttention(channels=12), torch.randn(1, 128, 12))
    with pytest.raises(NotAppliedError, match="NaN"):
        run_patched(SelfAttention(), torch.full((1, 128, 64), torch.nan))


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"bits": 17}, UnsupportedBitsError, "17"),
        ({"rotation": "none"}, InvalidInputError, "rotation='none'"),
        ({"colour": 1}, InvalidInputError, "colour"),
    ],
    ids=str,
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], reason: str) -> None:
    model = SelfAttention()
    with pytest.raises(error, match=reason):
        patch_attention(model, **options)
    assert "forward" not in vars(model)


def test_patched_twice_and_over_a_packed_cache() -> None:
    model = tiny_model("llama")
    with patch_attention(model, enabled=True), pytest.raises(InvalidInputError, match="patched already"):
        try:
            patch_attention(model)
        finally:
            model(IDS)
    with (
        pytest.raises(InvalidInputError, match="packed already"),
        enable(model, 4),
        patch_attention(model, 4),
    ):
        model.generate(prompt(300), max_new_tokens=3, do_sample=False)
    assert "forward" not in vars(model)


# Real diffusion models


def test_diffusers_flux_and_unet() -> None:
    diffusers = pytest.importorskip("diffusers")
    flux = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    given = {
        "hidden_states": torch.randn(1, 144, 4),
        "encoder_hidden_states": torch.randn(1, 20, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(144, 3),
        "txt_ids": torch.zeros(20, 3),
    }
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
        sample_size=16,
    ).eval()
    noise = {
        "sample": torch.randn(1, 4, 16, 16),
        "timestep": 1,
        "encoder_hidden_states": torch.randn(1, 20, 32),
    }
    for model, inputs, calls in ((flux, given, 2), (unet, noise, None)):
        with torch.inference_mode():
            exact = model(**inputs).sample
            with patch_attention(model, 8) as patch:
                got = model(**inputs).sample
            assert torch.equal(model(**inputs).sample, exact)
        assert 0 < relative(exact, got) < 1e-3
        assert calls is None or len(patch.record.calls) == calls
        assert {call.name for call in patch.record.calls} == {"scaled_dot_product_attention"}
    assert {call.key_shape[2] for call in patch.record.calls} == {256, 64, 20}


def test_a_second_block_over_what_was_removed_is_refused() -> None:
    model = SelfAttention()
    with patch_attention(model) as patch:
        model(torch.randn(1, 128, 64))
    with pytest.raises(InvalidInputError, match="was removed before, and does nothing"), patch:
        pytest.fail("entered")
    with patch_attention(model, enabled=False) as unpatched:  # never was there
        assert not unpatched.active
