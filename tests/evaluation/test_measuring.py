"""The clock sees every token of every answer; the meter sees memory that is taken and given back."""

import mmap
import time

import psutil
import pytest
import torch

from quantpress.evaluation.measuring import TokenClock, peak_memory
from tests.pipelines.words import ours, text

MEBIBYTE = 2**20


def test_tokens_are_those_of_the_answers_in_the_order_of_time() -> None:
    pipe, clock = ours(), TokenClock()
    before = time.perf_counter()
    asked = {"questions": ["w1 w2", "w3"], "max_new_tokens": 7, "press": "TurboQuant"}
    result = pipe(text(400), streamer=clock, **asked)
    assert [pipe.tokenizer.decode(one, skip_special_tokens=True) for one in clock.tokens] == result["answers"]
    assert [len(one) for one in clock.tokens] == [len(one) for one in clock.times] == [7, 7]
    times = [moment for one in clock.times for moment in one]
    assert before < times[0] and times == sorted(times) and times[-1] < time.perf_counter()


def test_the_clock_changes_no_answer() -> None:
    asked = {"question": "w1 w2", "max_new_tokens": 5}
    assert ours()(text(300), streamer=TokenClock(), **asked) == ours()(text(300), **asked)


def test_peak_memory_counts_what_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    looked, look = [0], psutil.Process.memory_info

    def counted(process: psutil.Process) -> object:
        found = look(process)
        looked[0] += 1
        return found

    def wait_for_a_look() -> None:
        """One that began after now, however busy the machine is."""
        seen = looked[0]
        while looked[0] < seen + 2:
            time.sleep(0.001)

    monkeypatch.setattr(psutil.Process, "memory_info", counted)
    size = 64 * MEBIBYTE
    with peak_memory(torch.device("cpu")) as peak, mmap.mmap(-1, size) as taken:  # not from the allocator
        taken[:: mmap.PAGESIZE] = bytes(size // mmap.PAGESIZE)
        wait_for_a_look()
    assert 60 * MEBIBYTE < peak.bytes < 200 * MEBIBYTE
    with peak_memory(torch.device("cpu")) as idle:
        wait_for_a_look()
    assert idle.bytes < 32 * MEBIBYTE


def test_the_meter_stops_when_an_error_passes() -> None:
    try:
        with peak_memory(torch.device("cpu")) as peak:
            raise RuntimeError("on purpose")
    except RuntimeError:
        assert peak.bytes >= 0
