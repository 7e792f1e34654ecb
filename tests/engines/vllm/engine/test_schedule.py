"""What the scheduler does to requests: chunks, prefixes, mixed steps, waiting, aborts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.vllm.engine.running import BLOCK, CHUNK, Engine, engine, sampling_params
from tests.engines.vllm.engine.tiny import Truth, tokens


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Engine]:
    with engine(folder) as made:
        yield made


def test_a_long_prompt_is_read_in_chunks(running: Engine, truth: Truth) -> None:
    prompt, begin = tokens(2 * CHUNK + 55), len(running.steps)
    (answer,) = running.generate(prompt)
    truth.check(prompt, answer.outputs[0])
    assert running.work(begin) == [[CHUNK], [CHUNK], [55], *[[1]] * 7]


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 256, 257])
def test_prompts_about_as_long_as_a_block(running: Engine, truth: Truth, length: int) -> None:
    prompt = tokens(length)
    (answer,) = running.generate(prompt)
    truth.check(prompt, answer.outputs[0])


def test_an_answer_over_several_blocks(running: Engine, truth: Truth) -> None:
    prompt = tokens(100)
    (answer,) = running.generate(prompt, new=450)
    truth.check(prompt, answer.outputs[0])


def test_a_prefix_is_read_once(running: Engine, truth: Truth) -> None:
    running.forget()
    first = tokens(400)
    second, third = first[: 2 * BLOCK] + tokens(70), first[: 2 * BLOCK]
    for prompt, reused in [(first, 0), (second, 2 * BLOCK), (first, 3 * BLOCK), (third, BLOCK)]:
        (answer,) = running.generate(prompt)
        truth.check(prompt, answer.outputs[0])
        assert answer.num_cached_tokens == reused


def test_a_prefix_that_was_generated(running: Engine, truth: Truth) -> None:
    """The block was filled one token at a time, and the next request begins with it."""
    prompt = tokens(100)
    (answer,) = running.generate(prompt, new=60)
    longer = prompt + list(answer.outputs[0].token_ids) + tokens(10)
    (answer,) = running.generate(longer)
    truth.check(longer, answer.outputs[0])
    assert answer.num_cached_tokens == BLOCK


def test_a_block_that_was_filled_in_the_step_before(running: Engine, truth: Truth) -> None:
    """A second request takes it over while the first one is still running."""
    running.forget()
    first = tokens(BLOCK + 30)
    second = first[:BLOCK] + tokens(40)
    engine = running.llm.llm_engine
    done = {}
    engine.add_request("first", {"prompt_token_ids": first}, sampling_params(8))
    engine.step()
    engine.add_request("second", {"prompt_token_ids": second}, sampling_params(8))
    while engine.has_unfinished_requests():
        done |= {answer.request_id: answer for answer in engine.step() if answer.finished}
    truth.check(first, done["first"].outputs[0])
    truth.check(second, done["second"].outputs[0])
    assert done["second"].num_cached_tokens == BLOCK


def test_a_block_that_is_filled_in_the_same_step(running: Engine, truth: Truth) -> None:
    """vLLM plans as if a block was computed already when it plans the step that computes it."""
    running.forget()
    prompt, begin = tokens(BLOCK + 20), len(running.steps)
    for answer in running.generate(prompt, prompt):
        truth.check(prompt, answer.outputs[0])
    assert running.work(begin)[0] == [BLOCK + 20, 20]


def test_more_requests_than_slots_of_every_length(running: Engine, truth: Truth) -> None:
    """Prompts are read while others answer, in the same steps."""
    prompts, begin = [tokens(random.randrange(1, 600)) for _ in range(11)], len(running.steps)
    for prompt, answer in zip(prompts, running.generate(*prompts, new=20), strict=True):
        truth.check(prompt, answer.outputs[0])
    work = running.work(begin)
    assert max(map(len, work)) == 4
    assert any(min(step) == 1 and max(step) > 1 for step in work), "no step was mixed"


def test_several_outputs_of_a_prompt(running: Engine, truth: Truth) -> None:
    """They share the blocks of the prompt, and go different ways."""
    prompt = tokens(300)
    (answer,) = running.generate(prompt, new=40, n=3, temperature=1.0)
    assert len({tuple(one.token_ids) for one in answer.outputs}) == 3
    for one in answer.outputs:
        truth.check(prompt, one, greedy=False)


def test_blocks_of_an_aborted_request_are_used_again(running: Engine, truth: Truth) -> None:
    running.forget()
    engine = running.llm.llm_engine
    for turn in range(3):
        for name in range(4):
            engine.add_request(f"{turn} {name}", {"prompt_token_ids": tokens(350)}, sampling_params(50))
        for _ in range(random.randrange(1, 12)):
            engine.step()
        engine.abort_request([f"{turn} {name}" for name in range(4)])
        prompts = [tokens(random.randrange(200, 500)) for _ in range(4)]
        for prompt, answer in zip(prompts, running.generate(*prompts), strict=True):
            truth.check(prompt, answer.outputs[0])


def test_requests_are_aborted_beside_others(running: Engine, truth: Truth) -> None:
    running.forget()
    engine, first = running.llm.llm_engine, tokens(400)
    for steps in range(1, 8):
        for prompt, reused in [(first[: 2 * BLOCK] + tokens(70), 0), (first, 2 * BLOCK), (first, 3 * BLOCK)]:
            engine.add_request("aborted", {"prompt_token_ids": tokens(350)}, sampling_params(50))
            engine.step()
            engine.step()
            engine.add_request("other", {"prompt_token_ids": prompt}, sampling_params(12))
            for _ in range(steps):
                engine.step()
            engine.abort_request(["aborted"])
            done: list[Any] = []
            while engine.has_unfinished_requests():
                done = engine.step()
            truth.check(prompt, done[0].outputs[0])
            assert done[0].num_cached_tokens >= reused
