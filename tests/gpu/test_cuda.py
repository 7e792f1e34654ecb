"""On a CUDA device everything gives what it gives on the CPU, and memory really falls."""

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from quantpress.cache import PackedLayer, cache_memory
from quantpress.codecs.scalar import ScalarPages
from quantpress.kernels import attend as kernels
from quantpress.kernels.attend import DenseSegment, PackedSegment, PackedSide, Visibility, attend
from quantpress.kernels.layout import unpack_pages
from quantpress.presses import Compose, Demote, Knorm, SnapKV, TurboQuant
from quantpress.presses.packing.settlement import Settlement
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import key_statistics
from tests.cache.caches import lossless, scalar
from tests.gpu.gpu_state import no_synchronization
from tests.gpu.test_cuda_graph import model_on_cuda
from tests.tiny_models import prompt, tiny_model

pytestmark = pytest.mark.gpu
GIB = 1 << 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [1, 2, 2.5, 3, 3.5, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_codes_and_attention_match_the_cpu(head_dim: int, bits: float, dtype: torch.dtype) -> None:
    """Codes equal but for ties (float32 sums differ in the last place), attention within rounding."""
    keys, values = (torch.randn(2, 2, 512, head_dim).to(dtype) for _ in range(2))
    query, recent = torch.randn(2, 8, 3, head_dim).to(dtype), torch.randn(2, 2, 40, head_dim).to(dtype)
    codecs = [ScalarPages(CodecSpec(head_dim=head_dim, bits=bits, role=role)) for role in ("key", "value")]
    transform = key_statistics(keys, torch.rand(2, 2, head_dim) + 0.1, codecs[0].groups)
    outputs, planes, on_cpu = [], [], []
    for device in ("cpu", "cuda"):
        moved = transform.map(lambda tensor: tensor.to(device))  # noqa: B023
        sides = []
        for codec, states in zip(codecs, (keys, values), strict=True):
            used = moved if codec is codecs[0] else type(moved)(order=moved.order)
            sides.append(PackedSide(codec, codec.encode(states.to(device), used), used))
        planes.append({name: plane.cpu() for name, plane in sides[0].planes.items()})
        on_cpu = on_cpu or [side.planes for side in sides]  # both attend the same codes: ties aside
        same = [
            PackedSide(side.codec, {name: plane.to(device) for name, plane in codes.items()}, side.transform)
            for side, codes in zip(sides, on_cpu, strict=True)
        ]
        segments = [PackedSegment(*same), DenseSegment(recent.to(device), recent.to(device))]
        out = attend(query.to(device), segments, Visibility(3, 552), scaling=head_dim**-0.5)
        outputs.append(out.cpu().double())
    for i, group in enumerate(codecs[0].spec.groups):
        codes = [unpack_pages(p[f"codes{i}"], group.bits, group.channels, "key") for p in planes]
        assert (codes[0] != codes[1]).float().mean() < 1e-4
        apart = (codes[0] != codes[1]).any(-1)  # a code at a tie moves the scale of its vector with it
        assert apart.float().mean() < 0.01
        scales = [p[f"scale{i}"].masked_fill(apart, 1) for p in planes]
        torch.testing.assert_close(*scales, rtol=2e-3, atol=0)
    tolerance = {torch.float32: 2e-3, torch.bfloat16: 8e-3, torch.float16: 2.5e-3}[dtype]
    assert (outputs[0] - outputs[1]).norm() < tolerance * outputs[0].norm()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_lossless_is_dynamic_cache(attention: str) -> None:
    model, ids = copy.deepcopy(tiny_model("llama", attention)).cuda(), prompt(300, batch=2).cuda()
    cache = DynamicCache()
    cache.layers.extend(PackedLayer(lossless(recent_tokens=16)) for _ in range(3))
    arguments = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **arguments)
    assert torch.equal(model.generate(ids, past_key_values=cache, **arguments), expected)


@pytest.mark.parametrize("case", ["padded", "demoted", "long question"])
def test_the_kernels_read_it(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits are those of PyTorch page by page, which is not asked."""

    def page_by_page(*args: object, **options: object) -> torch.Tensor:
        raise AssertionError("attention left the kernels")

    model, ids = model_on_cuda(64, torch.float32), prompt(700, batch=2).cuda()
    question = prompt(300 if case == "long question" else 5, batch=2, seed=1).cuda()
    mask = torch.ones(2, 700 + question.shape[1], dtype=torch.int64, device="cuda")
    mask[1, : 290 if case == "padded" else 0] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    press = Compose([Demote(Knorm(0.5), bits=2), TurboQuant(4)]) if case == "demoted" else TurboQuant(4)
    logits = []
    for name, instead in (("supports", lambda *_: False), ("attend_reference", page_by_page)):
        cache = DynamicCache()
        with torch.inference_mode(), press(model):
            seen, at = mask[:, :700], positions[:, :700]
            model.model(ids, attention_mask=seen, position_ids=at, past_key_values=cache)
        with torch.inference_mode(), monkeypatch.context() as patch:
            patch.setattr(kernels, name, instead)
            at = positions[:, 700:]
            found = model(question, attention_mask=mask, position_ids=at, past_key_values=cache)
            logits.append(found.logits.double())
    assert (logits[0] - logits[1]).norm() < 2e-2 * logits[0].norm()


def test_offload_and_prefetch() -> None:
    keys, values = torch.randn(2, 1, 2, 700, 32, device="cuda")
    layer = PackedLayer.from_states(keys, values, scalar(recent_tokens=16))
    before = layer.keys + 0
    torch.cuda.synchronize()
    resident = torch.cuda.memory_allocated()
    layer.offload()
    torch.cuda.synchronize()
    assert layer.keys.device.type == "cpu" and torch.cuda.memory_allocated() < resident
    layer.prefetch()
    assert torch.equal(layer.keys + 0, before)


@contextlib.contextmanager
def no_wait_between(first: torch.nn.Module, last: torch.nn.Module) -> Iterator[None]:
    """Nothing may wait for the device from the start of one module to the end of another."""
    with contextlib.ExitStack() as watch:
        strict = watch.enter_context(contextlib.ExitStack())
        begin = first.register_forward_pre_hook(lambda *_: strict.enter_context(no_synchronization()))
        watch.callback(begin.remove)
        watch.callback(last.register_forward_hook(lambda *_: strict.close()).remove)
        yield


@pytest.mark.parametrize("name", ["3 bits", "2.5 bits", "small", "quality"])
def test_packing_does_not_wait_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second layer to the last; the first one looks at positions. Codes are as if it had waited."""
    press = TurboQuant(float(name[:-5])) if name.endswith(" bits") else TurboQuant.preset(name)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        vocab_size=512,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    ids, found = prompt(2000).cuda(), []
    for watched in (False, True, False):
        cache, layers = DynamicCache(), model.model.layers
        if found and not watched:
            monkeypatch.setattr(Settlement, "collecting", lambda self: contextlib.nullcontext())
        watch = no_wait_between(layers[1], layers[-1]) if watched else contextlib.nullcontext()
        with torch.inference_mode(), press(model), watch:
            model.model(ids, past_key_values=cache)
        found.append([layer.tokens.packed_tensors() for layer in cache.layers])
    for each in zip(*found, strict=True):
        for one, *others in zip(*each, strict=True):
            assert all(other.dtype == one.dtype and torch.equal(other, one) for other in others)


@pytest.mark.parametrize("evict", [False, True], ids=["all_tokens", "half_of_them"])
def test_prefill_frees_raw_states_layer_by_layer(evict: bool) -> None:
    """The peak of a 16K prefill stays below what its 16-bit cache alone would take."""
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=512,
        max_position_embeddings=1 << 15,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    ids = prompt(1 << 14).cuda()
    bf16_cache = 2 * 24 * 8 * 128 * (1 << 14) * 2
    press = SnapKV(0.5) | TurboQuant(bits=3) if evict else TurboQuant(bits=3)
    peaks = []
    for packed in (False, True):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        start, cache = torch.cuda.memory_allocated(), DynamicCache()
        with torch.inference_mode():
            if packed:
                with press(model):
                    model.model(ids, past_key_values=cache)
            else:
                model.model(ids, past_key_values=cache)
        peaks.append(torch.cuda.max_memory_allocated() - start)
        if packed:
            resident = torch.cuda.memory_allocated() - start
            assert resident < cache_memory(cache).total_bytes * 1.05 + (16 << 20)
        del cache
    print([f"{size / GIB:.2f} GiB" for size in (*peaks, bf16_cache)])
    assert peaks[1] < bf16_cache < peaks[0]
