"""The report: memory is summed from storage, time is read from the clock."""

import io
import json
import time

import kvpress
import pytest
import torch
from rich.console import Console
from transformers import DynamicCache

from quantpress.cache import cache_memory
from quantpress.pipelines.report import Report, Stopwatch, format_bytes
from quantpress.presses import AdaKV, Compose, Knorm, SnapKV, TurboQuant
from tests.pipelines.words import ours, text
from tests.tiny_models import tiny_model

CONTEXT = text(999)  # and a bos token: 1000
PRESSES = {
    "none": lambda: None,
    "evicted": lambda: Knorm(0.5),
    "masked": lambda: kvpress.AdaKVPress(kvpress.KnormPress(0.5)),
    "packed": lambda: TurboQuant(bits=4),
    "evicted and packed": lambda: Compose([SnapKV(0.5, window_size=16), TurboQuant(bits=2)]),
    "masked and packed": lambda: Compose([AdaKV(Knorm(0.5)), TurboQuant(bits=2)]),
}


def _asked(press, **options):
    cache = DynamicCache()
    arguments = {"questions": ["w1", "w2 w3"], "max_new_tokens": 5, "report": True}
    return ours()(CONTEXT, press=press, cache=cache, **arguments | options), cache


def _tensors_in(held, seen):
    """Every tensor that can be reached from an object."""
    if isinstance(held, torch.Tensor):
        yield held
    elif id(held) not in seen and not isinstance(held, (str, type)):
        seen.add(id(held))
        parts = held.values() if isinstance(held, dict) else held if isinstance(held, (list, tuple)) else ()
        for part in (*parts, *getattr(held, "__dict__", {}).values()):
            yield from _tensors_in(part, seen)


@pytest.mark.parametrize("name", PRESSES)
def test_bytes_are_those_of_the_stored_tensors(name):
    result, cache = _asked(PRESSES[name]())
    report = result["report"]
    storages = {}
    for layer in cache.layers:
        for tensor in _tensors_in(layer, set()):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    assert report.resident_bytes == sum(storages.values())
    config = tiny_model("llama").config
    per_token = config.num_hidden_layers * config.num_key_value_heads * 32 * 2 * 4  # float32
    assert report.uncompressed_bytes == 1000 * per_token
    assert report.ratio == pytest.approx(report.uncompressed_bytes / report.resident_bytes)
    values = per_token * report.tokens_kept / 4
    assert report.bits_per_value == pytest.approx(8 * report.resident_bytes / values)
    assert (report.tokens_seen, report.new_tokens) == (1000, 10)


def test_tokens_kept_are_those_stored():
    kept = {name: _asked(make(), max_new_tokens=1)[0]["report"].tokens_kept for name, make in PRESSES.items()}
    assert kept == {
        "none": 1000,
        "evicted": 500,
        "masked": 1000,
        "packed": 1000,
        "evicted and packed": 500,
        "masked and packed": 500,
    }


def test_packing_shows_in_the_ratio():
    ratio = {name: _asked(make(), max_new_tokens=1)[0]["report"].ratio for name, make in PRESSES.items()}
    assert ratio["none"] == ratio["masked"] == 1.0
    assert ratio["evicted"] == 2.0
    assert ratio["packed"] > ratio["evicted"]
    assert ratio["evicted and packed"] > ratio["packed"]
    assert ratio["masked and packed"] > ratio["packed"]


class _Slow(kvpress.KnormPress):
    def compress(self, *args):
        time.sleep(0.05)
        return super().compress(*args)


class _SlowAtExit(kvpress.KnormPress):
    def __call__(self, model):
        class Context:
            def __enter__(self):
                return None

            def __exit__(self, *_):
                time.sleep(0.15)

        return Context()


@pytest.mark.parametrize("press", [_Slow(0.5), _SlowAtExit(0.5)], ids=["in hooks", "at exit"])
def test_seconds_of_presses_are_not_seconds_of_the_model(press):
    start = time.perf_counter()
    result, _ = _asked(press, max_new_tokens=1)
    total = time.perf_counter() - start
    report = result["report"]
    assert report.compress_s >= 0.15
    assert 0 < report.prefill_s < total - 0.15
    assert 0 < report.decode_s < total - 0.15
    assert report.prefill_s + report.compress_s + report.decode_s <= total


def test_without_a_report_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(Stopwatch, "now", lambda self: pytest.fail("a clock was read"))
    assert set(ours()(CONTEXT, max_new_tokens=1)) == {"answer"}


def test_the_answers_do_not_depend_on_the_report():
    result, _ = _asked(PRESSES["evicted and packed"]())
    assert _asked(PRESSES["evicted and packed"](), report=False)[0] == {"answers": result["answers"]}


def test_a_report_is_json_and_a_table():
    report = Report(4000, 2000.0, 4.25, 3 * 2**20, 12 * 2**20, 1.5, 0.25, 2.0, 8)
    assert json.loads(json.dumps(report.as_dict()))["ratio"] == 4.0
    assert report.as_dict()["tokens_per_s"] == 4.0
    console = Console(width=80, file=io.StringIO())
    console.print(report)
    shown = console.file.getvalue()
    assert "ratio" in str(report)
    for words in ("4,000", "2,000", "4.25", "3.0 MiB", "12.0 MiB", "4.00x", "1.50 s", "8 (4.0 a second)"):
        assert words in shown
        assert words in str(report)


def test_an_empty_cache_has_a_report():
    memory = cache_memory(DynamicCache())
    report = Report.measured(memory, 0, {"prefill": 0.0, "compress": 0.0, "decode": 0.0}, 0)
    assert (report.ratio, report.tokens_per_s, report.tokens_kept) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 2**30, "5.0 GiB"), (2**42, "4096.0 GiB")],
)
def test_bytes_for_people(count, shown):
    assert format_bytes(count) == shown


def test_the_stopwatch_keeps_nested_compressing_apart(monkeypatch):
    watch, moments = Stopwatch(torch.device("cpu")), iter([10.0, 11.0, 15.0, 17.0])
    monkeypatch.setattr(watch, "now", lambda: next(moments))
    with watch.measure("prefill"):  # from 10 to 17
        watch.start()  # from 11 to 15
        watch.stop()
        watch.stop()  # counts nothing without a start
    assert watch.seconds == {"prefill": 3.0, "compress": 4.0, "decode": 0.0}
