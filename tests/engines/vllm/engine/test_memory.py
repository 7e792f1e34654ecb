"""A cache that is too small for its requests."""

from __future__ import annotations

import random
from pathlib import Path

from tests.engines.vllm.engine.running import engine
from tests.engines.vllm.engine.tiny import Truth, tokens


def test_requests_that_lost_their_blocks_begin_again(folder: Path, truth: Truth) -> None:
    with engine(folder, num_gpu_blocks_override=9) as running:
        prompts = [tokens(random.randrange(200, 255)) for _ in range(4)]
        for prompt, answer in zip(prompts, running.generate(*prompts, new=200), strict=True):
            truth.check(prompt, answer.outputs[0])
        assert running.preempted
