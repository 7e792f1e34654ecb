"""What one step of the engine writes and reads, for all layers.

A step holds requests of two kinds. *Decodes* have up to a fixed number of new tokens each; everything about them is
worked out on the device, into tensors with fixed addresses, so that a CUDA graph may replay the layers. *Prefills*
are longer pieces of prompts, whose lengths the host knows.

Tokens [0, sinks) of a request are read from its sink entry, [sinks, packed) from packed blocks and [packed, n) from
recent pages. A block is packed in the step that fills it, because another request may read it in the next one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantpress.engines.vllm.block_state import NULL_BLOCK, PAGES, BlockState
from quantpress.kernels.attend.schedule import PageSchedule, page_schedule
from quantpress.kernels.layout import PAGE_TOKENS

RECENT_TOKENS = 128
"""Least number of last tokens that are read in 16 bits, where their pages are still there."""


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
        host_lengths: [R] list, `lengths` on the host: exact for prefills and for requests whose prompt is not yet
            read, else an upper bound.
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
        table: [1, Hkv, ceil(n / 128)] int32, rows of the pool of pages.
        packed_starts, packed_lengths: [1, Hkv] int32, tokens read from pages.
        sink_table: [1, 1] int32; sink_lengths: [1, Hkv] int32.
        recent_page: [1] int64, the recent page of the block that is partly filled; None: n is a multiple of 128.
    """

    begin: int
    tokens: int
    before: int
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
        resumed_pages, resumed_blocks: [n] int32, recent pages and blocks that were partly filled and now are full.
        whole_tokens, whole_blocks: [n] int32, first token (from `begin` on) and block of blocks that lie in this step.
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
        packs: whether the step may pack a block, as far as the host knows.
    """

    decodes: DecodePlan | None
    prefills: PrefillPlan | None
    packs: bool


class StepPlanner:
    """Makes the plan of each step.

    Args:
        state: of the blocks; changed by every step.
        kv_heads: Hkv.
        pages: P, the width of vLLM's block table.
        sinks: tokens of a sink entry.
    """

    def __init__(self, state: BlockState, kv_heads: int, pages: int, sinks: int) -> None:
        self.state, self.kv_heads, self.sinks = state, kv_heads, sinks
        requests, device = state.capacity.requests, state.device

        def numbers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self._table = numbers(requests, kv_heads, pages)
        names = ("packed_starts", "packed_lengths", "sink_lengths", "recent_lengths")
        self._by_head = {name: numbers(requests, kv_heads) for name in names}
        self._by_request = {
            "sink_table": numbers(requests, 1),
            "recent_table": numbers(requests, PAGES),
            "full_pages": numbers(requests),
            "full_blocks": numbers(requests),
        }
        self._by_token: dict[tuple[str, int], Tensor] = {}
        self._schedules: dict[int, PageSchedule | None] = {}

    def plan(self, batch: StepBatch) -> StepPlan:
        """The plan of a step; the state of the blocks is then the one after it."""
        counts = [b - a for a, b in zip(batch.host_starts, batch.host_starts[1:], strict=False)]
        new = [row for row, count in enumerate(counts) if 0 < count == batch.host_lengths[row]]
        prefills = list(range(batch.decodes, batch.requests))
        table = batch.block_table
        resumed = self._resumed(batch, prefills)
        for row in prefills:
            self.state.end(table[row, -(-batch.before(row) // PAGE_TOKENS) : -(-batch.host_lengths[row] // PAGE_TOKENS)].long())
        first = table[:, 0].long()
        self.state.new_entries(first[new], first)
        if batch.slots is None:
            self.state.hold(resumed.values())
        written = self._begin_blocks(batch)
        decodes = self._decodes(batch, written) if batch.decodes else None
        pieces = self._prefills(batch, prefills, resumed, written) if prefills else None
        return StepPlan(decodes, pieces, max(batch.host_lengths, default=0) >= PAGE_TOKENS)

    def _resumed(self, batch: StepBatch, prefills: list[int]) -> dict[int, Tensor]:
        """[1] int64, the recent page of the partly filled block of each prefill that has one."""
        blocks = {row: batch.before(row) // PAGE_TOKENS for row in prefills if batch.before(row) % PAGE_TOKENS}
        return {row: self.state.pages(batch.block_table[row, block].long().view(1)) for row, block in blocks.items()}

    def _begin_blocks(self, batch: StepBatch) -> Tensor:
        """Give recent pages to the newest blocks: [R, PAGES] int64, the pages that this step writes to, or -1."""
        counts, length = batch.starts.diff(), batch.lengths
        before, last = (length - counts).long(), ((length - 1) // PAGE_TOKENS).long()
        number = last.unsqueeze(1) + torch.arange(1 - PAGES, 1, device=last.device)  # [R, PAGES]
        blocks = batch.block_table.gather(1, number.clamp(min=0)).long()
        first = number * PAGE_TOKENS
        real = ((length > 0) & (counts > 0) & (batch.block_table.gather(1, last.clamp(min=0).unsqueeze(1)).squeeze(1) != NULL_BLOCK))
        written = real.unsqueeze(1) & (number >= 0) & (first + PAGE_TOKENS > before.unsqueeze(1))
        if batch.slots is None:
            return self._taken(blocks, first, before, length, written)
        begun = written & (first >= before.unsqueeze(1))
        own = batch.slots.unsqueeze(1) * PAGES + number.clamp(min=0) % PAGES
        self.state.begin(blocks.flatten(), own.flatten(), begun.flatten())
        return own.where(written, -1)

    def _taken(self, blocks: Tensor, first: Tensor, before: Tensor, length: Tensor, written: Tensor) -> Tensor:
        rows = [
            (block, begin, was, now if yes else 0)
            for block_row, begins, was, now, yeses in zip(
                blocks.tolist(), first.tolist(), before.tolist(), length.tolist(), written.tolist(), strict=True
            )
            for block, begin, yes in zip(block_row, begins, yeses, strict=True)
        ]
        return torch.tensor(self.state.take_pages(rows)).view_as(blocks).where(written, -1)

    def _decodes(self, batch: StepBatch, written: Tensor) -> DecodePlan:
        rows, q = batch.decodes, batch.queries
        table, length = batch.block_table[:rows], batch.lengths[:rows].long()
        counts = batch.starts[: rows + 1].diff().long()
        before, last = length - counts, (length - 1) // PAGE_TOKENS
        pages = self.state.pages(table.gather(1, (last.unsqueeze(1) + torch.arange(1 - PAGES, 1, device=last.device)).clamp(min=0)).long())
        wanted = ((length - RECENT_TOKENS) // PAGE_TOKENS).clamp(min=0)
        kept = (wanted < last) & (pages[:, 0] >= 0)  # the block before the last one is read in 16 bits
        packed = (last - kept.long()).clamp(min=0) * PAGE_TOKENS
        entries = self.state.entries(table[:, 0].long())
        sinks = torch.where((packed > 0) & (entries >= 0), self.sinks, 0)
        recent = torch.stack((pages[:, 0].where(kept, pages[:, 1]), pages[:, 1]), 1).clamp(min=0)
        fills = (length // PAGE_TOKENS > before // PAGE_TOKENS) & (written[:rows, 1] >= 0)
        filled = before.clamp(min=0) // PAGE_TOKENS
        which = (filled == last).long().unsqueeze(1)  # among the two newest blocks
        heads = {"packed_starts": sinks, "packed_lengths": packed - sinks, "sink_lengths": sinks,
                 "recent_lengths": (length - packed).clamp(min=0)}
        for name, values in heads.items():
            self._by_head[name][:rows] = values.unsqueeze(1)
        requests = {
            "sink_table": entries.clamp(min=0).unsqueeze(1),
            "recent_table": recent,
            "full_pages": written[:rows].gather(1, which).squeeze(1).where(fills, -1),
            "full_blocks": table.gather(1, filled.unsqueeze(1)).squeeze(1).where(fills, -1),
        }
        for name, values in requests.items():
            self._by_request[name][:rows] = values
        of_head = torch.arange(self.kv_heads, dtype=torch.int32, device=table.device) * self.state.blocks
        torch.add(table.unsqueeze(1), of_head.view(1, -1, 1), out=self._table[:rows, :, : table.shape[1]])
        tokens, at, position = self._rows(batch, before, counts)
        which = (position // PAGE_TOKENS - last.unsqueeze(1) + PAGES - 1).clamp(0, PAGES - 1)
        page = written[:rows].gather(1, which)
        live = (position >= 0) & (position < length.unsqueeze(1)) & (page >= 0)
        recent_rows = (page * PAGE_TOKENS + position % PAGE_TOKENS).where(live, -1).flatten()
        entry = entries.unsqueeze(1)
        at_sinks = live & (position < self.sinks) & (entry >= 0)
        sink_rows = (entry * self.sinks + position).where(at_sinks, -1).flatten()
        if at is not None:
            recent_rows, sink_rows = recent_rows[at], sink_rows[at]
        by_head = {name: buffer[:rows] for name, buffer in self._by_head.items()}
        by_request = {name: buffer[:rows] for name, buffer in self._by_request.items()}
        return DecodePlan(
            queries=q,
            tokens=tokens,
            rows=at,
            table=self._table[:rows, :, : self._pages(batch)],
            schedule=self._schedule(rows, by_head),
            recent_rows=self._fixed("recent", recent_rows),
            sink_rows=self._fixed("sinks", sink_rows),
            **by_head,
            **by_request,
        )

    def _pages(self, batch: StepBatch) -> int:
        """Pages of the page table that attention is given: all where a graph may keep the number."""
        if self.state.device.type != "cpu":
            return self._table.shape[2]
        return max(1, max(batch.host_lengths[: batch.decodes]) // PAGE_TOKENS)

    def _rows(
        self, batch: StepBatch, before: Tensor, counts: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """The batch's token of each row, the row of each token, and positions [R, q] of the rows' tokens.

        A request with fewer than q tokens has the last of its rows; the others repeat its first token, at position
        -1, and what is computed for them is thrown away.
        """
        ahead = torch.arange(batch.queries, device=before.device) - batch.queries  # -q to -1
        position = (before + counts).unsqueeze(1) + ahead
        position = position.where(position >= before.unsqueeze(1), -1)
        if batch.uniform:
            return None, None, position
        starts = batch.starts[: batch.decodes + 1].long()
        tokens = torch.maximum(starts[1:].unsqueeze(1) + ahead, starts[:-1].unsqueeze(1)).flatten()
        counted = zip(batch.host_starts, batch.host_starts[1 : batch.decodes + 1], strict=False)
        rows = [
            request * batch.queries + row
            for request, (start, end) in enumerate(counted)
            for row in range(batch.queries - (end - start), batch.queries)
        ]
        return tokens, torch.tensor(rows).to(before.device, non_blocking=True), position

    def _fixed(self, name: str, values: Tensor) -> Tensor:
        """The values at an address that depends on their number only."""
        key = (name, len(values))
        if key not in self._by_token:
            self._by_token[key] = values.new_empty(len(values), dtype=torch.int32)
        self._by_token[key].copy_(values)
        return self._by_token[key]

    def _schedule(self, rows: int, by_head: dict[str, Tensor]) -> PageSchedule | None:
        made = page_schedule(
            by_head["packed_lengths"], self._table[:rows], by_head["packed_starts"], out=self._schedules.get(rows)
        )
        return self._schedules.setdefault(rows, made)

    def _prefills(
        self, batch: StepBatch, prefills: list[int], resumed: dict[int, Tensor], written: Tensor
    ) -> PrefillPlan:
        begin, device = batch.host_starts[batch.decodes], self.state.device
        rows = torch.tensor(prefills, dtype=torch.int64)
        entries = self.state.entries(batch.block_table[batch.decodes :, 0].long())
        of_token: list[Tensor] = []  # request, position, and first position of the request, of each token
        for row in prefills:
            count, before = batch.host_starts[row + 1] - batch.host_starts[row], batch.before(row)
            position = torch.arange(before, before + count)
            of_token.append(torch.stack((torch.full_like(position, row), position, torch.full_like(position, before),
                                         torch.full_like(position, before + count))))
        row, position, before, length = torch.cat(of_token, 1).to(device, non_blocking=True)
        number, last = position // PAGE_TOKENS, (length - 1) // PAGE_TOKENS
        resumes = number * PAGE_TOKENS < before
        newest = (number - last + PAGES - 1).clamp(min=-1)
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
            requests=[self._request(batch, one, entries[one - batch.decodes], resumed.get(one)) for one in rows.tolist()],
            early_rows=early.to(torch.int32),
            late_rows=late.to(torch.int32),
            sink_rows=sink.to(torch.int32),
            resumed_pages=torch.cat([none, *pages]).to(torch.int32),
            resumed_blocks=torch.cat([none, *blocks]),
            whole_tokens=torch.tensor(firsts, dtype=torch.int32).to(device, non_blocking=True),
            whole_blocks=torch.cat([none, *wholes]),
        )

    def _request(self, batch: StepBatch, row: int, entry: Tensor, page: Tensor | None) -> PrefillRequest:
        before = batch.before(row)
        packed = before // PAGE_TOKENS * PAGE_TOKENS
        sinks = (entry >= 0).to(torch.int32) * (self.sinks if packed else 0)
        of_head = torch.arange(self.kv_heads, dtype=torch.int32, device=entry.device) * self.state.blocks
        lengths = sinks.view(1, 1).expand(1, self.kv_heads).contiguous()
        return PrefillRequest(
            begin=batch.host_starts[row],
            tokens=batch.host_starts[row + 1] - batch.host_starts[row],
            before=before,
            table=(batch.block_table[row, : packed // PAGE_TOKENS] + of_head.unsqueeze(1)).unsqueeze(0),
            packed_starts=lengths,
            packed_lengths=packed - lengths,
            sink_table=entry.clamp(min=0).to(torch.int32).view(1, 1),
            sink_lengths=lengths,
            recent_page=page,
        )
