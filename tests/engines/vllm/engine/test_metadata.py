"""What vLLM's second model runner hands to the builder for a full CUDA graph, made by hand on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.engines.vllm.engine.lossless import DTYPE, register_lossless
from tests.engines.vllm.engine.running import BLOCK

DIM, HEADS, KV_HEADS, BLOCKS, PAGES, MOST = 64, 4, 2, 12, 5, 6
DRAFTS = 3
NAN = float("nan")
SPEC: Any = SimpleNamespace(num_kv_heads=KV_HEADS)


@pytest.fixture(params=[(0, "LHBNC"), (DRAFTS, "LHBNC"), (DRAFTS, "LBHNC")], ids=str)
def config(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`VllmConfig` of an engine with or without speculation, and with a layout of its cache."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs

    register_lossless()
    monkeypatch.setattr(Tensor, "pin_memory", lambda states: states)  # there is no GPU to pin it for
    options: dict[str, Any] = {}
    drafts, layout = request.param
    if drafts:
        speculation = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 3}
        options["speculative_config"] = speculation
    made = EngineArgs(
        str(folder),
        skip_tokenizer_init=True,
        kv_cache_dtype=DTYPE,
        max_num_seqs=MOST,
        dtype="float32",
        enforce_eager=True,
        **options,
    ).create_engine_config()
    made.cache_config.num_gpu_blocks, made.cache_config.kv_cache_layout = BLOCKS, layout
    with set_current_vllm_config(made):
        yield made


class Layer:
    """A layer of vLLM and the builder of its metadata, and the raw tokens of each running request."""

    def __init__(self, config: Any) -> None:
        from quantpress.engines.vllm.backend import QuantpressImpl
        from quantpress.engines.vllm.builder import QuantpressBuilder

        self.q = 1 + (config.speculative_config.num_speculative_tokens if config.speculative_config else 0)
        self.impl = QuantpressImpl(HEADS, DIM, DIM**-0.5, KV_HEADS, kv_cache_dtype=DTYPE)
        self.builder = QuantpressBuilder(SPEC, ["layer"], config, torch.device("cpu"))
        width = self.impl.store.settings.layout.token_bytes
        lead = (KV_HEADS, BLOCKS) if config.cache_config.kv_cache_layout == "LHBNC" else (BLOCKS, KV_HEADS)
        self.cache = torch.zeros(*lead, BLOCK, width, dtype=torch.uint8)
        self.cache = self.cache if lead[0] == BLOCKS else self.cache.transpose(0, 1)
        self.raw: dict[int, list[Tensor]] = {}

    def step(self, rows: list[tuple[int, list[int], int]], padded: int, capture: bool = False) -> Tensor:
        """One step of (row of the running request, its blocks, new tokens), padded to so many requests.

        Returns:
            Output [T, HEADS, DIM], padding included.
        """
        common, states = self.asked(rows, padded, capture)
        builder = self.builder
        metadata = builder.build_for_cudagraph_capture(common) if capture else builder.build(0, common)
        query, key, value = states.split([HEADS, KV_HEADS, KV_HEADS], 1)
        layer = SimpleNamespace(layer_name="model.layers.0.self_attn.attn")
        output = torch.full_like(query, NAN)
        self.impl.forward(layer, query, key, value, self.cache, metadata, output)
        return output

    def asked(self, rows: list[tuple[int, list[int], int]], padded: int, capture: bool) -> tuple[Any, Tensor]:
        """`CommonAttentionMetadata` of a step, and its states [T, HEADS + 2 * KV_HEADS, DIM]."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        counts = [count for _, _, count in rows]
        starts = torch.tensor([0, *counts, *[0] * (padded - len(rows))]).cumsum(0).int()
        tokens = max(int(starts[-1]), padded * self.q if padded > len(rows) else 0)
        states = torch.full((tokens, HEADS + 2 * KV_HEADS, DIM), NAN)  # padding holds anything
        states[: starts[-1]] = torch.randn(int(starts[-1]), *states.shape[1:])
        lengths, table = torch.zeros(padded, dtype=torch.int32), torch.zeros(padded, PAGES, dtype=torch.int32)
        for row, (request, blocks, _) in enumerate(rows):
            if not capture:
                self.raw.setdefault(request, []).append(states[starts[row] : starts[row + 1]])
            lengths[row] = sum(map(len, self.raw[request])) if not capture else counts[row]
            table[row, : len(blocks)] = torch.tensor(blocks)
        common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=padded,
            num_actual_tokens=tokens,
            max_query_len=max(counts),
            max_seq_len=int(lengths.max()),
            block_table_tensor=table,
            slot_mapping=torch.full((tokens,), -1),
            req_idx=np.array([request for request, _, _ in rows], dtype=np.int32),
        )
        return common, states

    def expected(self, request: int, count: int) -> Tensor:
        """Attention of the last `count` tokens of a request from its raw tokens."""
        query, key, value = torch.cat(self.raw[request]).split([HEADS, KV_HEADS, KV_HEADS], 1)
        key, value = (x.repeat_interleave(HEADS // KV_HEADS, 1).transpose(0, 1) for x in (key, value))
        seen = torch.ones(count, key.shape[1], dtype=torch.bool).tril(key.shape[1] - count)
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query[-count:].transpose(0, 1), key, value, attn_mask=seen).transpose(0, 1)

    def copied(self) -> Layer:
        """Another layer in the same state."""
        one = copy.copy(self)
        one.raw = {request: list(parts) for request, parts in self.raw.items()}
        one.impl, one.builder, one.cache = copy.copy(self.impl), copy.copy(self.builder), self.cache.clone()
        one.impl.store = copy.deepcopy(self.impl.store)
        one.builder._planner = copy.deepcopy(self.builder._planner)
        return one

    def held(self) -> list[Tensor]:
        """All that a step may change, without what is nobody's."""
        state, store = self.builder._planner.state.maps, self.impl.store
        maps = [state.page_of, state.block_of, state.entry_of, state.first_of]
        return [*store.recent, *store.sinks, self.cache, *(one[:-1] for one in maps)]


FIRST, SECOND = (2, [3, 4, 5]), (0, [6, 7, 8])


def begun(config: Any) -> Layer:
    """Two requests, in rows 2 and 0 of the running ones, of which the second is about to fill a block."""
    layer = Layer(config)
    for (request, blocks), count in ((FIRST, 300), (SECOND, 2 * BLOCK - layer.q)):
        output = layer.step([(request, blocks, count)], padded=1)
        torch.testing.assert_close(output, layer.expected(request, count))
    return layer


@pytest.mark.parametrize("padded", [3, 4, MOST])
def test_padding_of_a_graph_writes_nothing(config: Any, padded: int) -> None:
    """The step with padding leaves what the step without it leaves."""
    layer = begun(config)
    plain = layer.copied()
    work = [(*FIRST, layer.q), (*SECOND, layer.q)]
    for _ in range(3):
        seed = torch.get_rng_state()
        outputs = layer.step(work, padded)
        torch.set_rng_state(seed)
        alone = plain.step(work, len(work))
        for row, (request, _, count) in enumerate(work):
            found = outputs[row * layer.q : (row + 1) * layer.q]
            torch.testing.assert_close(found, layer.expected(request, count))
            assert torch.equal(found, alone[row * layer.q : (row + 1) * layer.q])
        for one, other in zip(layer.held(), plain.held(), strict=True):
            assert torch.equal(one, other)
    assert not layer.cache[0].any(), "the null block"


def test_rows_of_padding_belong_to_nobody(config: Any) -> None:
    """`req_idx` is as long as the batch without padding, or -1 there."""
    layer = begun(config)
    common = SimpleNamespace(num_reqs=4, req_idx=np.array([2, 0, -1], dtype=np.int32))
    assert layer.builder._slots_in(common).tolist() == [2, 0, MOST, MOST]
    draft = SimpleNamespace(num_reqs=3, req_idx=None)
    assert layer.builder._slots_in(draft) is None  # on a CPU


def test_a_capture_writes_nothing(config: Any) -> None:
    """vLLM captures with requests whose blocks are all the null block, in rows of running ones."""
    layer = begun(config)
    before = [states.clone() for states in layer.held()]
    layer.step([(request, [], layer.q) for request in range(4)], padded=4, capture=True)
    for one, other in zip(layer.held(), before, strict=True):
        assert torch.equal(one, other)
    work = [(*FIRST, layer.q), (*SECOND, layer.q)]
    outputs = layer.step(work, padded=4)
    for row, (request, _, count) in enumerate(work):
        found = outputs[row * layer.q : (row + 1) * layer.q]
        torch.testing.assert_close(found, layer.expected(request, count))


def test_builders_of_a_step_share_its_plan(config: Any) -> None:
    """Once: vLLM changes what it asked for in place, and asks again, where it drafts."""
    from quantpress.engines.vllm.builder import QuantpressBuilder

    layer = begun(config)
    other = QuantpressBuilder(SPEC, ["other"], config, torch.device("cpu"))
    common, _ = layer.asked([(*FIRST, layer.q)], padded=1, capture=False)
    made = layer.builder.build(0, common)
    assert other.build(0, common) is made
    again = other.build(0, common)
    assert again is not made and other._planner is layer.builder._planner
    assert layer.builder.build(0, common) is again
    wider = QuantpressBuilder(
        SimpleNamespace(num_kv_heads=2 * KV_HEADS), ["draft"], config, torch.device("cpu")
    )
    assert wider.build(0, common) is not again and wider._planner is not other._planner
