"""Run by `test_steps.py` in Triton's interpreter: prints relative errors."""

import json

import torch

from quantpress.kernels.attend import Visibility
from quantpress.kernels.attend.triton_attend import attend_triton, supports
from tests.cache.paged.paging import dense, exact, random_states, relative_error, small


def errors(queries: int, order: list[int], bits: tuple[float, float]) -> list[float]:
    """Sequences with and without pages, against float64 attention on the decoded tokens."""
    paged = small(64, bits=bits, recent_tokens=20, max_sequences=3, num_blocks=9)
    for tokens in (160, 5, 290):
        paged.add(*random_states(paged, tokens=tokens))
    plan = paged.plan(order)
    query = torch.randn(plan.batch, paged.query_heads, queries, 64)
    segments = paged.pool.segments(plan, 0)
    visibility = Visibility(queries, sum(segment.tokens for segment in segments))
    assert supports(query, segments, visibility), "not covered"
    got = attend_triton(query, segments, visibility, scaling=0.125, slots=plan.chosen, plain=True)
    return [relative_error(got[i], exact(query[i], *dense(paged, s))) for i, s in enumerate(order)]


if __name__ == "__main__":
    print(json.dumps(errors(3, [2, 1], (4, 3)) + errors(1, [1, 2], (3.5, 2.5))))
