"""What one step of the engine writes and reads, for all layers.

A step holds requests of two kinds. *Decodes* have up to a fixed number of new tokens each; everything about
them is worked out on the device, into tensors with fixed addresses, so that a CUDA graph may replay the
layers. *Prefills* are longer pieces of prompts, whose lengths the host knows.

Of the n tokens of a request, those in [0, sinks) are read from its sink entry, those in [sinks, packed) from
packed blocks, and those in [packed, n) from recent pages. A block is packed in the step that fills it,
because another request may read it in that step or in the next one.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from quantpress.engines.vllm.block_state import BlockState
from quantpress.kernels.attend.schedule import PageSchedule, page_schedule
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.kernels.steps import StepBuffers, StepRequests, plan_decodes
from quantpress.kernels.steps.operands import NEWEST

STEPS = 1 << 31
"""Steps are counted in int32; after so many, the least recently read sink entry is not found once."""


@dataclass(frozen=True)
class StepBatch:
    """The requests of a step, decodes first.

    Args:
        starts: [R + 1] int32 on the device, first token of each request in the batch.
        lengths: [R] int32 on the device, tokens of each request with this step's; 0 for padding.
        block_table: [R, P] int32 on the device.
        slots: [R] int64 on the device, the row of each request in the engine; None: not known (on a CPU).
        decodes: number of decodes.
        queries: most new tokens of a decode.
        host_starts: [R + 1] list, `starts` on the host.
        host_lengths: [R] list, `lengths` on the host: exact for prefills and for requests whose prompt is not
            yet read, else an upper bound.
        uniform: whether request r < decodes has tokens [r * queries, (r + 1) * queries) of the batch.
    """

    starts: Tensor
    lengths: Tensor
    block_table: Tensor
    slots: Tensor | None
    decodes: int
    queries: int
    host_starts: list[int]
    host_lengths: list[int]
    uniform: bool

    @property
    def requests(self) -> int:
        return self.lengths.shape[0]

    def before(self, row: int) -> int:
        """Tokens of a prefill before this step."""
        return self.host_lengths[row] - (self.host_starts[row + 1] - self.host_starts[row])


@dataclass(eq=False)
class DecodePlan:
    """Decodes, R requests of up to q tokens; T tokens of the batch, in R * q rows of attention.

    Args:
        queries: q.
        tokens: [R * q] int64, the batch's token of each row; None: the first R * q tokens in order.
        rows: [T] int64, the row of each token; None: in order.
        table: [R, Hkv, P] int32, rows of the pool of pages.
        packed_starts, packed_lengths: [R, Hkv] int32, tokens read from pages.
        schedule: how attention divides the pages among programs; None where its kernels do not run.
        sink_table: [R, 1] int32; sink_lengths: [R, Hkv] int32, tokens read from sink entries.
        recent_table: [R, 2] int32; recent_lengths: [R, Hkv] int32, tokens read from recent pages.
        recent_rows: [T] int32, where new tokens go in recent pages, page * 128 + offset; -1: nowhere.
        sink_rows: [T] int32, the same in sink entries, entry * sinks + offset.
        full_pages, full_blocks: [R] int32, recent page and block of a block that this step fills; -1: none.
    """

    queries: int
    tokens: Tensor | None
    rows: Tensor | None
    table: Tensor
    packed_starts: Tensor
    packed_lengths: Tensor
    schedule: PageSchedule | None
    sink_table: Tensor
    sink_lengths: Tensor
    recent_table: Tensor
    recent_lengths: Tensor
    recent_rows: Tensor
    sink_rows: Tensor
    full_pages: Tensor
    full_blocks: Tensor

    @property
    def requests(self) -> int:
        return self.table.shape[0]


@dataclass(eq=False)
class PrefillRequest:
    """A piece of a prompt.

    Args:
        begin: its first token in the batch.
        tokens: its length, m.
        before: tokens of the request before it, n.
        blocks: [n // 128] int32, its full blocks.
        table: [1, Hkv, n // 128] int32, rows of the pool of pages.
        packed_starts, packed_lengths: [1, Hkv] int32, tokens read from pages.
        sink_table: [1, 1] int32; sink_lengths: [1, Hkv] int32.
        recent_page: [1] int64, the recent page of the block that is partly filled; None: n is a multiple of
            128.
    """

    begin: int
    tokens: int
    before: int
    blocks: Tensor
    table: Tensor
    packed_starts: Tensor
    packed_lengths: Tensor
    sink_table: Tensor
    sink_lengths: Tensor
    recent_page: Tensor | None


@dataclass(eq=False)
class PrefillPlan:
    """Prefills, Tp tokens that follow those of the decodes.

    Args:
        begin: the first of these tokens in the batch.
        requests: one each.
        early_rows: [Tp] int32, where tokens of partly filled blocks go in recent pages, or -1.
        late_rows: [Tp] int32, the same for tokens of blocks that begin in this step; written after packing.
        sink_rows: [Tp] int32.
        resumed_pages, resumed_blocks: [n] int32, recent pages and blocks that were partly filled and now are
            full.
        whole_tokens, whole_blocks: [n] int32, first token (from `begin` on) and block of blocks that lie in
            this step.
    """

    begin: int
    requests: list[PrefillRequest]
    early_rows: Tensor
    late_rows: Tensor
    sink_rows: Tensor
    resumed_pages: Tensor
    resumed_blocks: Tensor
    whole_tokens: Tensor
    whole_blocks: Tensor


@dataclass(eq=False)
class StepPlan:
    """A step; either part may be missing.

    Args:
        decodes: the decodes.
        prefills: the prefills.
        packed: whether an earlier step may have packed a block, as far as the host knows; layers that a CUDA
            graph replays do not see those steps.
    """

    decodes: DecodePlan | None
    prefills: PrefillPlan | None
    packed: bool


class StepPlanner:
    """Makes the plan of each step.

    Args:
        state: of the blocks; changed by every step.
        kv_heads: Hkv.
        pages: P, the width of vLLM's block table.
        steps: rows of each layer's pool of pages from block to block, and from head to head.
    """

    def __init__(self, state: BlockState, kv_heads: int, pages: int, steps: tuple[int, int]) -> None:
        self.state, self.kv_heads, self.sinks, self.steps = state, kv_heads, state.maps.sinks, steps
        self._buffers = StepBuffers(state.capacity.requests, kv_heads, pages, state.device, steps)
        self._schedules: dict[int, PageSchedule | None] = {}
        self._packed = False

    def plan(self, batch: StepBatch) -> StepPlan:
        """The plan of a step; the state of the blocks is then the one after it."""
        state, table = self.state, batch.block_table
        state.step = (state.step + 1) % STEPS
        counts = [end - start for start, end in pairwise(batch.host_starts)]
        new = [row for row, count in enumerate(counts) if 0 < count == batch.host_lengths[row]]
        prefills = list(range(batch.decodes, batch.requests))
        resumed = self._resumed(batch, prefills)
        for row in prefills:
            state.end(table[row, _pages(batch.before(row)) : _pages(batch.host_lengths[row])].long())
        if new:
            first = table[:, 0].long()
            state.new_entries(first.index_select(0, _on(new, state.device)), first)
        requests = self._requests(batch, counts)
        written = None
        if batch.slots is None:
            state.hold(resumed.values())
            written = state.take_pages(requests)
        written = plan_decodes(state.maps, requests, self._buffers, written)
        decodes = self._decodes(batch, requests) if batch.decodes else None
        pieces = self._prefills(batch, prefills, resumed, written) if prefills else None
        packed, self._packed = self._packed, self._packed or max(batch.host_lengths, default=0) >= PAGE_TOKENS
        return StepPlan(decodes, pieces, packed)

    def _resumed(self, batch: StepBatch, prefills: list[int]) -> dict[int, Tensor]:
        """[1] int64, the recent page of the partly filled block of each prefill that has one."""
        blocks = {
            row: batch.before(row) // PAGE_TOKENS for row in prefills if batch.before(row) % PAGE_TOKENS
        }
        table = batch.block_table
        return {row: self.state.maps.pages(table[row, block].long().view(1)) for row, block in blocks.items()}

    def _requests(self, batch: StepBatch, counts: list[int]) -> StepRequests:
        rows = None
        if not batch.uniform:  # a request with fewer than q tokens has the last of its rows
            q = batch.queries
            used = [row * q + i for row in range(batch.decodes) for i in range(q - counts[row], q)]
            rows = _on(used, self.state.device)
        return StepRequests(
            batch.starts,
            batch.lengths,
            batch.block_table,
            batch.slots,
            batch.decodes,
            batch.queries,
            self.state.step,
            batch.uniform,
            rows,
        )

    def _decodes(self, batch: StepBatch, requests: StepRequests) -> DecodePlan:
        rows, q, buffers = batch.decodes, batch.queries, self._buffers
        tokens = None
        if requests.rows is not None:  # what is computed for other rows, which repeat a token, is thrown away
            starts = batch.starts[: rows + 1].long()
            ahead = torch.arange(-q, 0, device=starts.device)
            tokens = torch.maximum(starts[1:].unsqueeze(1) + ahead, starts[:-1].unsqueeze(1)).flatten()
        recent_rows, sink_rows = buffers.of_tokens(rows * q if requests.rows is None else len(requests.rows))
        return DecodePlan(
            queries=q,
            tokens=tokens,
            rows=requests.rows,
            table=buffers.table[:rows, :, : self._pages_read(batch)],
            packed_starts=buffers.packed_starts[:rows],
            packed_lengths=buffers.packed_lengths[:rows],
            schedule=self._schedule(rows),
            sink_table=buffers.sink_table[:rows],
            sink_lengths=buffers.sink_lengths[:rows],
            recent_table=buffers.recent_table[:rows],
            recent_lengths=buffers.recent_lengths[:rows],
            recent_rows=recent_rows,
            sink_rows=sink_rows,
            full_pages=buffers.full_pages[:rows],
            full_blocks=buffers.full_blocks[:rows],
        )

    def _pages_read(self, batch: StepBatch) -> int:
        """Pages of the page table that attention is given: all where a graph would keep the number."""
        if self.state.device.type != "cpu":
            return self._buffers.table.shape[2]
        return max(1, max(batch.host_lengths[: batch.decodes]) // PAGE_TOKENS)

    def _schedule(self, rows: int) -> PageSchedule | None:
        buffers = self._buffers
        made = page_schedule(
            buffers.packed_lengths[:rows],
            buffers.table[:rows],
            buffers.packed_starts[:rows],
            out=self._schedules.get(rows),
        )
        return self._schedules.setdefault(rows, made)

    def _prefills(
        self, batch: StepBatch, prefills: list[int], resumed: dict[int, Tensor], written: Tensor
    ) -> PrefillPlan:
        begin, device = batch.host_starts[batch.decodes], self.state.device
        rows = torch.tensor(prefills, dtype=torch.int64)
        entries = self.state.maps.entries(batch.block_table[batch.decodes :, 0].long())
        of_token: list[Tensor] = []  # request, position, and first position of the request, of each token
        for row in prefills:
            count, before = batch.host_starts[row + 1] - batch.host_starts[row], batch.before(row)
            position = torch.arange(before, before + count)
            of_token.append(
                torch.stack(
                    (
                        torch.full_like(position, row),
                        position,
                        torch.full_like(position, before),
                        torch.full_like(position, before + count),
                    )
                )
            )
        row, position, before, length = torch.cat(of_token, 1).to(device, non_blocking=True)
        number, last = position // PAGE_TOKENS, (length - 1) // PAGE_TOKENS
        resumes = number * PAGE_TOKENS < before
        newest = (number - last + NEWEST - 1).clamp(min=-1)
        page = written[row].gather(1, newest.clamp(min=0).unsqueeze(1)).squeeze(1).where(newest >= 0, -1)
        late = (page * PAGE_TOKENS + position % PAGE_TOKENS).where((page >= 0) & ~resumes, -1)
        held = torch.full((batch.requests,), -1, dtype=torch.int64, device=device)
        for number_of_row, found in resumed.items():
            held[number_of_row] = found[0]
        early = (held[row] * PAGE_TOKENS + position % PAGE_TOKENS).where(resumes & (held[row] >= 0), -1)
        entry = entries[row - batch.decodes]
        sink = (entry * self.sinks + position).where((position < self.sinks) & (entry >= 0), -1)
        pages, blocks, firsts, wholes = [], [], [], []
        for one in prefills:
            was, now = batch.before(one), batch.host_lengths[one]
            if was % PAGE_TOKENS and now // PAGE_TOKENS > was // PAGE_TOKENS:
                pages.append(resumed[one])
                blocks.append(batch.block_table[one, was // PAGE_TOKENS].view(1))
            whole = range(-(-was // PAGE_TOKENS), now // PAGE_TOKENS)
            firsts += [batch.host_starts[one] - begin + block * PAGE_TOKENS - was for block in whole]
            wholes.append(batch.block_table[one, whole.start : max(whole.stop, whole.start)])
        none = torch.empty(0, dtype=torch.int32, device=device)
        return PrefillPlan(
            begin=begin,
            requests=[
                self._request(batch, one, entries[one - batch.decodes], resumed.get(one))
                for one in rows.tolist()
            ],
            early_rows=early.to(torch.int32),
            late_rows=late.to(torch.int32),
            sink_rows=sink.to(torch.int32),
            resumed_pages=torch.cat([none, *pages]).to(torch.int32),
            resumed_blocks=torch.cat([none, *blocks]),
            whole_tokens=_on(firsts, device).to(torch.int32),
            whole_blocks=torch.cat([none, *wholes]),
        )

    def _request(self, batch: StepBatch, row: int, entry: Tensor, page: Tensor | None) -> PrefillRequest:
        before = batch.before(row)
        packed = before // PAGE_TOKENS * PAGE_TOKENS
        sinks = (entry >= 0).to(torch.int32) * (self.sinks if packed else 0)
        of_block, of_head = self.steps
        first = torch.arange(self.kv_heads, dtype=torch.int32, device=entry.device) * of_head
        lengths = sinks.view(1, 1).expand(1, self.kv_heads).contiguous()
        return PrefillRequest(
            begin=batch.host_starts[row],
            tokens=batch.host_starts[row + 1] - batch.host_starts[row],
            before=before,
            blocks=(blocks := batch.block_table[row, : packed // PAGE_TOKENS]),
            table=(blocks * of_block + first.unsqueeze(1)).unsqueeze(0),
            packed_starts=lengths,
            packed_lengths=packed - lengths,
            sink_table=entry.clamp(min=0).to(torch.int32).view(1, 1),
            sink_lengths=lengths,
            recent_page=page,
        )


def _pages(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS)


def _on(numbers: list[int], device: torch.device) -> Tensor:
    """[n] int64 on the device, which does not wait for it."""
    found = torch.tensor(numbers, dtype=torch.int64)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)
