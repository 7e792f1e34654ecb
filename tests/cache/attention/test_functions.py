"""The owner of the attention functions: what is in the table while it is needed, and that nothing stays."""

import copy
import functools
import gc
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from quantpress.cache import PackedLayer
from quantpress.cache.attention.dispatch import PACKED_ATTENTION
from quantpress.cache.attention.functions import (
    TORCH_ATTENTION,
    FunctionWrapper,
    original_functions,
    put_back_functions,
)
from tests.cache.caches import functions, functions_left_alone, lossless
from tests.limits import HANG

THREADS = 6


def noting(note: str, notes: list[str], rank: int = 0, only: str = "sdpa") -> FunctionWrapper:
    """Writes `note` down at each call of the function that is named `only`."""

    def wrap(function: Any, name: str) -> Any:
        def noted(*args: Any) -> Any:
            notes.append(note)
            return function(*args)

        return noted if name == only else function

    return FunctionWrapper(wrap, rank)


def stock(*args: Any) -> Any:
    """Stands for a function of transformers."""
    return args


@pytest.fixture
def stock_sdpa() -> Any:
    before = original_functions()
    ALL_ATTENTION_FUNCTIONS["sdpa"] = stock
    yield
    put_back_functions(before)


@pytest.mark.usefixtures("stock_sdpa")
def test_wrappers_lie_by_rank_and_go_in_any_order() -> None:
    with functions_left_alone():
        notes: list[str] = []
        inner, outer, other = noting("inner", notes), noting("outer", notes, 2), noting("other", notes, 1)

        def called() -> list[str]:
            notes.clear()
            assert ALL_ATTENTION_FUNCTIONS["sdpa"](1) == (1,)
            return notes.copy()

        stack = {wrapper: ExitStack() for wrapper in (inner, outer, other)}
        stack[outer].enter_context(outer.in_place())
        for _ in range(2):
            stack[inner].enter_context(inner.in_place())
        assert called() == ["outer", "inner"]
        both = functions()
        with other.in_place():
            assert called() == ["outer", "other", "inner"]
        assert called() == ["outer", "inner"] and functions() == both
        stack[outer].close()
        assert called() == ["inner"]
        stack[inner].close()
        assert called() == [] and ALL_ATTENTION_FUNCTIONS["sdpa"] is stock
        with inner.in_place(), outer.in_place():
            assert called() == ["outer", "inner"] and functions() == both


def test_wrapping_again_gives_the_same_objects() -> None:
    """torch.compile guards on them: other objects would cost a minute of compiling."""
    seen = []
    with functions_left_alone():
        for _ in range(3):
            with PACKED_ATTENTION.in_place():
                seen.append(functions())
    assert seen[0] == seen[1] == seen[2]


def test_torch_s_own_function() -> None:
    notes: list[str] = []
    with functions_left_alone() as before:
        with noting("torch", notes, only=TORCH_ATTENTION).in_place():
            changed = {name for name, function in functions().items() if function is not before[name]}
        assert changed == {TORCH_ATTENTION}


def test_an_exception_inside() -> None:
    with functions_left_alone(), pytest.raises(KeyError), PACKED_ATTENTION.in_place():
        raise KeyError


@pytest.mark.usefixtures("stock_sdpa")
def test_what_others_put_on_top_stays() -> None:
    notes: list[str] = []
    wrapper = noting("ours", notes)
    with functions_left_alone() as before:
        with wrapper.in_place():
            ours = ALL_ATTENTION_FUNCTIONS["sdpa"]

            @functools.wraps(ours)
            def theirs(*args: Any) -> Any:
                notes.append("theirs")
                return ours(*args)

            ALL_ATTENTION_FUNCTIONS["sdpa"] = theirs
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is theirs
        assert theirs(1) == (1,) and notes == ["theirs", "ours"]
        with wrapper.in_place():  # around theirs
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not theirs
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is theirs
        ALL_ATTENTION_FUNCTIONS["sdpa"] = ours  # as a context that puts back what it found
        with wrapper.in_place():
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not stock
        assert functions() == before


def test_names_that_come_while_wrappers_are_in_place() -> None:
    """Wrapped with the next user, left as they are after the last."""
    with functions_left_alone() as before:
        own, common = ALL_ATTENTION_FUNCTIONS._local_mapping, AttentionInterface._global_mapping
        with PACKED_ATTENTION.in_place():
            ALL_ATTENTION_FUNCTIONS["mine"] = stock
            AttentionInterface.register("common", stock)
            with PACKED_ATTENTION.in_place():
                assert stock not in (ALL_ATTENTION_FUNCTIONS["mine"], ALL_ATTENTION_FUNCTIONS["common"])
        assert functions() == {**before, "mine": stock, "common": stock}
        assert own["mine"] is stock and "common" not in own
        with PACKED_ATTENTION.in_place():
            AttentionInterface.register("common", print)
        assert ALL_ATTENTION_FUNCTIONS["common"] is print
        with PACKED_ATTENTION.in_place():
            del ALL_ATTENTION_FUNCTIONS["mine"], common["common"], own["common"]
            del ALL_ATTENTION_FUNCTIONS["eager"]


def test_putting_back_what_presses_did_leaves_wrappers_in_place() -> None:
    with functions_left_alone():
        before = original_functions()
        with PACKED_ATTENTION.in_place():
            wrapped = functions()
            ALL_ATTENTION_FUNCTIONS["sdpa"] = ALL_ATTENTION_FUNCTIONS["mine"] = stock
            put_back_functions(before)
            assert functions() == wrapped
            ALL_ATTENTION_FUNCTIONS["sdpa"] = stock
            with PACKED_ATTENTION.in_place():
                put_back_functions(before)
                assert functions() == wrapped


def test_threads_count_exactly() -> None:
    """Layers, copies and wrappers come and go in many threads; in the end nobody is left."""
    notes: list[str] = []
    wrapper, barrier = noting("", notes, 1), threading.Barrier(THREADS)
    originals = functions()

    def work(_: int) -> None:
        barrier.wait(HANG)
        for turn in range(40):
            with wrapper.in_place():
                layer: Any = PackedLayer(lossless())
                layer.itself = copy.copy(layer)
                layer.itself.itself = layer  # only the garbage collector finds these
                assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not originals["sdpa"]
            if turn % 10 == 0:
                gc.collect()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with functions_left_alone(), ThreadPoolExecutor(THREADS) as pool:
            assert list(pool.map(work, range(THREADS))) == [None] * THREADS
    finally:
        sys.setswitchinterval(interval)
    assert wrapper.users == PACKED_ATTENTION.users == 0


def test_the_garbage_collector_inside_of_a_change() -> None:
    """It may run anywhere, and take the last user of a wrapper away while the table is being changed."""

    def wrap(function: Any, name: str) -> Any:
        gc.collect(1)  # the layer is young
        return (lambda *args: function(*args)) if name == "sdpa" else function

    with functions_left_alone() as before:
        for _ in range(3):
            layer: Any = PackedLayer(lossless())
            layer.itself = layer
            del layer
            with FunctionWrapper(wrap).in_place():
                assert PACKED_ATTENTION.users == 0 and functions().keys() == before.keys()
