"""Speculation: drafts that are accepted and drafts that are rejected leave the same cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.engines.vllm.engine.lossless import codecs_by_width
from tests.engines.vllm.engine.running import BLOCK, Engine, engine
from tests.engines.vllm.engine.tiny import CONFIG, Truth, save_tokenizer, tokens, with_plan

DRAFTS, WORDS = 4, 12
NEW = 60


def changed(folder: Path, home: Path, *, noise: float = 0.0) -> Path:
    """The same model with a few words only, so that answers repeat themselves, and with noise in it."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            weight += noise * weight.std() * torch.randn_like(weight) if weight.dim() > 1 else 0
        model.lm_head.weight[WORDS:] = 0
    model.save_pretrained(home)
    save_tokenizer(home)
    return home


def wider(folder: Path, home: Path) -> Path:
    """The same model with each KV head twice."""
    heads = CONFIG["num_key_value_heads"]
    model = LlamaForCausalLM(LlamaConfig(**CONFIG | {"num_key_value_heads": 2 * heads}))
    states = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for name, weight in states.items():
        if "k_proj" in name or "v_proj" in name:
            states[name] = weight.unflatten(0, (heads, -1)).repeat_interleave(2, 0).flatten(0, 1)
    model.load_state_dict(states)
    model.save_pretrained(home)
    return home


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ngram", "draft_model", "draft_model of another shape"])
def test_drafts(folder: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that is drafted for by one of another shape has widths by layer, too."""
    model, method = changed(folder, tmp_path / "model"), kind.split()[0]
    options: dict[str, Any] = {}
    speculation: dict[str, Any] = {"method": method, "num_speculative_tokens": DRAFTS}
    if method == "ngram":
        speculation |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    elif kind == method:
        speculation |= {"model": str(changed(folder, tmp_path / "draft", noise=0.1))}
    else:
        draft = changed(wider(folder, tmp_path / "wider"), tmp_path / "draft", noise=0.1)
        speculation |= {"model": str(draft)}
        monkeypatch.setattr("quantpress.engines.vllm.backend.codecs_of", codecs_by_width)
        options = with_plan(model, tmp_path, {0: (4, 2), 1: (2, 2)})
    truth = Truth(model)
    with engine(model, speculative_config=speculation, **options) as running:
        prompts = [tokens(20) * 5, tokens(BLOCK - 3), tokens(260), tokens(60) * 3]
        for prompt, answer in zip(prompts, running.generate(*prompts, new=NEW), strict=True):
            truth.check(prompt, answer.outputs[0])
        drafted = sum(map(len, drafts_of(running)))
        computed = sum(sum(step) for step in running.work())
        rejected = computed - sum(map(len, prompts)) - (NEW - 1) * len(prompts)
        assert 0 < rejected < drafted, "drafts of both kinds are needed"


def drafts_of(running: Engine) -> list[list[int]]:
    return [draft for step in running.steps for draft in step.scheduled_spec_decode_tokens.values()]
