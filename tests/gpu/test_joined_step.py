"""On a CUDA device: with joined kernels a captured step has fewer launches, and logits as exact."""

from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from quantpress.cache import continue_inputs
from quantpress.pipelines.capture.captured import captured_decoding
from quantpress.pipelines.capture.captured_steps import WARM_STEPS, CapturedDecoding
from quantpress.pipelines.enabling.enable import enable
from quantpress.presses import TurboQuant
from tests.gpu.test_cuda_graph import model_on_cuda, read
from tests.pipelines.enabling.enabled import noted_steps
from tests.tiny_models import VOCABULARY, prompt

pytestmark = pytest.mark.gpu
LAYERS = 4
NEW_TOKENS = 140  # a flush
EVERY = {"norms": 2 * LAYERS + 1, "activations": LAYERS, "rotary positions": 1}


def model_of(config: type, dtype: torch.dtype) -> PreTrainedModel:
    """Shaped like a small model that people use."""
    torch.manual_seed(0)
    made = config(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=4096,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=8192,
        initializer_range=0.1,
    )
    model = AutoModelForCausalLM.from_config(made).to("cuda", dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def scored(model: PreTrainedModel, batch: int, **options: Any) -> tuple[torch.Tensor, CapturedDecoding]:
    """Logits of every new token [B, T, vocabulary]."""
    cache = DynamicCache()
    with torch.no_grad(), TurboQuant(bits=4)(model):
        model.model(input_ids=prompt(500, batch=batch).cuda(), past_key_values=cache)
    inputs = continue_inputs(cache, prompt(5, batch=batch, seed=1).cuda())
    arguments = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    with captured_decoding(model, **options) as steps:
        got = model.generate(
            **inputs, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **arguments
        )
    return torch.stack(got.logits, 1), steps


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config])
def test_logits_are_equal_to_the_last_bit(config: type, dtype: torch.dtype, batch: int) -> None:
    model = model_of(config, dtype)
    expected, eager = scored(model, batch, cuda_graph=False)
    own, apart = scored(model, batch, join_kernels=False)
    got, steps = scored(model, batch, join_kernels="exact")
    norms = (4 if config is Qwen3Config else 2) * LAYERS + 1
    assert steps.joined == {**EVERY, "norms": norms} and apart.joined == eager.joined == {}
    assert steps.replays == apart.replays == NEW_TOKENS - 1 - WARM_STEPS
    assert torch.equal(got, own)
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
    assert not [module for module in model.modules() if "forward" in vars(module)]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config])
def test_products_are_as_exact_as_those_of_pytorch(config: type, dtype: torch.dtype, batch: int) -> None:
    """The error of the logits of given tokens, against the same model in float32."""
    model = model_of(config, dtype)
    ids, tokens = prompt(500, batch=batch).cuda(), prompt(40, batch=batch, seed=1).cuda()

    def logits_of(model: PreTrainedModel, **options: Any) -> tuple[torch.Tensor, CapturedDecoding]:
        cache = DynamicCache()
        with torch.no_grad(), captured_decoding(model, new_tokens=64, **options) as steps:
            model.model(input_ids=ids, past_key_values=cache)
            return torch.cat([model(one, past_key_values=cache).logits for one in tokens.split(1, 1)]), steps

    own, _ = logits_of(model, join_kernels=False)
    got, steps = logits_of(model)
    exact, _ = logits_of(model.float(), cuda_graph=False)
    assert steps.joined == {**EVERY, "products": 7 * LAYERS + 1} and steps.replays == 38
    error, limit = ((one.float() - exact).square().mean().sqrt() for one in (got, own))
    print(f"{float(error):.3e} with products of ours, {float(limit):.3e} with those of PyTorch")
    assert not torch.equal(got, own) and error < 1.1 * limit


def launches_of_a_step(model: PreTrainedModel, **options: Any) -> int:
    """Kernels of one replay."""
    cache, token = read(model, TurboQuant(bits=3)), prompt(1, seed=2).cuda()
    with torch.no_grad(), captured_decoding(model, **options) as steps:
        for _ in range(WARM_STEPS + 2):
            model(token, past_key_values=cache)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            model(token, past_key_values=cache)
            torch.cuda.synchronize()
    assert steps.captures == 1
    ran = [event.name for event in found.events() if event.device_type == DeviceType.CUDA]
    return len([name for name in ran if not name.startswith("Mem")])


@pytest.mark.filterwarnings("ignore:.*[Pp]rofiler")
def test_fewer_launches() -> None:
    """Norms save 7 launches each, rotary positions 9 a layer, a gated product 1 a layer."""
    model = model_of(LlamaConfig, torch.bfloat16)
    apart, together = (launches_of_a_step(model, join_kernels=join) for join in (False, "exact"))
    saved = 7 * (2 * LAYERS + 1) + 9 * LAYERS + LAYERS
    print(f"{apart} launches a step, {together} with joined kernels")
    assert apart - together == saved
    assert (
        launches_of_a_step(model) <= together - 4 * LAYERS
    )  # queries, keys and values; gate, up and product


def test_sampling_draws_the_same_numbers() -> None:
    model = model_on_cuda()
    tokens = []
    for join in (False, "exact"):
        inputs = continue_inputs(cache := read(model, TurboQuant(bits=4)), prompt(7, seed=3).cuda())
        torch.manual_seed(5)
        with captured_decoding(model, join_kernels=join) as steps:
            tokens.append(model.generate(**inputs, past_key_values=cache, max_new_tokens=60, do_sample=True))
    assert torch.equal(*tokens) and steps.joined


@pytest.mark.parametrize("join", [True, "exact", False])
def test_an_enabled_model(join: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = model_on_cuda(), noted_steps(monkeypatch)
    with enable(model, 4, join_kernels=join):
        model.generate(prompt(600).cuda(), max_new_tokens=20, do_sample=False)
    assert made[0].replays and bool(made[0].joined) == bool(join)
    assert ("products" in made[0].joined) == (join is True)
