"""What docs/build.py writes is what is committed."""

import importlib.util
import json
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from quantpress.evaluation.results.statistics import Estimate

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """docs/build.py as a module; docs/ is no package, and its names go again."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    spec = importlib.util.spec_from_file_location("build", DOCS / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(DOCS):
                del sys.modules[name]


def measured_now(catalogue: Any) -> set[str]:
    """The last press of each kind, and three others that differ from run to run."""
    names = {entry.kind: name for name, entry in catalogue.items()}.values()
    return {*names, *random.sample(sorted(set(catalogue) - set(names)), 3)}


def test_nothing_is_stale(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few presses are measured again; `tests/presses/test_matrix.py` counts the bytes of every one."""
    table = build.press_table
    names, write_row = measured_now(table.CATALOGUE), table.row
    lines = table.PAGE.read_text(encoding="utf-8").splitlines()
    committed = {line.split("`")[1]: table.PERCENT.findall(line) for line in lines if line.startswith("| `")}

    def row(name: str, press_class: type) -> Any:
        if name in names or not committed.get(name):
            return write_row(name, press_class)
        seen, plain, packed = (int(share) / 100 for share in committed[name])
        shares = iter([table.Measured(seen, plain), table.Measured(seen, packed)])
        with monkeypatch.context() as patch:
            patch.setattr(table, "measure", lambda model, press: next(shares))
            return write_row(name, press_class)

    monkeypatch.setattr(table, "row", row)
    monkeypatch.setattr(sys, "argv", ["build.py", "--check"])
    build.main()


def test_tables_of_measurements_are_those_of_their_results(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["build.py", "--check", "tables"])
    build.main()


def test_another_figure_is_noticed(build: ModuleType) -> None:
    build.tables.results("attention_h100")["rows"][0]["bf16_us"] += 1
    try:
        assert build.tables.stale() == ["speed.md"]
    finally:
        build.tables.results.cache_clear()


def test_a_picture_of_another_figure_is_noticed(build: ModuleType) -> None:
    rows = build.tables.results("evaluation_quick")["fidelity"]
    (preset,) = (row for row in rows if row["arm"] == "preset small")
    preset["bits_per_value"] += 1
    try:
        assert build.tables.pictures.stale() == ["front.png", "divergence.png"]
    finally:
        build.tables.results.cache_clear()


def test_the_readme_is_one_screen() -> None:
    """Install comes first, the table and the picture are of one run, and ranges are those of the package."""
    lines = (DOCS.parent / "README.md").read_text(encoding="utf-8").splitlines()
    readme, packages = "\n".join(lines), (DOCS.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert len(lines) <= 100
    assert any(line.startswith("pip install") for line in lines[:20])
    assert re.findall(r"<!-- table: (\S+) -->", readme) == ["first"]
    assert re.findall(r"!\[.*\]\((.*)\)", readme) == ["docs/front.png"]
    ranges = re.findall(r"`(\w+>=\S+)`", readme)
    assert len(ranges) == 3 and all(f'"{one}"' in packages for one in ranges)


def test_every_table_stands_in_one_page(build: ModuleType) -> None:
    names = [
        found["name"]
        for page in build.tables.PAGES
        for found in build.tables.MARKED.finditer(page.read_text(encoding="utf-8"))
    ]
    assert sorted(names) == sorted(build.tables.TABLES)


@pytest.mark.parametrize("path", sorted((DOCS / "results").glob("*.json")), ids=lambda path: path.stem)
def test_results_say_where_they_were_measured(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert {"command", "date", "machine", "versions", "source"} <= set(found)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])


def test_results_of_the_command_make_the_same_tables(build: ModuleType) -> None:
    """`quantpress eval --json` has ratios, from which bytes over the budget follow."""
    evaluation, kl = build.tables.evaluation, Estimate(0.1, None, None)
    rows = [
        {"arm": "SnapKV, 100 tokens, 4 bits", "ratio": 4.0, "budget": 0.25, "kl": kl},
        {"arm": "KVzip within 0.25, 4 bits", "ratio": 3.2, "budget": 0.25, "kl": replace(kl, value=0.05)},
    ]
    for row in rows:
        row.update(dict.fromkeys(("kl_median", "kl_p99", "agreement", "perplexity_ratio"), kl))
    evaluation.results("evaluation_full")["grid"] = rows
    try:
        assert "| KVzip | **0.0500** (+25% bytes) |" in evaluation.evictors("evaluation_full", 0.25)
    finally:
        evaluation.results.cache_clear()


def test_what_was_measured_in_vllm_stands_there_once_it_was(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files as the two benchmarks write them, with the fields of every result."""
    vllm, kl = build.tables.vllm, Estimate(0.002, 0.001, 0.003)
    missing = vllm.measured("not_there")
    about = {
        "command": "python x.py",
        "machine": "one GPU",
        "date": "2026-11-29",
        "versions": {"torch": "2.13+cpu"},
    }
    first = {"cache": "bf16", "tokens": 8192, "sequences": 1, "fit": 1000, "first_s": 2.0, "step_ms": 8.0}
    other = {**first, "cache": "quantpress_3bit", "fit": 4500, "step_ms": 6.0}
    unread = {**first, "tokens": 131072, "first_s": vllm.Nothing()}
    unfit = {**unread, "tokens": 8192, "sequences": 64, "step_ms": vllm.Nothing()}
    times = {**about, "rows": [first, other, unfit, {**other, "sequences": 64}, unread]}
    row = {
        "arm": "vLLM, quantpress_4bit, profile",
        "dtype": "float32",
        "bits": 4,
        "kl": kl,
        "ratio": kl,
        "to_preset": kl,
    }
    losses = {**about, "model": "tiny", "documents": 6, "context": 1024, "scored_tokens": 128}
    losses["rows"] = [{**row, "arm": "3", "bits": 3}, row, {**row, "dtype": "bfloat16"}]
    found = {"vllm_decode": times, "vllm_quality": losses}
    monkeypatch.setattr(vllm, "measured", found.get)
    speed, quality = vllm.speed(), vllm.quality()
    assert missing is None and "on one GPU (2026-11-29; torch 2.13)" in speed
    assert "| 8192 x 1 | 8.00 | 6.00 (0.75x) |" in speed
    assert "| 8192 x 64 | does not fit | 6.00 |" in speed
    assert "| 131072 x 1 | 8.00 | not run |" in speed and speed.count("131072 x 1") == 1
    assert "| 1,000 | 4,500 (4.50x) |" in speed
    lines = [line for line in quality.splitlines() if "0.00200 [0.00100, 0.00300]" in line]
    assert [line.split(" |")[0] for line in lines] == ["| vLLM, quantpress_4bit, profile", "| 3"]
    assert lines[1].endswith("|  |  |  |") and "1024 tokens and 128 tokens that are scored" in quality
    found.clear()
    assert vllm.speed() == vllm.quality() == ""


def test_attention_of_two_gpus(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with FP8, as benchmarks/attention.py writes it, beside one without."""
    speed = build.tables.speed
    times = {width: speed.Times(50.0, 2.4) for width in speed.WIDTHS}
    row = {"batch": 1, **speed.USUAL, "tokens": 8192, "layout": "contiguous", "bf16_us": 120.0, **times}
    fp8 = {"fp8_us": 60.0, "fp8_way": "Triton, 64 tokens", "fp8_error": 2e-3, "errors": {"4/4": 3e-3}}
    new = {"date": "2026-11-30", "versions": {"torch": "2.11.0+cu130"}}
    new["rows"] = [{**row, **fp8}, {**row, **fp8, "batch": 64}, {**row, **fp8, "layout": "table"}]
    old = {"date": "2026-11-22", "versions": {"torch": "2.11"}, "rows": [row]}
    monkeypatch.setattr(speed, "by_gpu", lambda name: {"H200": new, "H100": old})
    short, full = speed.attention_short().splitlines(), speed.attention_full().splitlines()
    assert short[2].startswith("| H200 | 1 | 8192 | 120.0 | 60.0 (2.00x) | 50.0 (2.40x, 1.20x) |")
    assert short[3].startswith("| H200 | 64 |") and len(short) == 5
    assert short[4].startswith("| H100 | 1 | 8192 | 120.0 |  | 50.0 (2.40x) |")
    assert full[0] == (
        "On the H200 (2026-11-30, torch 2.11.0), the least ratio to bfloat16 is 2.40x, and to fp8 1.20x; "
        "the largest relative error is 3.0e-03. fp8 is Triton in 2 of 2 rows, with a relative error of at "
        "most 2.0e-03."
    )
    assert "| 120.0 | 60.0 (2.00x) | Triton | 50.0 (2.40x, 1.20x) |" in full[4]
    assert full[7] == "On the H100 (2026-11-22, torch 2.11), the least ratio to bfloat16 is 2.40x."


def test_a_change_of_the_press_table_is_noticed(build: ModuleType) -> None:
    """Percentages may move by a little, everything else not at all."""
    differences = build.press_table.differences
    old = "| a | stacks | 50 % | 23 % |\n"
    assert not differences(old, old.replace("23", "24"))
    for new in (old.replace("23", "30"), old.replace("stacks", "refused"), old + "more", "x"):
        assert differences(old, new)
