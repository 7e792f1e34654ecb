"""vLLM's scheduler, played: it gives out blocks and rows of running requests, finds prefixes, preempts.

Keys and values are stored by the lossless codec, and whatever vLLM frees is filled with NaN, the copies in
16 bits included. After each step, attention of every new token must be what torch computes from the raw ones.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantpress.codecs.raw import RawPages
from quantpress.engines.vllm.attention import Scores
from quantpress.engines.vllm.block_state import BlockState, Capacity
from quantpress.engines.vllm.layer_store import LayerStore, StoreSettings
from quantpress.engines.vllm.prompts import run_step
from quantpress.engines.vllm.step_plan import StepBatch, StepPlan, StepPlanner

BLOCK, DIM, QUERY_HEADS, KV_HEADS, SINKS = 128, 4, 2, 1, 4
BLOCKS, PAGES, REQUESTS, DRAFTS = 26, 8, 4, 3
CPU = torch.device("cpu")


def chain(before: bytes, token: int) -> bytes:
    """The identity of a token and of all before it."""
    return hashlib.blake2b(before + token.to_bytes(4, "little"), digest_size=8).digest()


def vectors(identity: bytes) -> Tensor:
    """Query heads, key and value of a token: [QUERY_HEADS + 2, DIM], from its identity alone."""
    generator = torch.Generator().manual_seed(int.from_bytes(identity[:7], "little"))
    return torch.randn(QUERY_HEADS + 2, DIM, generator=generator)


@dataclass
class Request:
    tokens: list[int]
    slot: int
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    identities: list[bytes] = field(default_factory=list)

    def identify(self, tokens: list[int], end: int) -> None:
        """Find the identities of this step's tokens, up to `end`."""
        del self.identities[self.computed :]
        for token in tokens[len(self.identities) : end]:
            self.identities.append(chain(self.identities[-1] if self.identities else b"", token))


class PlayedScheduler:
    """Requests over one layer's store.

    Args:
        with_slots: whether the plan is told the row of each running request, as on a GPU.
        requests: most requests at a time.
        entries: sink entries.
    """

    def __init__(
        self, with_slots: bool = True, requests: int = REQUESTS, entries: int = REQUESTS + 2
    ) -> None:
        self.with_slots, self.most = with_slots, requests
        codecs = RawPages(DIM, 32), RawPages(DIM, 32)
        capacity = Capacity(requests, entries)
        settings = StoreSettings(codecs, KV_HEADS, torch.float32, SINKS, capacity)
        self.store = LayerStore(settings, CPU)
        width = settings.layout.token_bytes
        self.cache = torch.full((KV_HEADS, BLOCKS, BLOCK, width), 0xFF, dtype=torch.uint8).transpose(0, 1)
        self.store.bind(self.cache)
        for pool in (*self.store.recent, *self.store.sinks):
            pool.fill_(float("nan"))
        self.state = BlockState(BLOCKS, capacity, SINKS, CPU)
        self.planner = StepPlanner(self.state, KV_HEADS, PAGES, (1, BLOCKS))
        self.running: list[Request] = []
        self.waiting: list[list[int]] = []
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, BLOCKS))
        self.users = [0] * BLOCKS
        self.cached: dict[bytes, int] = {}
        self.hash_of: dict[int, bytes] = {}
        self.states: dict[bytes, Tensor] = {}
        self.plan: StepPlan

    def take_block(self) -> int | None:
        if not self.free:
            return None
        block, _ = self.free.popitem(last=False)
        if block in self.hash_of:
            del self.cached[self.hash_of.pop(block)]
        self.poison(block)
        self.users[block] = 1
        return block

    def poison(self, block: int) -> None:
        self.cache[block] = 0xFF
        index = torch.tensor([block])
        page, entry = int(self.state.maps.pages(index)), int(self.state.maps.entries(index))
        for pool in self.store.recent:
            if page >= 0:
                pool[page] = float("nan")
        for pool in self.store.sinks:
            if entry >= 0:
                pool[entry] = float("nan")

    def release(self, request: Request) -> None:
        self.running.remove(request)
        for block in reversed(request.blocks):
            self.users[block] -= 1
            if not self.users[block]:
                self.free[block] = None
                if block not in self.hash_of:
                    self.free.move_to_end(block, last=False)
                    self.poison(block)

    def reserve(self, request: Request, tokens: int) -> bool:
        while len(request.blocks) * BLOCK < tokens:
            block = self.take_block()
            if block is None:
                return False
            request.blocks.append(block)
        return True

    def admit_waiting(self) -> None:
        while self.waiting and len(self.running) < self.most:
            tokens = self.waiting.pop(0)
            slots = sorted(set(range(self.most)) - {request.slot for request in self.running})
            request = Request(list(tokens), slots[len(tokens) % len(slots)])
            identity = b""
            for number in range((len(tokens) - 1) // BLOCK):
                for token in tokens[number * BLOCK : (number + 1) * BLOCK]:
                    identity = chain(identity, token)
                block = self.cached.get(identity)
                if block is None:
                    break
                self.users[block] += 1
                self.free.pop(block, None)
                request.blocks.append(block)
                request.computed += BLOCK
            self.running.append(request)

    def publish(self, request: Request, end: int) -> None:
        """Others may find full blocks, but for drafts, as soon as the step that fills them is planned."""
        for number in range(min(end, len(request.tokens)) // BLOCK):
            identity, block = request.identities[(number + 1) * BLOCK - 1], request.blocks[number]
            if identity not in self.cached and block not in self.hash_of:
                self.cached[identity], self.hash_of[block] = block, identity

    def run(self, scheduled: list[tuple[Request, list[int], int, int]], optimistic: bool) -> None:
        starts, lengths, states = [0], [], []
        table = torch.zeros(len(scheduled), PAGES, dtype=torch.int32)
        for row, (request, _, end, _) in enumerate(scheduled):
            states.append(torch.stack([vectors(one) for one in request.identities[request.computed : end]]))
            starts.append(starts[-1] + end - request.computed)
            lengths.append(end)
            table[row, : len(request.blocks)] = torch.tensor(request.blocks, dtype=torch.int32)
        counts = torch.tensor(starts).diff().tolist()
        decodes = sum(count <= 1 + DRAFTS for count in counts)
        queries = max(counts[:decodes], default=1)
        host = [
            end + (optimistic and row < decodes and count > 1 and count < end)
            for row, (end, count) in enumerate(zip(lengths, counts, strict=True))
        ]
        batch = StepBatch(
            starts=torch.tensor(starts, dtype=torch.int32),
            lengths=torch.tensor(lengths, dtype=torch.int32),
            block_table=table,
            slots=torch.tensor([one[0].slot for one in scheduled]) if self.with_slots else None,
            decodes=decodes,
            queries=queries,
            host_starts=starts,
            host_lengths=host,
            uniform=all(count == queries for count in counts[:decodes]),
        )
        self.plan = plan = self.planner.plan(batch)
        query, key, value = torch.cat(states).split([QUERY_HEADS, KV_HEADS, KV_HEADS], 1)
        output, scores = torch.full_like(query, float("nan")), Scores(DIM**-0.5, None)
        run_step(self.store, plan, (query, key, value), scores, output, starts[-1])
        for row, (request, _, end, keep) in enumerate(scheduled):
            part = slice(starts[row], starts[row + 1])
            self.check(request, query[part], output[part], end)
            self.advance(request, end, counts[row], keep)

    def check(self, request: Request, query: Tensor, output: Tensor, end: int) -> None:
        for identity in request.identities:
            if identity not in self.states:
                self.states[identity] = vectors(identity)[QUERY_HEADS:]
        key, value = torch.stack([self.states[one] for one in request.identities[:end]]).unbind(1)
        seen = torch.ones(len(query), end, dtype=torch.bool).tril(end - len(query))
        wanted = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(0, 1),
            key.expand(QUERY_HEADS, -1, -1),
            value.expand(QUERY_HEADS, -1, -1),
            attn_mask=seen,
        )
        torch.testing.assert_close(output, wanted.transpose(0, 1), atol=1e-5, rtol=1e-4)

    def advance(self, request: Request, end: int, count: int, keep: int) -> None:
        if end < len(request.tokens):
            request.computed = end
        else:
            drafted = end - len(request.tokens)
            tokens = request.tokens + [7_000_000 + i for i in range(min(keep, drafted))]
            request.computed = len(tokens)
            request.tokens = [*tokens, 5_000_000 + len(tokens)]
