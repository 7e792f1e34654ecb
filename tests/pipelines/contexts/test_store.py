"""A store of contexts gives the answers of texts that are read, to many users at once, within its bound."""

import os
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import kvpress
import pytest
import torch

from quantpress.cache.saved.fingerprint import model_fingerprint
from quantpress.codecs.raw import RawPages
from quantpress.errors import CacheFileError, EmptyContextError, InvalidInputError
from quantpress.pipelines.contexts.cached_context import CachedContext
from quantpress.pipelines.contexts.context_key import context_key
from quantpress.pipelines.contexts.store import ABANDONED_S, SUFFIX, USED, ContextStore
from quantpress.presses import Compose, Demote, KVzip, ScorerPress, SnapKV, StreamingLLM, TurboQuant
from quantpress.presses.expression import parse_press
from tests.pipelines.cases import QUESTIONS, SNAP
from tests.pipelines.words import ours, text

PRESS = "SnapKV(0.5, window_size=16) | TurboQuant(bits=3)"
LONG = text(600)
TOKENS = {"max_new_tokens": 6}


@pytest.fixture(params=["folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A store on this machine, and one elsewhere."""
    if request.param == "folder":
        yield str(tmp_path / "new" / "contexts")
        return
    yield "memory://bucket/contexts"
    fsspec.filesystem("memory").store.clear()


def kept(store: ContextStore) -> set[str]:
    return {key for key, _ in store._contexts()}


def reads(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the contexts that the pipeline reads from now on."""
    lengths: list[int] = []
    read = pipe.read_planned
    monkeypatch.setattr(pipe, "read_planned", lambda plan: lengths.append(plan.ids.shape[1]) or read(plan))
    return lengths


def test_a_known_text_is_not_read_again(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = ours()
    expected = pipe(LONG, questions=QUESTIONS, press=PRESS, **TOKENS)["answers"]
    lengths = reads(pipe, monkeypatch)
    assert ContextStore(place).get(pipe, LONG, press=PRESS) is None
    for _ in range(2):
        context = ContextStore(place).get_or_read(pipe, LONG, press=PRESS)
        assert pipe(context, questions=QUESTIONS, **TOKENS)["answers"] == expected
    assert lengths == [601]  # with the token of the beginning
    again = ContextStore(place).get(pipe, LONG, press=parse_press(PRESS))
    assert again is not None and again.memory == context.memory
    assert ContextStore(place).total_bytes > context.memory.total_bytes
    if "://" not in place:
        (file,) = Path(place).iterdir()
        assert file.stat().st_mode & 0o777 == 0o600 and Path(place).stat().st_mode & 0o777 == 0o700


def test_one_press_by_itself_is_found_however_it_is_given(place: str) -> None:
    pipe, store = ours(), ContextStore(place)
    store.get_or_read(pipe, LONG, press="TurboQuant(4)")
    for press in (TurboQuant, TurboQuant(4), [TurboQuant], Compose([TurboQuant]), "TurboQuant"):
        assert store.get(pipe, LONG, press=press) is not None
    assert len(kept(store)) == 1


def test_what_a_cache_follows_from_is_in_the_key() -> None:
    """And nothing else: another process, another object of the same press."""
    pipe = ours()

    def key(words: str = LONG, other: Any = None, **options: Any) -> str:
        used = other or pipe
        return context_key(used.plan_reading(words, **options), model_fingerprint(used.model))

    plain = key(press=PRESS)
    assert plain == key(press=parse_press(PRESS)) == key(press=PRESS, progress=True)
    assert plain == key(press=Compose([SnapKV(0.5, window_size=16), TurboQuant(3)]))
    others = [
        key(),
        key(text(600, seed=1), press=PRESS),
        key(LONG + " ", press=PRESS, max_context_length=599),
        key(press=PRESS, chunk_tokens=128),
        key(other=ours(chat=True), press=PRESS),
        key(other=ours("qwen3"), press=PRESS),
        key(press="SnapKV(0.4, window_size=16) | TurboQuant(bits=3)"),
        key(press="SnapKV(0.5, window_size=17) | TurboQuant(bits=3)"),
        key(press="SnapKV(0.5, window_size=16) | TurboQuant(bits=3, seed=1)"),
        key(press="TurboQuant(bits=3)"),
        key(press=TurboQuant(bits=3, layer_bits={0: 16})),
        key(press=TurboQuant(bits=3, layer_bits={0: (8, 4)})),
        key(press=Compose([Demote(SnapKV(0.5), 2), TurboQuant(bits=3)])),
        key(press=kvpress.AdaKVPress(kvpress.SnapKVPress(0.5))),
        key(press=kvpress.AdaKVPress(kvpress.KnormPress(0.5))),
        key(press=kvpress.AdaKVPress(kvpress.KnormPress(0.5), alpha_safeguard=0.3)),
    ]
    assert len({plain, *others}) == 1 + len(others)


def test_a_press_that_was_used_has_the_same_key() -> None:
    """Demote and KVzip keep notes on themselves, which are no settings."""
    pipe, press, zipped = ours(), Compose([Demote(SnapKV(0.5, **SNAP), 2), TurboQuant]), KVzip(0.4)

    def keys() -> list[str]:
        plans = [pipe.plan_reading(LONG, press=one) for one in (press, zipped)]
        return [context_key(plan, {}) for plan in plans]

    before = keys()
    pipe.read(LONG, press=press)
    zipped.context_length, zipped._cache = 600, object()
    assert keys() == before


class Counting(ScorerPress):
    """A press of one's own with a setting that is no argument."""

    strength = 1

    def score(self, module: Any, hidden_states: Any, keys: torch.Tensor, *_: Any) -> torch.Tensor:
        return keys.norm(dim=-1) * self.strength


class Forgetful(ScorerPress):
    def __init__(self, ratio: float) -> None:
        super().__init__(ratio)


def test_presses_of_ones_own(tmp_path: Path) -> None:
    pipe, store = ours(), ContextStore(tmp_path)
    press = Counting(0.5)
    store.get_or_read(pipe, LONG, press=press)
    assert store.get(pipe, LONG, press=Counting(0.5)) is not None
    press.strength = -1
    assert store.get(pipe, LONG, press=press) is None
    with pytest.raises(InvalidInputError, match=r"Forgetful does not keep its argument ratio.*self\.ratio"):
        store.get_or_read(pipe, LONG, press=Forgetful(0.5))
    with pytest.raises(InvalidInputError, match=r"press\.codec is <function.*use pipe\.read"):
        store.get_or_read(pipe, LONG, press=TurboQuant(codec=lambda dim, role, layer: RawPages(dim, 32)))
    decoding = kvpress.DecodingPress(kvpress.KnormPress(), compression_interval=4, target_size=100)
    with pytest.raises(InvalidInputError, match="acts during decoding"):
        store.get_or_read(pipe, LONG, press=decoding)
    with pytest.raises(EmptyContextError):
        store.get_or_read(pipe, " ")
    with pytest.raises(InvalidInputError, match="max_new_tokens"):
        store.get_or_read(pipe, LONG, max_new_tokens=3)


def test_an_enabled_press_and_the_defaults_of_a_pipeline_count(tmp_path: Path) -> None:
    pipe, store = ours(press="TurboQuant(3)", max_context_length=500), ContextStore(tmp_path)
    context = store.get_or_read(pipe, LONG)
    assert context.description == "TurboQuant(3)" and context.token_ids.shape == (1, 500)
    assert store.get(ours(), LONG) is None
    assert store.get(ours(), LONG, press=TurboQuant(3), max_context_length=500) is not None


def test_the_least_recently_used_goes_first(place: str) -> None:
    pipe = ours()
    size = ContextStore(f"{place}/measure")
    size.get_or_read(pipe, LONG, press=PRESS)
    one = size.total_bytes
    store = ContextStore(place, max_bytes=3 * one + one // 2)
    texts = [text(600, seed=seed) for seed in range(6)]
    keys = [context_key(pipe.plan_reading(t, press=PRESS), model_fingerprint(pipe.model)) for t in texts]
    for index in (0, 1, 2, 0, 3):
        store.get_or_read(pipe, texts[index], press=PRESS)
        time.sleep(0.02)  # times of files are not finer everywhere
    assert kept(store) == {keys[0], keys[2], keys[3]}
    for index in (4, 5):
        store.get_or_read(pipe, texts[index], press=PRESS)
        time.sleep(0.02)
        assert store.total_bytes <= 3 * one + one // 2
    assert kept(store) == {keys[3], keys[4], keys[5]}
    there = {entry["name"].rpartition("/")[2] for entry in store._listed() if entry["type"] == "file"}
    assert there == {key + end for key in kept(store) for end in (SUFFIX, USED)}


def test_a_context_larger_than_the_store_is_read_and_not_kept(place: str) -> None:
    pipe, store = ours(), ContextStore(place, max_bytes=1000)
    with pytest.warns(UserWarning, match=r"larger than the whole store \(1,000\).*larger max_bytes"):
        context = store.get_or_read(pipe, LONG, press=PRESS)
    assert pipe(context, question="w1", **TOKENS) == pipe(LONG, question="w1", press=PRESS, **TOKENS)
    assert store.total_bytes == 0


def test_mutated_files_are_never_used(place: str) -> None:
    """Whatever happens to a stored file: the text is read again, with a warning, and the file is right."""
    pipe, store = ours(), ContextStore(place)
    context = store.get_or_read(pipe, LONG, press=PRESS)
    (key,) = kept(store)
    files, inner = store._files, store._inner(key + SUFFIX)
    whole = files.cat_file(inner)
    other = ContextStore(f"{place}/other")
    other.get_or_read(pipe, text(600, seed=1), press=PRESS)
    (wrong,) = kept(other)
    swapped = other._files.cat_file(other._inner(wrong + SUFFIX))
    read_again = 0
    for trial in range(16):
        changed = bytearray(whole)
        changed[random.randrange(len(whole))] ^= 1 << random.randrange(8)
        made = [bytes(changed), whole[: random.randrange(len(whole))], swapped, b""][trial % 4]
        files.pipe_file(inner, made)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            found = store.get_or_read(pipe, LONG, press=PRESS)
        read_again += any("the text is read again" in str(one.message) for one in caught)
        assert torch.equal(found.token_ids, context.token_ids) and found.memory == context.memory
        CachedContext.load(store._place(key), pipe.model, press=PRESS)
    assert read_again > 12  # a changed space, or digit of the header's own, may mean the same


def test_many_writers_and_readers_at_once(tmp_path: Path) -> None:
    """Nobody ever sees half a file, and the bound holds in the end."""
    pipe = ours()
    texts = [text(600, seed=seed) for seed in range(4)]
    sized = ContextStore(tmp_path / "size")
    sized.get_or_read(pipe, texts[0], press=PRESS)
    bound = sized.total_bytes * 2 + 1000
    asked = {"question": QUESTIONS[0], "max_new_tokens": 2}
    expected = [pipe(one, press=PRESS, **asked)["answer"] for one in texts]
    folder, wrong, done = tmp_path / "shared", [], threading.Event()
    ContextStore(folder)

    def work(seed: int) -> None:
        store, chance = ContextStore(folder, max_bytes=bound), random.Random(seed)
        for _ in range(6):
            index = chance.randrange(len(texts))
            context = store.get_or_read(pipe, texts[index], press=PRESS)
            if pipe(context, **asked)["answer"] != expected[index]:
                wrong.append(index)

    def look() -> None:
        while not done.is_set():
            for path in folder.glob(f"*{SUFFIX}"):
                try:
                    CachedContext.load(path, pipe.model)
                except CacheFileError as error:
                    wrong.extend([str(error)] if path.exists() else [])

    threads = [threading.Thread(target=_noting(work, wrong), args=(seed,)) for seed in range(3)]
    watcher = threading.Thread(target=_noting(look, wrong))
    for thread in (*threads, watcher):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    watcher.join()
    assert not wrong, wrong
    assert 0 < ContextStore(folder).total_bytes <= bound
    assert not [one for one in folder.iterdir() if one.name.startswith(".")]


def _noting(work: Callable[..., None], errors: list[Any]) -> Callable[..., None]:
    def noted(*arguments: Any) -> None:
        try:
            work(*arguments)
        except Exception as error:
            errors.append(error)

    return noted


def test_what_a_killed_writer_left_is_removed_a_day_later(tmp_path: Path) -> None:
    for name, age in ((".old", ABANDONED_S + 60), (".new", 60), ("yours", ABANDONED_S + 60)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "unfinished").write_bytes(b"half")
        os.utime(folder, (time.time() - age,) * 2)
    ContextStore(tmp_path)
    assert {one.name for one in tmp_path.iterdir()} == {".new", "yours"}


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheFileError, match=r"file cannot be used as a store"):
        ContextStore(tmp_path / "file")
    with pytest.raises(InvalidInputError, match="Protocol not known: s4"):
        ContextStore("s4://bucket")
    for bound in (0, -1, True, 1.5, "9GB"):
        with pytest.raises(InvalidInputError, match=r"max_bytes is .*; give a number of bytes"):
            ContextStore(tmp_path, max_bytes=bound)  # type: ignore[arg-type]


def test_presses_that_hide_tokens_and_pin_sinks_are_stored_too(tmp_path: Path) -> None:
    pipe, store = ours(), ContextStore(tmp_path)
    for press in (
        lambda: Compose([kvpress.AdaKVPress(kvpress.SnapKVPress(0.5, **SNAP)), TurboQuant(bits=4)]),
        lambda: Compose([StreamingLLM(0.4, n_sink=9), TurboQuant(bits=2, detect_sinks=5)]),
        lambda: None,
    ):
        expected = pipe(LONG, questions=QUESTIONS, press=press(), **TOKENS)["answers"]
        store.get_or_read(pipe, LONG, press=press())
        found = store.get(pipe, LONG, press=press())
        assert found is not None
        assert pipe(found, questions=QUESTIONS, **TOKENS)["answers"] == expected
