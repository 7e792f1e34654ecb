"""An engine in this process: what it is asked, what its scheduler did, and NaN where it has not written."""

from __future__ import annotations

import functools
import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.engines.vllm.engine import target
from tests.engines.vllm.engine.lossless import DTYPE, register_lossless
from tests.engines.vllm.engine.poison import poison_blocks, poison_pools

BLOCK = 128
CHUNK = 200  # tokens in a step, no multiple of a block
OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "kv_cache_dtype": DTYPE,
    "attention_backend": "QUANTPRESS",
    "block_size": BLOCK,
    "kv_cache_memory_bytes": 64 << 20,
    "max_model_len": 1024,
    "max_num_batched_tokens": CHUNK,
    "max_num_seqs": 4,
    "dtype": "float32",
    "disable_log_stats": True,
} | target.OPTIONS


@functools.cache
def _override_kernels_once() -> None:
    """A second engine need not do it again, and cannot: vLLM looks at all modules and fails at numba."""
    from vllm.platforms import current_platform

    once = functools.cache(current_platform.register_triton_kernel_overrides)
    type(current_platform).register_triton_kernel_overrides = staticmethod(once)


class Engine:
    """vLLM's `LLM`, watched.

    Args:
        folder: of the model.
        options: of `LLM`, beside `OPTIONS`.
    """

    def __init__(self, folder: Path, **options: Any) -> None:
        from vllm import LLM

        from quantpress.engines.vllm import register

        register()  # where quantpress lies on the path and was never installed
        register_lossless()
        if not target.ON_GPU:
            _override_kernels_once()
        states = random.getstate(), torch.get_rng_state()
        self.llm = LLM(str(folder), **OPTIONS | options)
        random.setstate(states[0])  # vLLM has seeded both; a test keeps the seed of its own
        torch.set_rng_state(states[1])
        self.steps: list[Any] = []
        """`SchedulerOutput` of each step."""
        self.replayed: list[str] = []
        """Kinds of the CUDA graphs that were replayed."""
        self.preempted = 0
        """How often a request lost its blocks and had to begin again."""
        poison_pools(self.config)
        poison_blocks(self.config)
        self._watch()
        if target.ON_GPU:
            self._watch_graphs()

    @property
    def config(self) -> Any:
        """`VllmConfig`."""
        return self.llm.llm_engine.vllm_config

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def graphs(self) -> Any:
        """`CudaGraphManager` of vLLM's second model runner."""
        core = self.llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker.model_runner.cudagraph_manager

    def _watch(self) -> None:
        scheduler, pool = self.scheduler, self.scheduler.kv_cache_manager.block_pool
        schedule, preempt, new_blocks = scheduler.schedule, scheduler._preempt_request, pool.get_new_blocks

        def watched_schedule(*args: Any, **kwargs: Any) -> Any:
            self.steps.append(schedule(*args, **kwargs))
            return self.steps[-1]

        def watched_preempt(*args: Any, **kwargs: Any) -> Any:
            self.preempted += 1
            return preempt(*args, **kwargs)

        def poisoned_blocks(count: int) -> Any:
            blocks = new_blocks(count)
            poison_blocks(self.config, [block.block_id for block in blocks])
            return blocks

        scheduler.schedule, scheduler._preempt_request = watched_schedule, watched_preempt
        pool.get_new_blocks = poisoned_blocks

    def _watch_graphs(self) -> None:
        assert self.config.use_v2_model_runner and self.config.scheduler_config.async_scheduling
        self.generate([3, 4, 5])  # what vLLM sets up late

        def watch(name: str) -> None:
            replay = getattr(self.graphs, name)

            def watched(*args: Any, **kwargs: Any) -> Any:
                self.replayed.append(name)
                return replay(*args, **kwargs)

            setattr(self.graphs, name, watched)

        watch("run_fullgraph")
        watch("run_pw_graph")

    @contextmanager
    def without_graphs(self) -> Iterator[None]:
        """Every step runs layer by layer."""
        self.graphs._graphs_captured = False
        try:
            yield
        finally:
            self.graphs._graphs_captured = True

    def generate(self, *prompts: list[int], new: int = 8, lora: Any = None, **sampling: Any) -> list[Any]:
        """`RequestOutput` of each prompt; greedy, exactly `new` tokens, unless `sampling` says otherwise."""
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        return self.llm.generate(asked, sampling_params(new, **sampling), lora_request=lora, use_tqdm=False)

    def work(self, begin: int = 0) -> list[list[int]]:
        """How many tokens of each request each step computed, from step `begin` on."""
        done = (step.num_scheduled_tokens for step in self.steps[begin:])
        return [list(step.values()) for step in done if step]

    def forget(self) -> None:
        """Drop all prefixes, so that prompts are read again."""
        assert self.llm.reset_prefix_cache()


def sampling_params(new: int, **sampling: Any) -> Any:
    """Greedy, exactly `new` tokens, with the log-probability of each, unless `sampling` says otherwise."""
    from vllm import SamplingParams

    settings = {"max_tokens": new, "ignore_eos": True, "temperature": 0, "logprobs": 0, "detokenize": False}
    return SamplingParams(**settings | sampling)


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Engine]:
    """An engine that is taken down at the end, so that the next one can begin."""
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    made = None
    try:
        made = Engine(folder, **options)
        yield made
    finally:
        if made is not None:
            made.llm.llm_engine.engine_core.shutdown()
        del made
        gc.collect()
        cleanup_dist_env_and_memory()
        # PyTorch fails when graphs share a pool with graphs that are gone
        type(current_platform)._global_graph_pool = None
