"""Draws the pictures of the pages from docs/results/evaluation_quick.json, with matplotlib.

A PNG file holds the points that it shows as text, so that a changed figure is noticed without drawing.
"""

import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from results import DOCS, results

from quantpress.evaluation.results.figures import DPI, divergence_plot
from quantpress.evaluation.results.summary import pareto_front

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 7, 4.4  # inches, of 100 pixels in a page
OURS, OTHERS = "#c2410c", "#6b7280"
TEXT = "Description"  # a keyword of PNG

SHOWN = {
    "preset quality": ('preset "quality"', (-12, 9), "left"),
    "preset balanced": ('preset "balanced", 4 bits', (9, 2), "left"),
    "preset small": ('preset "small", 3 bits', (-9, -5), "right"),
    "SnapKV(0.5) | preset small": ('SnapKV(0.5) | preset "small"', (9, 5), "left"),
    "int4 per token": ("plain integers, 4 bits", (8, -13), "left"),
    "int4, block Hadamard": ("rotated integers (SAW-INT4), 4 bits", (9, 2), "left"),
    "FP8 per tensor": ("FP8, one scale", (16, 11), "right"),
    "as published 3/3": ("TurboQuant as published, 3 bits", (9, 3), "left"),
    "KIVI 4 bits": ("KIVI, 4 bits", (9, 3), "left"),
    "SnapKV(0.5)": ("SnapKV(0.5)", (-9, 3), "right"),
}
"""Arms of docs/front.png: label, its distance from the point in points, and its alignment."""


def arms() -> list[Any]:
    """Every arm of the quick suite; bits a value stand for bytes, as all have the same tokens."""
    rows = results("evaluation_quick")["fidelity"]
    return [SimpleNamespace(**{"resident_bytes": row["bits_per_value"], **row}) for row in rows]


def shown() -> list[Any]:
    """The arms of docs/front.png."""
    return [row for row in arms() if row.arm in SHOWN]


def draw_front(rows: list[Any]) -> "Figure":
    """KL against bits a value; the presets of this package in colour, the front as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    front = pareto_front(rows)
    line = [row.bits_per_value for row in front], [row.kl.value for row in front]
    axes.plot(*line, color=OURS, alpha=0.35, zorder=1)
    for row in rows:
        label, offset, side = SHOWN[row.arm]
        colour = OURS if "preset" in row.arm else OTHERS
        at = (row.bits_per_value, row.kl.value)
        axes.vlines(at[0], row.kl.low, row.kl.high, color=colour, alpha=0.45, linewidth=1.5)
        axes.plot(*at, "o", color=colour, markersize=7)
        weight = "bold" if colour == OURS else "normal"
        axes.annotate(label, at, offset, textcoords="offset points", ha=side, color=colour, weight=weight)
    axes.annotate(
        "better", (0.03, 0.05), (0.13, 0.2), xycoords="axes fraction", fontsize=12,
        arrowprops={"arrowstyle": "-|>", "color": "black", "linewidth": 1.5},
    )  # fmt: skip
    axes.set_title(
        "Orange: quantpress. Grey: alternatives. Line: the best of these at each size.", fontsize=10
    )
    axes.set_yscale("log")
    axes.set_ylim(0.0006, 0.06)
    axes.set_xlim(2.6, 8.8)
    axes.set_yticks([0.001, 0.003, 0.01, 0.03], ["0.001", "0.003", "0.01", "0.03"])
    axes.minorticks_off()
    axes.set_xlabel("size of the cache: measured bits a value (uncompressed: 16)")
    axes.set_ylabel("KL divergence from uncompressed, nats")
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_all(rows: list[Any]) -> "Figure":
    """The picture that `quantpress eval` draws of the same results."""
    figure = divergence_plot(rows)
    assert figure is not None
    return figure


PICTURES: dict[str, tuple[Callable[[], list[Any]], Callable[[list[Any]], "Figure"]]] = {
    "front.png": (shown, draw_front),
    "divergence.png": (arms, draw_all),
}


def text_of(rows: list[Any]) -> str:
    """The points of a picture, as its file holds them."""
    return "\n".join(f"{row.arm}: {row.bits_per_value} bits a value, {row.kl}" for row in rows)


def stale() -> list[str]:
    """Names of pictures that show other points than the results have; needs Pillow, as matplotlib does."""
    from PIL import Image

    found = []
    for name, (rows, _) in PICTURES.items():
        with Image.open(DOCS / name) as image:
            if image.info.get(TEXT) != text_of(rows()):
                found.append(name)
    return found


def write() -> None:
    """Draw every picture, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is not None:
        for name, (rows, draw) in PICTURES.items():
            draw(rows()).savefig(DOCS / name, dpi=DPI, metadata={TEXT: text_of(rows())})
