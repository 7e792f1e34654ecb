"""A second GPU: kernels, pools, captured steps on it while the first is current, and a model on both."""

import copy
import warnings
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from quantpress.cache import PackedLayer, continue_inputs
from quantpress.codecs.scalar import ScalarPages
from quantpress.kernels.attend import DenseSegment, PackedSegment, PackedSide, Visibility, attend
from quantpress.pipelines.capture.captured import captured_decoding
from quantpress.pipelines.capture.captured_steps import CapturedDecoding
from quantpress.pipelines.enabling.enable import enable
from quantpress.presses import AdaKV, Compose, SnapKV, TurboQuant
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import key_statistics
from tests.cache.paged.paging import QUERY_HEADS, random_states, small
from tests.gpu.test_cuda_graph import model_on_cuda
from tests.tiny_models import prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU"),
]
NEW_TOKENS = 150
PRESSES = {
    "packed": lambda: TurboQuant(bits=3),
    "evicted": lambda: Compose([SnapKV(0.5), TurboQuant(bits=4)]),
    "head_wise": lambda: Compose([AdaKV(SnapKV(0.5)), TurboQuant(bits=3)]),
}


def everything(device: str, head_dim: int, bits: float) -> dict[str, torch.Tensor]:
    """Encoded, attended and decoded on a device, from the same numbers."""
    chance = torch.Generator().manual_seed(7)
    shape = (1, 2, 2048, head_dim)
    keys, values = (torch.randn(shape, generator=chance).bfloat16().to(device) for _ in range(2))
    query = torch.randn(1, 8, 1, head_dim, generator=chance).bfloat16().to(device)
    recent = torch.randn(1, 2, 40, head_dim, generator=chance).bfloat16().to(device)
    weight = torch.rand(1, 2, head_dim, generator=chance).to(device) + 0.1
    codecs = [ScalarPages(CodecSpec(head_dim=head_dim, bits=bits, role=role)) for role in ("key", "value")]
    transform = key_statistics(keys, weight, codecs[0].groups)
    used = [transform, type(transform)(order=transform.order)]
    sides = [
        PackedSide(codec, codec.encode(states, change), change)
        for codec, states, change in zip(codecs, (keys, values), used, strict=True)
    ]
    segments = [PackedSegment(*sides), DenseSegment(recent, recent)]
    found = {f"{side.codec.spec.role} {name}": plane for side in sides for name, plane in side.planes.items()}
    for queries in (1, 5, 40):
        many = query.expand(-1, -1, queries, -1).contiguous()
        found[f"{queries} queries"] = attend(
            many, segments, Visibility(queries, 2088), scaling=head_dim**-0.5
        )
    for side in sides:
        found[f"{side.codec.spec.role} decoded"] = side.codec.decode(
            side.planes, side.transform, torch.bfloat16
        )
    assert all(x.device == torch.device(device) for x in found.values())
    return {name: x.cpu() for name, x in found.items()}


@pytest.mark.parametrize(("head_dim", "bits"), [(128, 4), (128, 3), (64, 2), (256, 3), (128, 2.5), (80, 4)])
def test_kernels_run_where_their_tensors_are(head_dim: int, bits: float) -> None:
    """Bit by bit what the first GPU gives, which stays the current one."""
    with torch.cuda.device(0):
        first, second = (everything(device, head_dim, bits) for device in ("cuda:0", "cuda:1"))
        assert torch.cuda.current_device() == 0
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_kernels_run_on_the_current_stream(device: str) -> None:
    """Where a stream is kept busy before it fills the inputs, results come behind them."""
    expected = everything(device, 128, 3)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        got = everything(device, 128, 3)
    for name, x in expected.items():
        assert torch.equal(x, got[name]), name


def test_a_pool_on_the_second_gpu() -> None:
    outputs: list[torch.Tensor] = []
    for device in ("cuda:0", "cuda:1"):
        torch.manual_seed(3)
        paged = small(128, bits=3, device=device, dtype=torch.bfloat16, layers=2)
        for tokens in (1000, 7, 389):
            paged.add(*random_states(paged, 2, tokens=tokens))
        paged.extend()
        plan = paged.plan()
        keys, values = random_states(paged, 2, 6, tokens=1)
        query = torch.randn(6, QUERY_HEADS, 1, 128).to(device, torch.bfloat16)
        for layer in range(2):
            paged.write(keys[layer], values[layer], plan, layer=layer)
            outputs.append(paged.attend(query, plan, layer=layer)[:3].cpu())
        assert torch.cuda.current_device() == 0
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])


def read(model: PreTrainedModel, press: Any) -> DynamicCache:
    cache = DynamicCache()
    with torch.no_grad(), press(model):
        model.model(input_ids=prompt(1000).to(model.device), past_key_values=cache)
    return cache


def continued(model: PreTrainedModel, press: Any) -> tuple[torch.Tensor, CapturedDecoding]:
    """Greedy tokens behind a compressed context."""
    cache = read(model, press)
    inputs = continue_inputs(cache, prompt(7, seed=3).to(model.device))
    with captured_decoding(model, new_tokens=NEW_TOKENS, join_kernels="exact") as steps:
        tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokens.cpu(), steps


@pytest.mark.parametrize("name", PRESSES)
def test_steps_are_captured_on_the_second_gpu(name: str) -> None:
    model = model_on_cuda(128)
    expected, _ = continued(model, PRESSES[name]())
    got, steps = continued(copy.deepcopy(model).to("cuda:1"), PRESSES[name]())
    assert torch.equal(got, expected) and got.unique().numel() > 20
    assert steps.captures == 1 and steps.replays > NEW_TOKENS - 10
    assert torch.cuda.current_device() == 0


@pytest.fixture(scope="module")
def spread() -> PreTrainedModel:
    """Two of four layers on each GPU, as `device_map="auto"` would have it."""
    accelerate = pytest.importorskip("accelerate")
    model = copy.deepcopy(model_on_cuda(128))
    places = {f"model.layers.{index}": index // 2 for index in range(4)}
    places |= {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    spread: PreTrainedModel = accelerate.dispatch_model(model, places)
    return spread


@pytest.mark.parametrize("name", PRESSES)
def test_a_model_on_both_answers_as_on_one(name: str, spread: PreTrainedModel) -> None:
    """Each layer's pages are where the layer is; steps are not captured, which is said once."""
    expected, _ = continued(model_on_cuda(128), PRESSES[name]())
    with pytest.warns(UserWarning, match="several devices") as said:
        got, steps = continued(spread, PRESSES[name]())
    assert torch.equal(got, expected)
    assert steps.replays == 0 and len([one for one in said if "several devices" in str(one.message)]) == 1
    cache = read(spread, PRESSES[name]())
    for index, layer in enumerate(cache.layers):
        assert isinstance(layer, PackedLayer) and layer.packed_tokens > 0
        assert layer.keys.device == layer.values.device == torch.device("cuda", index // 2)


def test_an_enabled_model_on_both(spread: PreTrainedModel) -> None:
    ids = prompt(700, seed=2).cuda()
    options = {"max_new_tokens": 40, "do_sample": False}
    tokens = []
    for model in (model_on_cuda(128), spread):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not captured
            with enable(model, TurboQuant(bits=4), join_kernels="exact"):
                tokens.append(model.generate(ids, **options).cpu())
    assert torch.equal(*tokens)
