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
        ('`TurboQuant.preset("quality")`: keys 8, values 4', "TurboQuant quality"),
        ('`TurboQuant.preset("balanced")`, `TurboQuant()`', "TurboQuant 4/4"),
        ('`TurboQuant.preset("small")`', "TurboQuant 3/3"),
        ("`TurboQuant(bits=2)`", "TurboQuant 2/2"),
    ],
)
def test_divergence_of_settings(setting: str, measured: str) -> None:
    evaluation = page("docs/evaluation.md")
    fidelity = evaluation[evaluation.index("### Fidelity") : evaluation.index("### Equal bytes")]
    (row,) = [line for line in fidelity.splitlines() if line.startswith(f"| {measured} |")]
    assert first_number(cells("docs/choosing.md", setting)[2]) == first_number(row.split(" | ")[3])


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
    module = page("presses/sinks.py")
    for name, ours in {"none": "none", "first 4": "first 4 (the default)"}.items():
        (line,) = re.findall(rf"^    {name}  +(\.\d+) +(\.\d+)$", module, re.MULTILINE)
        assert list(line) == [cell.strip(" |") for cell in cells("docs/choosing.md", ours)[1:]]


def test_speed_and_seconds_are_those_of_the_readme() -> None:
    readme, here = page("README.md"), page("docs/choosing.md") + page("docs/limits.md")
    for arm, quoted in {
        "uncompressed": "9.6 s uncompressed",
        "TurboQuant(4)": "14.0 s TurboQuant(4)",
        "StreamingLLM(0.5)": "StreamingLLM 11.9 s",
        "SnapKV(0.5)": "SnapKV 13.2 s",
        "Compactor(0.5)": "Compactor 16.5 s",
    }.items():
        (line,) = re.findall(rf"^ {re.escape(arm)} .*$", readme, re.MULTILINE)
        assert quoted in here and f"{line.split()[-1]} s" in quoted
    ratios = [float(r) for r in re.findall(r"\((\d\.\d+)x\)", readme[readme.index("| 131072 | 181.2") :])][:5]
    assert f"{min(ratios):.1f} to {max(ratios):.1f} times at 131072" in here
