"""Several threads on one model: each gets the answers that it gets alone, and nothing stays behind."""

import copy
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import kvpress
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantpress.evaluation.divergence.reference import read_reference
from quantpress.pipelines import captured_decoding, chunked_prefill, disable, enable
from quantpress.presses import AdaKV, Compose, Decoding, KeyRerotation, Knorm, SnapKV, TurboQuant
from quantpress.presses.models import lock as locks
from quantpress.presses.models.attention import attention_modules
from quantpress.presses.models.lock import ModelLock, model_lock
from tests.pipelines.enabling.enabled import GREEDY, IDS, state
from tests.pipelines.words import ours, text, theirs
from tests.tiny_models import prompt, tiny_model

THREADS, ROUNDS = 6, 2
SNAP = {"window_size": 16}


class BrokenError(Exception):
    """What goes wrong in these tests."""


class Broken(kvpress.KnormPress):
    """Fails in the middle of the prefill."""

    def compress(self, module: Any, *args: Any) -> Any:
        if module.layer_idx == 1:
            raise BrokenError
        return super().compress(module, *args)


REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {"press": None},
    "chunks": {"press": None, "chunk_tokens": 64},
    "evicted": {"press": Knorm(0.5)},
    "packed": {"press": TurboQuant(4)},
    "evicted and packed": {"press": Compose([SnapKV(0.3, **SNAP), TurboQuant(2)]), "chunk_tokens": 32},
    "masked": {"press": kvpress.AdaKVPress(kvpress.KnormPress(0.5))},
    "renumbered": {"press": Compose([KeyRerotation(Knorm(0.4)), TurboQuant(4)])},
    "while decoding": {"press": Compose([Decoding(Knorm(), compression_interval=4, target_size=100)])},
    "penalized": {"press": None, "repetition_penalty": 1.7},
}


@pytest.fixture(autouse=True)
def _often() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(jobs: dict[str, Callable[[], Any]]) -> dict[str, list[Any]]:
    """Every job several times, many at once; a job that raises gives its exception."""

    def run(job: Callable[[], Any]) -> Any:
        try:
            return job()
        except Exception as error:
            return error

    with ThreadPoolExecutor(THREADS) as pool:
        running = [(name, pool.submit(run, job)) for _ in range(ROUNDS) for name, job in jobs.items()]
        results: dict[str, list[Any]] = {name: [] for name in jobs}
        for name, future in running:
            results[name].append(future.result())
    return results


def own(model: PreTrainedModel) -> PreTrainedModel:
    """A model of this test's own, which kvpress has left its mark on: it does at the first prefill of all."""
    model = copy.deepcopy(model)
    model.generate(IDS, **GREEDY)
    return model


def test_requests_through_one_pipeline() -> None:
    pipe, texts = ours(), {name: text(300, seed=index) for index, name in enumerate(REQUESTS)}
    pipe.model = own(pipe.model)

    def ask(name: str, **options: Any) -> str:
        return pipe(texts[name], question="w5 w6", max_new_tokens=8, **(options or REQUESTS[name]))["answer"]

    alone = {name: ask(name) for name in REQUESTS}
    for name in ("plain", "chunks", "evicted"):  # and kvpress's pipeline says the same
        options = {"press": REQUESTS[name]["press"], "question": "w5 w6", "max_new_tokens": 8}
        assert alone[name] == theirs()(texts[name], **options)["answer"]
    before = state(pipe.model)
    jobs = {name: lambda name=name: ask(name) for name in REQUESTS}
    jobs["broken"] = lambda: ask("plain", press=Compose([Broken(0.5), TurboQuant(4)]), chunk_tokens=64)
    found = in_threads(jobs)
    assert all(isinstance(error, BrokenError) for error in found.pop("broken"))
    assert found == {name: [answer] * ROUNDS for name, answer in alone.items()}
    assert state(pipe.model) == before
    pickle.dumps(pipe.model)


def test_reading_and_asking_later() -> None:
    pipe = ours()
    texts = [text(300, seed=index) for index in range(4)]
    presses = [None, TurboQuant(3), Compose([AdaKV(Knorm(0.5)), TurboQuant(4)]), kvpress.KnormPress(0.5)]

    def ask(index: int) -> list[str]:
        context = pipe.read(texts[index], press=presses[index], chunk_tokens=64 * index)
        return pipe(context, questions=["w5", "w6"], max_new_tokens=6)["answers"]

    alone = {str(index): ask(index) for index in range(4)}
    found = in_threads({name: lambda name=name: ask(int(name)) for name in alone})
    assert found == {name: [answers] * ROUNDS for name, answers in alone.items()}


@pytest.mark.parametrize(
    "press",
    [TurboQuant(3), Knorm(0.5), Compose([KeyRerotation(Knorm(0.4)), TurboQuant(4)])],
    ids=["packed", "evicted", "renumbered"],
)
def test_an_enabled_model_beside_a_pipeline_of_it(press: Any) -> None:
    """The pipeline decodes with a configuration of its own, and `generate` with the model's."""
    pipe = ours()
    pipe.model = model = own(pipe.model)
    model.generation_config.repetition_penalty = 1.5
    prompts = {f"generate {index}": prompt(300 + 20 * index, seed=index) for index in range(3)}

    def ask() -> Any:
        return pipe(text(300), question="w5", press=kvpress.KnormPress(0.3), max_new_tokens=8)["answer"]

    before = state(model)
    with enable(model, press):
        jobs: dict[str, Callable[[], Any]] = {
            name: lambda ids=ids: model.generate(ids, **GREEDY).tolist() for name, ids in prompts.items()
        }
        jobs["pipeline"] = ask
        alone = {name: job() for name, job in jobs.items()}
        assert in_threads(jobs) == {name: [answer] * ROUNDS for name, answer in alone.items()}
    assert without_masks(state(model)) == without_masks(before)


def test_press_contexts() -> None:
    """Each around `generate` or a forward of its own thread."""
    model = own(tiny_model("qwen3"))
    presses = {name: request["press"] for name, request in REQUESTS.items() if name != "masked"}

    def generate(press: Any) -> list[int]:
        with press(model), chunked_prefill(model, 64):
            return model.generate(IDS, **GREEDY).tolist()

    def read(press: Any) -> list[int]:
        cache = DynamicCache()
        with torch.no_grad(), press(model):
            model(IDS, past_key_values=cache)
        return [layer.get_seq_length() for layer in cache.layers]

    jobs = {name: lambda press=press: generate(press) for name, press in presses.items() if press is not None}
    jobs |= {f"{name}, read": lambda press=press: read(press) for name, press in presses.items() if press}
    alone, before = {name: job() for name, job in jobs.items()}, state(model)
    jobs["broken"] = lambda: generate(Compose([Broken(0.5), TurboQuant(4)]))
    found = in_threads(jobs)
    assert all(isinstance(error, BrokenError) for error in found.pop("broken"))
    assert found == {name: [answer] * ROUNDS for name, answer in alone.items()}
    assert without_masks(state(model)) == without_masks(before)


def test_captured_decoding_in_several_threads() -> None:
    """Contexts of several threads are left in any order, and each has its own steps."""
    model = own(tiny_model("llama"))
    prompts = {str(index): prompt(300 + 20 * index, seed=index) for index in range(3)}

    def generate(ids: torch.Tensor) -> tuple[Any, bool]:
        with captured_decoding(model) as steps:
            answer = model.generate(ids, past_key_values=DynamicCache(), **GREEDY).tolist()
        return answer, steps.eager_steps > 0

    expected = {name: model.generate(ids, **GREEDY).tolist() for name, ids in prompts.items()}
    found = in_threads({name: lambda ids=ids: generate(ids) for name, ids in prompts.items()})
    assert found == {name: [(answer, True)] * ROUNDS for name, answer in expected.items()}
    assert "forward" not in vars(model)
    with captured_decoding(model):
        twin = pickle.loads(pickle.dumps(model))
    assert vars(twin).get("forward", twin.forward).__self__ is twin


def test_a_streamer_s_thread_inside_captured_decoding_of_an_enabled_model() -> None:
    """As `TextIteratorStreamer` is used: the thread that holds the context waits for the one that decodes."""

    class Tokens(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            pass

    model, streamer = own(tiny_model("llama")), Tokens()
    with enable(model, 4):
        expected = model.generate(IDS, **GREEDY).tolist()
        with captured_decoding(model):
            options = {"streamer": streamer, **GREEDY}
            thread = threading.Thread(target=model.generate, args=(IDS,), kwargs=options)
            thread.start()
            thread.join()
    assert [streamer.tokens] == expected


def test_disable_waits_for_calls_of_other_threads() -> None:
    """A press that numbers positions anew: without it the rest of the answer would be at wrong positions."""
    model = own(tiny_model("llama"))
    press = Compose([KeyRerotation(Knorm(0.4))])
    with enable(model, press):
        expected = model.generate(IDS, **GREEDY).tolist()
    enable(model, press)
    begun, go_on = threading.Event(), threading.Event()

    def processor(ids: Any, scores: Any) -> Any:
        begun.set()
        go_on.wait()
        return scores

    with ThreadPoolExecutor() as pool:
        answer = pool.submit(lambda: model.generate(IDS, logits_processor=[processor], **GREEDY).tolist())
        begun.wait()
        done = [pool.submit(disable, model), pool.submit(disable, model)]
        assert not any(one.done() for one in done)
        go_on.set()
        assert [one.result() for one in done] == [None, None] and answer.result() == expected
    assert "forward" not in vars(model)


def test_enabling_waits_for_a_press_of_another_thread() -> None:
    model, entered, leave = own(tiny_model("llama")), threading.Event(), threading.Event()
    before = state(model)

    def hold() -> None:
        with TurboQuant(4)(model):
            entered.set()
            leave.wait()

    with ThreadPoolExecutor() as pool:
        holding = pool.submit(hold)
        entered.wait()
        enabling = pool.submit(enable, model, 4)
        assert "generate" not in vars(model)
        leave.set()
        holding.result()
        enabling.result().disable()
    assert state(model) == before


def test_a_failure_leaves_the_attention_of_other_models_alone() -> None:
    """`ALL_ATTENTION_FUNCTIONS` is one table for all: what another thread has put there stays."""
    first, second = tiny_model("llama"), tiny_model("qwen3")
    with pytest.raises(BrokenError), Compose([Broken(0.5)])(first):
        with TurboQuant(4)(second):
            installed = dict(ALL_ATTENTION_FUNCTIONS.items())
        raise BrokenError
    assert dict(ALL_ATTENTION_FUNCTIONS.items()) == installed


def test_the_reference_of_an_evaluation_sees_its_own_model_only() -> None:
    models = {"llama": tiny_model("llama"), "qwen3": tiny_model("qwen3")}
    ids = prompt(80)

    def queries(model: PreTrainedModel) -> list[Any]:
        calls = read_reference(model, ids, 64, queries=4).attention
        return [(call.module in attention_modules(model), call.query.tolist()) for call in calls.values()]

    before = {*ALL_ATTENTION_FUNCTIONS}
    with torch.no_grad():
        alone = {name: queries(model) for name, model in models.items()}

    def job(model: PreTrainedModel) -> list[Any]:
        with torch.no_grad():
            return queries(model)

    found = in_threads({name: lambda model=model: job(model) for name, model in models.items()})
    assert found == {name: [calls] * ROUNDS for name, calls in alone.items()}
    names = [getattr(function, "__name__", "") for function in ALL_ATTENTION_FUNCTIONS.values()]
    assert {*ALL_ATTENTION_FUNCTIONS} >= before and "recording" not in names


# The lock itself


def test_one_lock_for_all_that_is_around_a_model() -> None:
    model = tiny_model("llama")
    assert model_lock(model) is model_lock(model.model) is not model_lock(copy.deepcopy(model))


def test_threads_get_their_turn_in_order() -> None:
    lock, order = ModelLock(), []

    def take(index: int) -> None:
        with lock, lock:
            order.append(index)

    threads = [threading.Thread(target=take, args=(index,)) for index in range(8)]
    with lock:
        for index, thread in enumerate(threads):
            thread.start()
            while len(lock._waiting) <= index:
                pass
    for thread in threads:
        thread.join()
    assert order == list(range(8)) and not lock.held


def test_left_by_another_thread() -> None:
    lock = ModelLock()
    lock.__enter__()
    thread = threading.Thread(target=lock.__exit__)
    thread.start()
    thread.join()
    assert not lock.held
    with lock:
        assert lock.held


def test_a_long_wait_says_what_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE_S", 0.01)
    lock, said = ModelLock(), threading.Event()

    def wait() -> str:
        with pytest.warns(UserWarning, match=r"MainThread has a press.*leave its `with` block") as caught:
            monkeypatch.setattr(lock, "_warn", lambda warn=lock._warn: (warn(), said.set()))
            with lock:
                return str(caught[0].message)

    with ThreadPoolExecutor() as pool, lock:
        waiting = pool.submit(wait)
        said.wait()
        lock.__exit__()
        assert "goes on waiting" in waiting.result()
        lock.__enter__()


@pytest.mark.parametrize("turn_has_come", [False, True])
def test_an_interrupted_wait_leaves_the_queue(turn_has_come: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = ModelLock()

    class Interrupted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if turn_has_come:
                lock.__exit__()
            raise KeyboardInterrupt

    def wait() -> None:
        with pytest.raises(KeyboardInterrupt), lock:
            pass

    lock.__enter__()
    with monkeypatch.context() as patch:
        patch.setattr(locks, "Event", Interrupted)
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()
    if not turn_has_come:
        lock.__exit__()
    assert lock._owner is None and not lock._waiting


def without_masks(found: dict[str, Any]) -> dict[str, Any]:
    """What kvpress's own patch of attention sets on modules at every prefill."""
    return {name: value for name, value in found.items() if not name.endswith("masked_key_indices")}
