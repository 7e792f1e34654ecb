"""Adapters: requests with one and without share steps, but never blocks."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.engines.vllm.engine.running import engine
from tests.engines.vllm.engine.tiny import Truth, tokens

RANK, ALPHA = 8, 16
TARGETS = ("q_proj", "k_proj", "v_proj")


def save_adapter(folder: Path, home: Path) -> Truth:
    """Save a random adapter in `home`; the model with its weights merged comes back."""
    merged = Truth(folder)
    stored = {}
    for index, layer in enumerate(merged.model.model.layers):
        for name in TARGETS:
            weight = getattr(layer.self_attn, name).weight
            down = torch.randn(RANK, weight.shape[1]) * 0.05
            up = torch.randn(weight.shape[0], RANK) * 0.05
            weight.data += ALPHA / RANK * up @ down
            where = f"base_model.model.model.layers.{index}.self_attn.{name}"
            stored |= {f"{where}.lora_A.weight": down, f"{where}.lora_B.weight": up}
    settings = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": TARGETS,
    }
    (home / "adapter_config.json").write_text(json.dumps(settings))
    save_file(stored, home / "adapter_model.safetensors")
    return merged


def test_an_adapter(folder: Path, truth: Truth, tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    merged = save_adapter(folder, tmp_path)
    with engine(folder, enable_lora=True, max_lora_rank=RANK, max_loras=1) as running:
        prompt = tokens(300)
        adapted, other = LoRARequest("adapter", 1, str(tmp_path)), tokens(40)
        for turn in range(2):
            answers = running.generate(prompt, prompt, other, lora=[adapted, None, adapted], new=30)
            for one, tokens_before, answer in zip(
                [merged, truth, merged], [prompt, prompt, other], answers, strict=True
            ):
                one.check(tokens_before, answer.outputs[0])
            assert [answer.num_cached_tokens for answer in answers] == [256 * turn, 256 * turn, 0]
