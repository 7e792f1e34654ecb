"""The tiny model of these tests, and what transformers says of the tokens that an engine made."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quantpress.cache import WidthPlan
from quantpress.cache.saved.config_fingerprint import config_fingerprint

VOCABULARY = 512
TOLERANCE = 5e-4
"""Nats. Another order of sums moves a log-probability by 1e-5, one token of 455 that is not read by 1e-2."""

CONFIG: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,  # wide, so that no two tokens are about equally likely
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save_model(folder: Path, seed: int, **changes: Any) -> Path:
    """Save a random Llama and its tokenizer; `changes` are of its configuration."""
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**CONFIG | changes)).float().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer of words t0, t1 and so on, with blanks between them."""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="t0", bos_token="t1", eos_token="t2"
    ).save_pretrained(folder)


def with_plan(folder: Path, home: Path, widths: dict[int, tuple[int, int]]) -> dict[str, Any]:
    """Options of an engine, with a plan of the model in `folder`."""
    fingerprint = config_fingerprint(AutoConfig.from_pretrained(folder))
    WidthPlan("tiny", fingerprint, widths).save(home / "plan.json")
    return {"additional_config": {"quantpress": {"plan": str(home / "plan.json")}}}


def tokens(count: int) -> list[int]:
    """Random tokens, none of them special."""
    return [random.randrange(3, VOCABULARY) for _ in range(count)]


class Truth:
    """transformers' own run of a saved model.

    Args:
        folder: where the model is.
    """

    def __init__(self, folder: Path) -> None:
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def log_probabilities(self, prompt: list[int], made: list[int]) -> torch.Tensor:
        """[len(made), VOCABULARY], of the token at each place of `made`."""
        with torch.no_grad():
            logits = self.model(torch.tensor([prompt + made])).logits
        return logits[0, len(prompt) - 1 : -1].log_softmax(-1)

    def check(self, prompt: list[int], made: Any, greedy: bool = True) -> None:
        """Hold each token of an output of vLLM, and its log-probability, against a run of all tokens at once.

        Args:
            prompt: the tokens before.
            made: `CompletionOutput` with `logprobs`.
            greedy: whether each token has to be the likeliest one.
        """
        there = list(made.token_ids)
        rows = self.log_probabilities(prompt, there)
        ours = rows[range(len(there)), there]
        theirs = torch.tensor([made.logprobs[i][token].logprob for i, token in enumerate(there)])
        off = (ours - theirs).abs()
        assert off.max() < TOLERANCE, f"prompt of {len(prompt)}: off by {off.tolist()}"
        if greedy:
            assert (rows.amax(-1) - ours).max() < TOLERANCE, f"prompt of {len(prompt)}: not the likeliest"

    def error(self, prompt: list[int], answer: Any) -> float:
        """Mean error in nats of the log-probabilities of a greedy answer; `answer` is a `RequestOutput`."""
        made = list(answer.outputs[0].token_ids)
        rows = self.log_probabilities(prompt, made)[range(len(made)), made]
        theirs = [answer.outputs[0].logprobs[i][token].logprob for i, token in enumerate(made)]
        return float((rows - torch.tensor(theirs)).abs().mean())
