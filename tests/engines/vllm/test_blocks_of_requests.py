"""Requests that come, go, share blocks and take back drafts, against the raw tokens of each.

The machine plays vLLM's scheduler: it gives out blocks and rows of running requests, finds prefixes,
preempts. Keys and values are stored by the lossless codec, and whatever vLLM frees is filled with NaN, the
copies in 16 bits included. After each step, attention of every new token must be what torch computes from
the raw tokens: nothing is lost or stale.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from torch import Tensor

from quantpress.codecs.raw import RawPages
from quantpress.engines.vllm.attention import Scores
from quantpress.engines.vllm.block_state import BlockState, Capacity
from quantpress.engines.vllm.layer_store import LayerStore, StoreSettings
from quantpress.engines.vllm.prompts import run_step
from quantpress.engines.vllm.step_plan import StepBatch, StepPlanner

BLOCK, DIM, QUERY_HEADS, KV_HEADS, SINKS = 128, 4, 2, 1, 4
BLOCKS, PAGES, REQUESTS, DRAFTS = 26, 8, 4, 3
MOST = BLOCK * PAGES - DRAFTS - 2
EXAMPLES = (
    100 if find_spec("vllm") else 8
)  # 100 steps each; the full number with the other tests of the engine
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


class Requests(RuleBasedStateMachine):
    with_slots = True

    @initialize()
    def start(self) -> None:
        codecs = RawPages(DIM, 32), RawPages(DIM, 32)
        capacity = Capacity(REQUESTS, REQUESTS + 2)
        settings_ = StoreSettings(codecs, KV_HEADS, torch.float32, SINKS, capacity)
        self.store = LayerStore(settings_, CPU)
        width = settings_.layout.token_bytes
        self.cache = torch.full((KV_HEADS, BLOCKS, BLOCK, width), 0xFF, dtype=torch.uint8).transpose(0, 1)
        self.store.bind(self.cache)
        for pool in (*self.store.recent, *self.store.sinks):
            pool.fill_(float("nan"))
        self.state = BlockState(BLOCKS, capacity, SINKS, CPU)
        self.planner = StepPlanner(self.state, KV_HEADS, PAGES)
        self.running: list[Request] = []
        self.waiting: list[list[int]] = []
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, BLOCKS))
        self.users = [0] * BLOCKS
        self.cached: dict[bytes, int] = {}
        self.hash_of: dict[int, bytes] = {}
        self.prompts: list[list[int]] = []
        self.states: dict[bytes, Tensor] = {}

    # vLLM's part

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
        while self.waiting and len(self.running) < REQUESTS:
            tokens = self.waiting.pop(0)
            slots = sorted(set(range(REQUESTS)) - {request.slot for request in self.running})
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

    # What happens

    @rule(
        length=st.integers(1, MOST - 200),
        kind=st.integers(0, 3),
        cut=st.integers(1, MOST),
        which=st.integers(0, 50),
    )
    def ask(self, length: int, kind: int, cut: int, which: int) -> None:
        """A prompt of its own, or one that begins as an earlier one does."""
        tokens = [which * 1000 + i for i in range(length)]
        if kind and self.prompts:
            shared = self.prompts[which % len(self.prompts)][: cut if kind > 1 else None]
            tokens = (shared + tokens)[: max(1, min(MOST - 200, len(shared) + length % 300))]
        self.prompts = [*self.prompts[-5:], tokens]
        self.waiting = [*self.waiting[-3:], tokens]

    @rule(which=st.integers(0, REQUESTS - 1), again=st.booleans())
    def stop(self, which: int, again: bool) -> None:
        """A request ends, is aborted, or is preempted to be computed again."""
        if which < len(self.running):
            request = self.running[which]
            self.prompts = [*self.prompts[-5:], request.tokens[: MOST - 200]]
            self.release(request)
            if again:
                self.waiting.insert(0, request.tokens)

    @rule(
        pieces=st.lists(st.integers(1, 400), min_size=REQUESTS, max_size=REQUESTS),
        drafts=st.lists(st.integers(0, DRAFTS), min_size=REQUESTS, max_size=REQUESTS),
        kept=st.lists(st.integers(0, DRAFTS), min_size=REQUESTS, max_size=REQUESTS),
        left_out=st.integers(0, 3 * REQUESTS),
        optimistic=st.booleans(),
    )
    def step(
        self, pieces: list[int], drafts: list[int], kept: list[int], left_out: int, optimistic: bool
    ) -> None:
        self.admit_waiting()
        scheduled: list[
            tuple[Request, list[int], int, int]
        ] = []  # request, its tokens, their end, drafts to keep
        row = -1
        while (row := row + 1) < len(self.running):
            request = self.running[row]
            if row == left_out:
                continue
            if len(request.tokens) >= MOST:
                self.release(request)
                row -= 1
                continue
            drafted = 0
            tokens, end = request.tokens, min(request.computed + pieces[row], len(request.tokens))
            if request.computed == len(tokens) - 1:
                drafted = drafts[row]
                tokens = tokens + [7_000_000 + i for i in range(drafted)]
                end = len(tokens)
            while not self.reserve(request, end):
                victim = self.running[-1]
                scheduled = [one for one in scheduled if one[0] is not victim]
                self.release(victim)
                self.waiting.insert(0, victim.tokens)
                if victim is request:
                    break
            if request in self.running:
                scheduled.append((request, tokens, end, min(kept[row], drafted)))
                request.identify(tokens, end)
                self.publish(request, end)
                if optimistic:
                    self.admit_waiting()
        if scheduled:
            self.run(sorted(scheduled, key=lambda one: one[2] - one[0].computed), optimistic)

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
        plan = self.planner.plan(batch)
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


class RequestsWithoutSlots(Requests):
    with_slots = False


_SETTINGS = settings(
    max_examples=EXAMPLES,
    stateful_step_count=100,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # to shrink what fails would take minutes
    suppress_health_check=list(HealthCheck),
)
TestRequests = Requests.TestCase
TestRequests.settings = _SETTINGS
TestRequestsWithoutSlots = RequestsWithoutSlots.TestCase
TestRequestsWithoutSlots.settings = _SETTINGS
