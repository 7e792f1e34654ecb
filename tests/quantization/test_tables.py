"""The shipped table against what the mathematics gives today."""

import json
from pathlib import Path

import pytest

from quantpress.quantization import tables
from quantpress.quantization.codebook import _shipped, codebook, compute_codebook


@pytest.mark.parametrize("form", ["int8", "lloyd_max"])
@pytest.mark.parametrize(("bits", "dim"), [(1, 32), (2, 64), (3, 64), (4, 128), (3, 40), (4, 80), (2, 256)])
def test_rows_are_what_is_computed(form: str, bits: int, dim: int) -> None:
    assert f"{form}/{bits}/{dim}" in _shipped()
    shipped, computed = codebook(bits, dim, form), compute_codebook(bits, dim, form)
    assert shipped.scaled == pytest.approx(computed.scaled, rel=1e-9)
    assert shipped.unit == pytest.approx(computed.unit, rel=1e-6)  # a flat minimum: its place is less exact
    assert shipped.distortion == pytest.approx(computed.distortion, rel=1e-9)


@pytest.mark.parametrize(("form", "near"), [("int8", 1e-6), ("lloyd_max", 1e-8)])
def test_eight_bits_of_whole_heads_are_there(form: str, near: float) -> None:
    shipped, computed = codebook(8, 128, form), compute_codebook(8, 128, form)
    assert f"{form}/8/128" in _shipped()
    assert shipped.levels == pytest.approx(computed.levels, rel=near)


def test_every_group_of_every_common_split_is_there() -> None:
    from quantpress.quantization.budget import split_channels

    for dim in tables.HEAD_DIMS:
        for bits in (1, 2, 3, 4, 1.5, 2.25, 2.5, 2.75, 3.25, 3.5, 3.75):
            for group in split_channels(bits, dim):
                assert f"int8/{group.bits}/{group.channels}" in _shipped()


def test_the_command_writes_a_table_that_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "__file__", str(tmp_path / "tables.py"))
    monkeypatch.setattr(tables, "HEAD_DIMS", (32,))
    monkeypatch.setattr(tables, "SPLITS", (1 + 1 / 4, 1 + 1 / 2))
    tables.main()
    rows = json.loads((tmp_path / "codebooks.json").read_text(encoding="utf-8"))
    assert rows["lloyd_max/8/32"]["scaled"] == pytest.approx(_shipped()["lloyd_max/8/32"]["scaled"], rel=1e-8)
    assert {name: row["scaled"] for name, row in rows.items() if name.startswith("int8/")} == {
        name: _shipped()[name]["scaled"] for name in rows if name.startswith("int8/")
    }


def test_a_codebook_outside_the_table_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = codebook(3, 64, "int8")
    monkeypatch.setattr("quantpress.quantization.codebook._shipped", dict)
    codebook.cache_clear()
    try:
        assert codebook(3, 64, "int8").levels == pytest.approx(expected.levels, rel=1e-6)
    finally:
        codebook.cache_clear()
