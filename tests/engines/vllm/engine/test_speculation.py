"""Speculation: drafts that are accepted and drafts that are rejected leave the same cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.engines.vllm.engine.running import BLOCK, Engine, engine
from tests.engines.vllm.engine.test_memory import lossless, with_plan
from tests.engines.vllm.engine.tiny import Truth, save_model, save_tokenizer, tokens

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
        other = save_model(tmp_path / "other", seed=0, num_key_value_heads=1, num_hidden_layers=1)
        speculation |= {"model": str(changed(other, tmp_path / "draft"))}
        monkeypatch.setattr("quantpress.engines.vllm.backend.codecs_of", lossless)
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
