"""Figures that one page quotes from another are those that stand there."""

import re

import pytest

from tests.docs.markdown import ROOT


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def cells(name: str, start: str) -> list[str]:
    """The cells of the one row of a page's tables that starts so."""
    (row,) = [line for line in page(name).splitlines() if line.replace("*", "").startswith(f"| {start} |")]
    return [cell.strip() for cell in row.split(" | ")]


def first_number(cell: str) -> float:
    found = re.search(r"\d+\.\d+", cell)
    assert found is not None, cell
    return float(found[0])


@pytest.mark.parametrize(
    ("setting", "measured"),
    [
        ('`TurboQuant.preset("quality")`: keys 8, values 4', "preset quality"),
        ('`TurboQuant.preset("balanced")`', "preset balanced"),
        ('`TurboQuant.preset("small", key_bits=4)`', "preset small, keys 4 bits"),
        ('`TurboQuant.preset("small")`', "preset small"),
        ('`TurboQuant.preset("small", bits=2)`', "preset small, 2 bits"),
        ("`TurboQuant()`", "TurboQuant 4/4"),
        ("`TurboQuant(bits=3)`", "TurboQuant 3/3"),
    ],
)
def test_divergence_of_settings(setting: str, measured: str) -> None:
    here, there = cells("docs/choosing.md", setting), fidelity_cells(measured)
    assert (first_number(here[2]), first_number(here[3])) == (first_number(there[1]), first_number(there[3]))


def fidelity_cells(arm: str) -> list[str]:
    evaluation = page("docs/evaluation.md")
    fidelity = evaluation[evaluation.index("### Fidelity") : evaluation.index("### Against")]
    (row,) = [line for line in fidelity.splitlines() if line.startswith(f"| {arm} |")]
    return [cell.strip() for cell in row.split(" | ")]


@pytest.mark.parametrize(
    ("cache", "measured"),
    [
        ("uncompressed", "uncompressed"),
        ('`TurboQuant.preset("balanced")`, 4 bits', "preset balanced"),
        ('`TurboQuant.preset("small")`, 3 bits', "preset small"),
        ("TurboQuant as published, 3 bits", "as published 3/3"),
        ("KIVI, 4 bits", "KIVI 4 bits"),
        ("plain integers, 4 bits", "int4 per token"),
        ("kvpress's SnapKV(0.5)", "SnapKV(0.5)"),
        ('`SnapKV(0.5) \\| TurboQuant.preset("small")`', "SnapKV(0.5) \\| preset small"),
    ],
)
def test_the_first_table_is_the_evaluations(cache: str, measured: str) -> None:
    readme = page("README.md")
    first = readme[: readme.index("![")]
    (row,) = [line for line in first.splitlines() if line.startswith(f"| {cache} |")]
    kl, agreement, bits = (first_number(cell) for cell in row.split(" | ")[1:4])
    there = fidelity_cells(measured)
    assert (kl, bits) == (first_number(there[3]), first_number(there[1]))
    assert agreement == pytest.approx(100 * first_number(there[6]))


def test_the_first_table_has_the_speed_below_it() -> None:
    readme = page("README.md")
    bf16, four, three = cells("README.md", "131072")[1:4]
    assert f"| {round(float(bf16))} us |" in readme
    for cell in (four, three):
        micros, ratio = re.findall(r"[\d.]+", cell)
        assert f"| {round(float(micros))} us ({ratio}x) |" in readme


def test_the_picture_is_there_and_small() -> None:
    (name,) = re.findall(r"!\[[^\]]+\]\(([^)]+\.png)\)", page("README.md"))
    picture = (ROOT / name).read_bytes()
    assert picture.startswith(b"\x89PNG") and 10_000 < len(picture) < 150_000


@pytest.mark.parametrize(
    ("kept", "quoted"),
    [
        ("SnapKV, 256 tokens, 16 bits", "256 tokens in 16 bits have a KL divergence of"),
        ("SnapKV, 818 tokens, 4 bits", "818\nin 4 bits"),
        ("SnapKV, 968 tokens, 3 bits", "968 in 3 bits"),
        ("every token, 2 bits", "every token in 2 bits"),
    ],
)
def test_divergence_at_equal_bytes(kept: str, quoted: str) -> None:
    text = page("docs/choosing.md")
    here = first_number(text[text.index(quoted) + len(quoted) :].replace(" bits", "", 1))
    row = cells("docs/evaluation.md", kept)
    assert row[1] == "0.2500" and here == pytest.approx(first_number(row[2]), abs=5.1e-4)


def test_sinks_are_those_of_the_module() -> None:
    module = page("presses/packing/sinks.py")
    for name, ours in {"none": "none", "first 4": "first 4 (the default)"}.items():
        (line,) = re.findall(rf"^    {name}  +(\.\d+) +(\.\d+)$", module, re.MULTILINE)
        assert list(line) == [cell.strip(" |") for cell in cells("docs/choosing.md", ours)[1:]]


def test_speed_and_seconds_are_those_of_the_readme() -> None:
    readme, here = page("README.md"), page("docs/choosing.md") + page("docs/limits.md")
    for arm, quoted in {
        "uncompressed": "24.6 s uncompressed",
        "TurboQuant(4)": "26.3 s TurboQuant(4)",
        "StreamingLLM(0.5)": "StreamingLLM 27.3 s",
        "SnapKV(0.5)": "SnapKV 27.0 s",
        "Compactor(0.5)": "Compactor 30.2 s",
    }.items():
        (line,) = re.findall(rf"^ {re.escape(arm)} .*$", readme, re.MULTILINE)
        assert quoted in here and f"{line.split()[-1]} s" in quoted
    ratios = [float(r) for r in re.findall(r"\((\d\.\d+)x\)", readme[readme.index("| 131072 | 181.") :])][:5]
    assert f"{min(ratios):.1f} to {max(ratios):.1f} times at 131072" in here


def test_first_token_is_that_of_the_readme() -> None:
    plain, packed = (cells("README.md", cache)[2] for cache in ("DynamicCache, sdpa", "TurboQuant 3/3 bits"))
    assert f"{packed} to the first token at 131072 tokens on an H100, against {plain} without" in page(
        "docs/choosing.md"
    )


def test_alternatives_are_those_of_the_speed_page() -> None:
    readme = page("README.md")
    quoted = {
        "kvpress's SnapKV(0.5) | 16/16": "| {:.0f} us ({}x) |",
        "turbo-attn 0.70.1 | 3/3": "| {:.0f} us ({}x), in turbo-attn |",
        "turbo-attn 0.70.1 | 4/4": "{:.0f} us (turbo-attn 0.70.1)",
        "quantpress | 4/4": "with ours at {:.1f} us",
    }
    for start, text in quoted.items():
        micros, ratio = re.findall(r"[\d.]+", cells("docs/speed.md", start)[2])
        assert text.format(float(micros), ratio) in readme
    for name in ("turboquant-vllm, paged 1.5.0", "aither-kvcache 2.4.1"):
        micros = float(cells("docs/speed.md", f"{name} | 4/4")[2].split()[0])
        assert f"{micros / 1000:.1f} ms ({name.replace(', paged', '')})" in readme


def test_packing_is_that_of_the_speed_page() -> None:
    speed = page("docs/speed.md")
    table = speed[speed.index("| bits K/V | keys us") :].splitlines()[2:5]
    rows = [[cell.strip("| ") for cell in line.split(" | ")] for line in table]
    micros = [int(keys) + int(values) for _, keys, values, *_ in rows]
    parts = [row[3].split()[0] for row in rows]
    text = "takes {}, {} and {} us in 4, 3 and 2 bits, {}, {} and {} % of".format(*micros, *parts)
    assert text in page("README.md")
