"""What random requests do seldom: each case fails where a guard against stale or lost copies is gone."""

from dataclasses import dataclass

import pytest
import torch

from quantpress.engines.vllm.block_state import RecentTokensLostError
from tests.engines.vllm.played_scheduler import BLOCK, REQUESTS, SINKS, PlayedScheduler, Request


@dataclass
class Work:
    """Part of a step: so many tokens (None: all) of a request, or of a prompt that comes only now."""

    request: Request | list[int]
    count: int | None = None
    drafts: int = 0
    kept: int = 0


class Directed(PlayedScheduler):
    def ask(self, prompt: list[int]) -> Request:
        """A request in the lowest free row, with the prefix that is cached."""
        self.waiting = [prompt]
        self.admit_waiting()
        request = self.running[-1]
        request.slot = min(set(range(self.most)) - {one.slot for one in self.running[:-1]})
        return request

    def step(self, *parts: Work) -> list[Request]:
        scheduled = []
        for part in parts:
            request = part.request if isinstance(part.request, Request) else self.ask(part.request)
            tokens = request.tokens + [7_000_000 + i for i in range(part.drafts)]
            end = len(tokens) if part.count is None else request.computed + part.count
            assert self.reserve(request, end)
            request.identify(tokens, end)
            self.publish(request, end)
            scheduled.append((request, tokens, end, part.kept))
        self.run(sorted(scheduled, key=lambda one: one[2] - one[0].computed), optimistic=False)
        return [one[0] for one in scheduled]

    def read(self, prompt: list[int], piece: int) -> Request:
        """A request whose prompt is read piece by piece."""
        (request,) = self.step(Work(prompt, min(piece, len(prompt))))
        while request.computed < len(prompt):
            self.step(Work(request, min(piece, len(prompt) - request.computed)))
        return request

    def next_block(self, block: int) -> None:
        """The free block that is given out next."""
        self.free.move_to_end(block, last=False)

    def sinks_read(self) -> list[int]:
        """By each decode of the last step."""
        assert self.plan.decodes is not None
        return self.plan.decodes.sink_lengths[:, 0].tolist()


def prompt(which: int, tokens: int) -> list[int]:
    return [1000 * which + i for i in range(tokens)]


both = pytest.mark.parametrize("with_slots", [True, False], ids=["slots", "no_slots"])


@both
def test_a_block_is_written_again_in_the_middle_of_a_piece(with_slots: bool) -> None:
    """Its recent page is over, though nobody else has taken the page."""
    played = Directed(with_slots)
    old = played.read(prompt(1, 200), 200)
    block = old.blocks[0]
    assert int(played.state.maps.pages(torch.tensor([block]))) >= 0
    played.release(old)
    played.ask(prompt(9, 10))  # waits in the old row, whose pages stay as they are
    first = next(iter(played.free))
    played.next_block(block)
    played.next_block(first)
    long = prompt(2, 4 * BLOCK + 50)
    (rewriting,) = played.step(Work(long))
    assert rewriting.blocks[1] == block
    (hit,) = played.step(Work(long[: 2 * BLOCK] + prompt(3, 20)))
    assert hit.blocks[1] == block
    played.step(Work(hit))  # the block is its newest but one, and is read packed


@both
def test_a_page_is_taken_by_a_newer_block(with_slots: bool) -> None:
    """The older block still names the page, but the page does not name the block."""
    played = Directed(with_slots, requests=2)
    long = prompt(1, 6 * BLOCK + 50)  # one page more than there are
    old = played.read(long, 100)
    maps, first = played.state.maps, old.blocks[0]
    assert int(maps.page_of[first]) in maps.page_of[torch.tensor(old.blocks[1:])].tolist()
    played.release(old)
    (hit,) = played.step(Work(long[:BLOCK] + prompt(2, 20)))
    assert hit.blocks[0] == first
    played.step(Work(hit))


@both
def test_a_first_block_is_written_again(with_slots: bool) -> None:
    """It gets a sink entry for its new tokens, whoever has the old one."""
    played = Directed(with_slots)
    old = played.read(prompt(1, 150), 150)
    block = old.blocks[0]
    played.release(old)
    for which in range(2, 9):  # the old entry goes to another prompt
        played.release(played.read(prompt(which, 20), 20))
    assert int(played.state.maps.entries(torch.tensor([block]))) < 0
    played.next_block(block)
    new = played.read(prompt(9, 300), 3)  # the sinks come in two steps
    assert new.blocks[0] == block
    played.step(Work(new))
    assert played.sinks_read() == [SINKS]
    entry = int(played.state.maps.entries(torch.tensor([block])))
    keys = torch.stack([played.states[one][0] for one in new.identities[:SINKS]])
    assert torch.equal(played.store.sinks[0][entry, 0], keys)


@both
@pytest.mark.parametrize("behind", [2, 20], ids=["by_a_decode", "by_a_prefill"])
def test_a_block_is_read_in_the_step_that_fills_it(with_slots: bool, behind: int) -> None:
    played = Directed(with_slots)
    begin = prompt(1, BLOCK + 20)
    _, hit = played.step(Work(begin), Work(begin[:BLOCK] + prompt(2, behind)))
    assert hit.computed == BLOCK + behind, "the block was found"


@both
@pytest.mark.parametrize("behind", [2, 20], ids=["by_a_decode", "by_a_prefill"])
def test_a_block_is_read_in_the_step_whose_decode_fills_it(with_slots: bool, behind: int) -> None:
    played = Directed(with_slots)
    one = played.read(prompt(1, BLOCK - 1), BLOCK)
    found = one.tokens + prompt(2, behind)
    played.step(Work(one), Work(found))
    assert played.running[-1].blocks[0] == one.blocks[0]


@both
@pytest.mark.parametrize("piece", [2 * BLOCK + 30, 3 * BLOCK, 4 * BLOCK])
def test_a_long_piece_goes_on_in_a_block(with_slots: bool, piece: int) -> None:
    """The newest blocks take the page of the block that the piece fills; it is read and packed first."""
    played = Directed(with_slots, requests=1)
    whole = prompt(1, 100 + piece)
    played.step(Work(whole, 100))
    played.step(Work(played.running[0], piece))
    played.step(Work(played.running[0]))
    played.release(played.running[0])
    played.step(Work(whole[:BLOCK] + prompt(2, 10)))  # what was packed is right, too


@both
@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_rejected_drafts_filled_a_block(with_slots: bool, drafts: int) -> None:
    """It is filled again with other tokens, and packed again."""
    played = Directed(with_slots)
    one = played.read(prompt(1, BLOCK - 1), BLOCK)
    played.step(Work(one, drafts=drafts))
    assert one.computed == BLOCK
    played.release(one)

    two = played.read(prompt(2, BLOCK - 2), BLOCK)
    assert two.computed == BLOCK - 2
    played.step(Work(two, drafts=1 + drafts))  # all are taken back but the token that was certain
    assert two.computed == BLOCK - 1
    played.step(Work(two, drafts=drafts, kept=drafts))
    assert two.computed == BLOCK + drafts
    (hit,) = played.step(Work(two.tokens[:BLOCK] + prompt(3, 200)))
    assert hit.blocks[0] == two.blocks[0]
    played.step(Work(hit), Work(two))


@both
def test_more_prompts_than_sink_entries(with_slots: bool) -> None:
    """A request whose entry was given to another reads its first tokens packed."""
    played = Directed(with_slots)
    old = played.read(prompt(1, 300), 300)
    played.step(Work(old))
    assert played.sinks_read() == [SINKS]
    first_blocks = []
    for which in range(2, 2 + REQUESTS + 2):
        played.release(other := played.read(prompt(which, 150), 150))
        first_blocks.append(other.blocks[0])
    assert (played.state.maps.entries(torch.tensor(first_blocks)) >= 0).all(), "each has an entry"
    played.step(Work(old))
    assert played.sinks_read() == [0]
    (hit,) = played.step(Work(prompt(1, 2 * BLOCK) + prompt(9, 30)))
    assert hit.blocks[:2] == old.blocks[:2]
    played.step(Work(hit), Work(old))


def test_more_unfinished_blocks_than_pages_without_slots() -> None:
    """What an engine without slots cannot hold is an error, and not a wrong answer."""
    played = Directed(with_slots=False, requests=1)
    played.most = 5  # four recent pages
    first, *_ = (played.read(prompt(which, 50), 50) for which in range(5))
    block = first.blocks[0]
    with pytest.raises(RecentTokensLostError, match=rf"50 tokens of block {block} are .*raise max_num_seqs"):
        played.step(Work(first))
