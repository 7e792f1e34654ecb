"""Run under torchrun on GPUs: steps of processes that share a model, with and without graphs."""

import faulthandler
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from quantpress import enable
from quantpress.cache import continue_inputs
from quantpress.cache.ranks import ranks_of
from quantpress.pipelines.capture.captured import captured_decoding
from quantpress.presses import TurboQuant
from tests.gpu.test_second_gpu import NEW_TOKENS, PRESSES, read
from tests.ranks.programs import load
from tests.tiny_models import prompt

HANG = 240  # seconds; a process that waits for another one in vain ends then


def tokens(model: PreTrainedModel, press: Any, cuda_graph: bool | None) -> tuple[list[int], int, int]:
    """Greedy tokens after a context, captures and replays."""
    cache = read(model, press)
    inputs = continue_inputs(cache, prompt(7, seed=3).to(model.device))
    with captured_decoding(model, new_tokens=NEW_TOKENS, cuda_graph=cuda_graph) as steps:
        ids = model.generate(**inputs, past_key_values=cache, max_new_tokens=NEW_TOKENS, do_sample=False)
    for layer in model.model.layers:
        vars(layer.self_attn).pop("masked_key_indices", None)
    return ids[0].tolist(), steps.captures, steps.replays


def found(model: PreTrainedModel) -> dict[str, Any]:
    """For each press, tokens with and without graphs; and those of an enabled model."""
    result: dict[str, Any] = {}
    for name, press in PRESSES.items():
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            result[name] = tokens(model, press(), None), tokens(model, press(), False)
        result[f"{name}, said"] = [str(one.message) for one in said if "CUDA graph" in str(one.message)]
    ids = prompt(700, seed=2).to(model.device)
    with enable(model, TurboQuant(bits=4), cuda_graph=True):
        sampled = model.generate(ids, max_new_tokens=40, do_sample=True, temperature=1.5)
    return {**result, "enabled": sampled[0].tolist()}


if __name__ == "__main__":
    faulthandler.dump_traceback_later(HANG, exit=True)
    folder = Path(sys.argv[1])
    model = load(folder, "llama", tp_plan="auto", dtype=torch.bfloat16)
    ranks = ranks_of(model)
    assert ranks is not None
    torch.save(found(model), folder / f"captured by {ranks.index}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
