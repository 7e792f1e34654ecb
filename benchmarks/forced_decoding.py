"""One vLLM engine that decodes given tokens, and keeps the logits of every step.

    python benchmarks/forced_decoding.py JOB.json

`vllm_quality.py` starts this, one process for each engine, so that an engine's memory goes back with it. A
processor of logits copies each row, then leaves only the token that the text has next. The job's keys are the
fields of `Job`.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

REQUESTS = 8
"""Most requests at a time."""

FILLER_TOKENS = 257
"""Tokens of prompts that take the recent pages of earlier requests."""


@dataclass(frozen=True)
class Job:
    """What an engine has to do.

    Args:
        model: folder of the model.
        dtype: of the model.
        cache_dtype: `--kv-cache-dtype`; "auto" is vLLM's own attention.
        profile: file of `quantpress calibrate`, or None.
        texts: file of torch.save: "scored" [n, T + N] int64 and "others" [m, T + N] int64, token ids.
        context: T, tokens of each text that are the prompt.
        outputs: files to write: logits [n, N - 1, V] float32 of the first round, and of the round that finds
            its prompts in the prefix cache.
        plan: file of `quantpress fit`, or None.
    """

    model: str
    dtype: str
    cache_dtype: str
    profile: str | None
    texts: str
    context: int
    outputs: list[str]
    plan: str | None = None


def processor(rows: dict[int, list[torch.Tensor]]) -> type:
    """A class of processors of logits, which keeps each request's logits under its number in `rows`."""
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class Forced(AdapterLogitsProcessor):
        def is_argmax_invariant(self) -> bool:
            return False

        def new_req_logits_processor(self, params: Any) -> Any:
            number, ids = params.extra_args["number"], params.extra_args["ids"]

            def force(output_ids: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
                if number is not None:
                    rows.setdefault(number, []).append(logits.float().clone())
                forced = ids[len(output_ids)]
                return logits.fill_(float("-inf")).index_fill_(0, torch.tensor([forced]), 0.0)

            return force

    return Forced


def engine(job: Job, forced: type) -> Any:
    """The engine, with a prompt of all texts in one step."""
    from vllm import LLM

    ours: dict[str, Any] = {}
    if job.cache_dtype != "auto":
        from quantpress.engines.vllm import register

        register()
        ours["attention_backend"] = "QUANTPRESS"
        files = {"profile": job.profile, "plan": job.plan}
        ours["additional_config"] = {"quantpress": {name: file for name, file in files.items() if file}}
    return LLM(
        job.model,
        skip_tokenizer_init=True,
        kv_cache_dtype=job.cache_dtype,
        kv_cache_memory_bytes=2 << 30,
        enforce_eager=True,
        max_model_len=2 * job.context + 512,
        max_num_batched_tokens=16384,
        max_num_seqs=REQUESTS,
        dtype=job.dtype,
        hf_overrides={"head_dtype": "float32"},  # logits in bfloat16 alone would add 1e-3 nats
        logits_processors=[forced],
        disable_log_stats=True,
        **ours,
    )


def generate(llm: Any, texts: torch.Tensor, prompt: int, tokens: int, numbered: bool) -> list[int]:
    """Force `tokens` tokens of each text behind its first `prompt`; how many of each prompt were cached."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": text[:prompt].tolist()} for text in texts]
    settings = [
        SamplingParams(
            temperature=0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args={
                "number": i if numbered else None,
                "ids": text[prompt : prompt + tokens].tolist(),
            },
        )
        for i, text in enumerate(texts)
    ]
    found = llm.generate(prompts, settings, use_tqdm=False)
    for text, one in zip(texts, found, strict=True):
        if list(one.outputs[0].token_ids) != text[prompt : prompt + tokens].tolist():
            raise RuntimeError("the engine chose another token than the one that was forced")
    return [one.num_cached_tokens for one in found]


def run(job: Job) -> list[list[int]]:
    """Both rounds; how many tokens of each prompt were cached in each."""
    texts, rows = torch.load(job.texts), {}
    scored, others = texts["scored"], texts["others"]
    llm = engine(job, processor(rows))
    if job.profile is None:
        generate(llm, others[:1], job.context, 1, False)  # statistics freeze here
    counts: list[list[int]] = []
    for output in job.outputs:
        if counts:
            for some in others.flip(1).split(REQUESTS):
                generate(llm, some, FILLER_TOKENS, 1, False)
        rows.clear()
        counts.append(generate(llm, scored, job.context, scored.shape[1] - job.context, True))
        torch.save(torch.stack([torch.stack(rows[i][1:]) for i in range(len(scored))]), output)
    return counts


if __name__ == "__main__":
    print(json.dumps(run(Job(**json.loads(Path(sys.argv[1]).read_text())))))
