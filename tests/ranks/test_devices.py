"""A model on the second GPU, and one spread over both by `device_map`; on a CPU, one that is half on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from quantpress import enable
from quantpress.cache import PackedLayer
from quantpress.pipelines.contexts.cached_context import CachedContext
from quantpress.pipelines.text_generation import TextGenerationPipeline
from tests.gpu.test_second_gpu import PRESSES
from tests.pipelines.words import text, word_tokenizer
from tests.ranks.programs import load
from tests.ranks.test_ranks import save_model
from tests.tiny_models import prompt

pytest.importorskip("accelerate")
pytestmark = [pytest.mark.ranks, pytest.mark.multi_gpu]

SEVERAL = torch.cuda.device_count() > 1
FIRST = "cuda:0" if SEVERAL else "cpu"
REST = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head")
SPREAD = {**dict.fromkeys(REST, 0), "model.layers.1": 1, "model.layers.2": 1}
ON_DISK = {**dict.fromkeys(REST, "cpu"), "model.layers.1": "disk", "model.layers.2": "disk"}
PLACES: dict[str, Any] = {
    "second": "cuda:1" if SEVERAL else "cpu",
    "spread": SPREAD if SEVERAL else ON_DISK,
    "balanced": "auto",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("devices")
    save_model(folder, "llama")
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> PreTrainedModel:
    return load(folder, "llama").to(FIRST)


@pytest.fixture(scope="module", params=PLACES)
def elsewhere(request: pytest.FixtureRequest, folder: Path) -> PreTrainedModel:
    return load(folder, "llama", device_map=PLACES[request.param], offload_folder=folder / "offloaded")


@pytest.mark.parametrize("name", PRESSES)
@pytest.mark.filterwarnings("ignore:decoding runs without a CUDA graph")
def test_answers_are_those_of_one_device(
    name: str, whole: PreTrainedModel, elsewhere: PreTrainedModel, tmp_path: Path
) -> None:
    """And so are contexts, wherever they are saved and loaded."""
    pipes = [TextGenerationPipeline(model=model, tokenizer=word_tokenizer()) for model in (whole, elsewhere)]
    options = {"question": text(5, seed=1), "max_new_tokens": 24}
    expected = pipes[0](text(600), press=PRESSES[name](), **options)
    read = pipes[1].read(text(600), press=PRESSES[name]())
    assert pipes[1](read, **options) == expected
    for layer, module in zip(read.cache.layers, elsewhere.model.layers, strict=True):
        weight = module.self_attn.k_proj.weight
        assert isinstance(layer, PackedLayer) and layer.packed_tokens
        assert weight.is_meta or layer.keys.device == weight.device
    read.save(tmp_path / "context")
    for pipe in pipes:
        assert pipe(CachedContext.load(tmp_path / "context", pipe.model), **options) == expected


@pytest.mark.filterwarnings("ignore:decoding runs without a CUDA graph")
def test_an_enabled_model_answers_as_on_one_device(
    whole: PreTrainedModel, elsewhere: PreTrainedModel
) -> None:
    tokens = []
    for model in (whole, elsewhere):
        with enable(model, 4):
            ids = prompt(500).to(model.device)
            tokens.append(model.generate(ids, max_new_tokens=24, do_sample=False)[0, -24:].tolist())
    assert tokens[0] == tokens[1]


@pytest.mark.skipif(not SEVERAL, reason="there is no second GPU")
def test_steps_are_captured_on_the_second_gpu(folder: Path) -> None:
    """`cuda_graph=True` is an error where nothing is captured."""
    pipe = TextGenerationPipeline(
        model=load(folder, "llama", device_map="cuda:1"), tokenizer=word_tokenizer(), cuda_graph=True
    )
    options = {"question": text(5, seed=1), "max_new_tokens": 24, "press": PRESSES["packed"]()}
    assert pipe(text(600), **options) == pipe(text(600), **options, cuda_graph=False)
