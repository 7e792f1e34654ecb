"""Models split by `device_map`, here between memory and disk: the same answers as in one piece, or a refusal.

accelerate brings a layer's weights in when the layer is called; outside of that they are on no device.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantpress.cache import PackedLayer
from quantpress.errors import CacheFileError, UnsupportedModelError
from quantpress.pipelines.contexts.cached_context import CachedContext
from quantpress.pipelines.text_generation import TextGenerationPipeline
from quantpress.presses import (
    AdaKV,
    Compose,
    CriticalKV,
    ExpectedAttention,
    KeyRerotation,
    Knorm,
    LeverageScore,
    SnapKV,
    TurboQuant,
)
from tests.pipelines.words import text, word_tokenizer
from tests.presses.reading import lossless
from tests.tiny_models import prompt, tiny_model

IDS = prompt(420)
PRESSES = {
    "TurboQuant": lambda: TurboQuant(4, recent_tokens=16),
    "lossless": lossless,
    "SnapKV": lambda: Compose([SnapKV(0.5), lossless()]),
    "SnapKV, TurboQuant": lambda: Compose([SnapKV(0.5), TurboQuant(4, recent_tokens=16)]),
    "ExpectedAttention": lambda: Compose([ExpectedAttention(0.5), lossless()]),
    "LeverageScore": lambda: Compose([LeverageScore(0.5), lossless()]),
    "KeyRerotation": lambda: Compose([KeyRerotation(Knorm(0.5)), lossless()]),
    "AdaKV": lambda: Compose([AdaKV(Knorm(0.5)), lossless()]),
}


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """The tiny Llama with its last two layers on disk."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    places = {"model.layers.1": "disk", "model.layers.2": "disk"}
    rest = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map={**dict.fromkeys(rest, "cpu"), **places}, offload_folder=folder / "offloaded"
    )
    assert model.model.layers[1].self_attn.q_proj.weight.is_meta
    model.generation_config = tiny_model("llama").generation_config
    return model.eval()


def generated(model: PreTrainedModel, press: Any) -> Any:
    with press(model):
        options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
        return model.generate(IDS, **options)


@pytest.mark.parametrize("name", PRESSES)
def test_answers_as_in_one_piece(split: PreTrainedModel, name: str) -> None:
    whole = tiny_model("llama")
    before = whole.generate(IDS, max_new_tokens=8, do_sample=False)
    expected, got = (generated(model, PRESSES[name]()) for model in (whole, split))
    for layer in whole.model.layers:
        vars(layer.self_attn).pop("masked_key_indices", None)
    assert torch.equal(got.sequences, expected.sequences)
    assert all(isinstance(layer, PackedLayer) and layer.packed_tokens for layer in got.past_key_values.layers)
    assert torch.equal(split.generate(IDS, max_new_tokens=8, do_sample=False), before)


def test_a_context_of_the_split_model_is_one_of_the_whole(split: PreTrainedModel, tmp_path: Path) -> None:
    """Weights on disk are told from others too; a saved context goes from one to the other."""
    whole = tiny_model("llama")
    pipes = [TextGenerationPipeline(model=model, tokenizer=word_tokenizer()) for model in (split, whole)]
    options = {"question": text(5, seed=1), "max_new_tokens": 8}
    press = Compose([SnapKV(0.5), TurboQuant(4, recent_tokens=16)])
    expected = pipes[1](text(420), press=press, **options)
    read = pipes[0].read(text(420), press=press)
    assert pipes[0](text(420), press=press, **options) == pipes[0](read, **options) == expected
    read.save(tmp_path / "context.safetensors")
    assert pipes[1](CachedContext.load(tmp_path / "context.safetensors", whole), **options) == expected
    changed = copy.deepcopy(whole)
    changed.model.layers[2].mlp.up_proj.weight.data += 1
    with pytest.raises(CacheFileError, match="other weights"):
        CachedContext.load(tmp_path / "context.safetensors", changed)


def test_a_press_that_reads_weights_itself_is_refused(split: PreTrainedModel) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"CriticalKV does not work .*The device_map keeps its weights"
    ):
        generated(split, Compose([CriticalKV(SnapKV(0.5)), TurboQuant()]))
    before = tiny_model("llama").generate(IDS, max_new_tokens=8, do_sample=False)
    assert torch.equal(split.generate(IDS, max_new_tokens=8, do_sample=False), before)


def test_nothing_of_a_press_stays_on_the_split_model(split: PreTrainedModel) -> None:
    generated(split, PRESSES["SnapKV"]())
    for layer in split.model.layers:
        assert not layer.self_attn._forward_hooks and not hasattr(layer.self_attn, "rotary_emb")
