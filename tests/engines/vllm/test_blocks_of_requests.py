"""Requests that come, go, share blocks and take back drafts at random: nothing is lost or stale."""

from importlib.util import find_spec

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.engines.vllm.played_scheduler import BLOCK, DRAFTS, PAGES, REQUESTS, PlayedScheduler, Request

MOST = BLOCK * PAGES - DRAFTS - 2
EXAMPLES = 100 if find_spec("vllm") else 8  # of 100 steps; the full number with the other tests of the engine


class Requests(PlayedScheduler, RuleBasedStateMachine):
    slots_given = True

    def __init__(self) -> None:
        RuleBasedStateMachine.__init__(self)

    @initialize()
    def start(self) -> None:
        PlayedScheduler.__init__(self, self.slots_given)
        self.prompts: list[list[int]] = []

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
            if (
                row == left_out and self.with_slots
            ):  # without, it may lose its page: an error, not a wrong answer
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


class RequestsWithoutSlots(Requests):
    slots_given = False


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
