"""Two ranks of one model, on a CPU or on two GPUs: each packs its own heads, and tokens stay transformers'.

Run as a script, this is the engine; the ranks that it spawns run the first lines, too.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.engines.vllm.engine import target
from tests.engines.vllm.engine.lossless import DTYPE, register_lossless
from tests.engines.vllm.engine.tiny import TOLERANCE, Truth, save_model, tokens
from tests.limits import HANG

NEW = 140
LENGTHS = (300, 128, 5)  # the first is read in pieces; each answer fills a block


def answers(model: str, prompts: list[list[int]]) -> list[dict[str, list[float]]]:
    """Tokens and their log-probabilities, prompts together and then again from the prefix cache."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        skip_tokenizer_init=True,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        kv_cache_dtype=DTYPE,
        attention_backend="QUANTPRESS",
        kv_cache_memory_bytes=32 << 20,
        max_model_len=1024,
        max_num_batched_tokens=200,
        max_num_seqs=4,
        dtype="float32",
        **target.OPTIONS,
    )
    greedy = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True, detokenize=False, logprobs=0)
    found = []
    for _ in range(2):
        for one in llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False):
            made = one.outputs[0]
            there = list(made.token_ids)
            sums = [made.logprobs[i][token].logprob for i, token in enumerate(there)]
            found.append({"tokens": there, "logprobs": sums, "cached": [one.num_cached_tokens]})
    return found


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here")
@pytest.mark.skipif(target.ON_GPU and torch.cuda.device_count() < 2, reason="each rank needs a GPU")
@pytest.mark.multi_gpu
def test_each_rank_packs_its_own_heads(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", seed=3)
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "tests").symlink_to(Path(__file__).parents[2])  # and not kernels/ beside it
    prompts = [tokens(count) for count in LENGTHS]
    settings = target.ENVIRONMENT | {
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # CUDA may be in use already
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(tmp_path / "path"), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }
    done = subprocess.run(
        [sys.executable, "-P", __file__, str(folder), json.dumps(prompts), str(tmp_path / "found.json")],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert not done.returncode, done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    truth = Truth(folder)
    for prompt, one in zip(prompts * 2, found, strict=True):
        rows = truth.log_probabilities(prompt, one["tokens"])
        ours = rows[range(NEW), one["tokens"]]
        assert (ours - torch.tensor(one["logprobs"])).abs().max() < TOLERANCE
        assert (rows.amax(-1) - ours).max() < TOLERANCE
    assert [one["cached"][0] for one in found[len(prompts) :]] == [256, 0, 0]


if __name__ in ("__main__", "__mp_main__"):  # the engine, and the ranks that it spawns
    from quantpress.engines.vllm import register

    register()
    register_lossless()

if __name__ == "__main__":
    model, asked, path = sys.argv[1:]
    Path(path).write_text(json.dumps(answers(model, json.loads(asked))))
