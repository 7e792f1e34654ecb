"""A codec that the library has never heard of is packed, attended to, saved, loaded and evaluated."""

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from quantpress.cache import PackedLayer, cache_memory
from quantpress.evaluation.arms import codec_arm, uncompressed
from quantpress.evaluation.results.records import Records
from quantpress.evaluation.runner import REFUSED, Runner, run_settings
from quantpress.kernels.attend import PackedSegment, PackedSide, Visibility, attend
from quantpress.pipelines.contexts.cached_context import CachedContext
from quantpress.presses import TurboQuant
from quantpress.quantization.transform import ChannelTransform
from tests.codecs.five_levels import FiveLevels
from tests.evaluation.test_runner import SUITE
from tests.pipelines.words import ours, text
from tests.presses.reading import read
from tests.tiny_models import HEAD_DIM, prompt, tiny_model

NONE = ChannelTransform()


def five_levels(head_dim: int, role: str, layer_idx: int) -> FiveLevels:
    return FiveLevels(head_dim)


def test_the_error_is_at_most_half_a_step() -> None:
    x = torch.randn(2, 3, 256, HEAD_DIM)
    codec = FiveLevels(HEAD_DIM)
    decoded = codec.decode(codec.encode(x, NONE), NONE, torch.float32)
    step = x.abs().amax(-1, keepdim=True) / 2
    assert ((decoded - x).abs() <= step * 0.5 + x.abs().max() * 2**-9).all()


def test_bits_are_counted_from_the_planes() -> None:
    assert FiveLevels(HEAD_DIM).bits_per_value == (11 * 8 + 16) / HEAD_DIM
    assert TurboQuant(codec=five_levels).bits_per_value(HEAD_DIM) == (11 * 8 + 16) / HEAD_DIM


def test_attention_is_that_of_the_decoded_values() -> None:
    codec = FiveLevels(HEAD_DIM)
    planes = [codec.encode(torch.randn(2, 2, 256, HEAD_DIM), NONE) for _ in range(2)]
    pages = PackedSegment(*(PackedSide(codec, one, NONE) for one in planes))
    query = torch.randn(2, 4, 1, HEAD_DIM)
    found = attend(query, [pages], Visibility(1, 256), scaling=0.3)
    decoded = [codec.decode(one, NONE, torch.float32) for one in planes]
    expected = scaled_dot_product_attention(query, *decoded, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_model_is_packed_and_reads_the_codes() -> None:
    model = tiny_model("llama")
    cache = read(model, TurboQuant(codec=five_levels, recent_tokens=16), prompt(700))
    assert all(isinstance(layer, PackedLayer) and layer.packed_tokens == 640 for layer in cache.layers)
    heads, sides = 2, 2
    assert {one.packed_bytes for one in cache_memory(cache).layers} == {640 * heads * sides * (11 + 2)}
    decoded = DynamicCache()
    for index, layer in enumerate(cache.layers):
        decoded.update(layer.keys.clone(), layer.values.clone(), index)
    step = {"input_ids": prompt(1, seed=3), "position_ids": torch.tensor([[700]])}
    with torch.inference_mode():
        found, expected = (model(**step, past_key_values=one).logits for one in (cache, decoded))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        model(prompt(150), past_key_values=cache, position_ids=torch.arange(701, 851)[None])
    assert all(layer.packed_tokens == 768 for layer in cache.layers)


def test_a_saved_context_is_loaded_with_the_same_codes(tmp_path) -> None:
    pipe, file = ours(), tmp_path / "context.safetensors"
    press = TurboQuant(codec=five_levels, recent_tokens=16)
    context = pipe.read(text(400), press=press)
    context.save(file)
    loaded = CachedContext.load(file, pipe.model, press=press)
    for layer, other in zip(context.cache.layers, loaded.cache.layers, strict=True):
        assert layer.packed_tokens and layer.settings == other.settings
        assert torch.equal(layer.keys.clone(), other.keys.clone())
    answers = [pipe(one, question="w1 w2", max_new_tokens=8)["answer"] for one in (context, loaded)]
    assert answers[0] == answers[1]


def test_it_is_an_arm_of_an_evaluation(tmp_path) -> None:
    pipe = ours()
    records = Records(tmp_path / "results.jsonl", run_settings(pipe, "tiny", SUITE, 0))
    arms = [uncompressed(), codec_arm("five levels", five_levels, recent_tokens=16)]
    Runner(pipe, SUITE, arms, records, text=text(2000)).run(("fidelity",))
    lines = [line for line in records.of("fidelity") if line["arm"] == "five levels"]
    assert len(lines) == SUITE.documents and not list(records.of(REFUSED))
    errors = torch.tensor([line["attention"]["output"] for line in lines])
    assert (errors > 0).all() and errors.mean() < 1
