"""The pictures of a run, with matplotlib (`pip install quantpress[eval]`)."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantpress.errors import InvalidInputError, extra
from quantpress.evaluation.results.records import Record, Records
from quantpress.evaluation.results.summary import DivergenceRow, Findings, pareto_front

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
MEBIBYTE = 2**20
MARKERS = "os^Dv"


def check_matplotlib() -> None:
    """Check for matplotlib before a long run rather than after it.

    Raises:
        InvalidInputError: matplotlib is not installed.
    """
    _figure_class()


def write_figures(records: Records, findings: Findings, folder: Path) -> list[Path]:
    """Draw every figure that there are results for.

    Args:
        records: records of a run.
        findings: findings of the same run.
        folder: folder for the PNG files.

    Returns:
        Paths of the files.

    Raises:
        InvalidInputError: matplotlib is not installed.
    """
    drawn = {
        "needles": needle_map(records),
        "divergence": divergence_plot(findings.fidelity),
        "memory": memory_plot(records),
        "attention": attention_plot(records),
        "front": front_plot(findings.grid),
    }
    paths = []
    for name, figure in drawn.items():
        if figure is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=DPI)
            paths.append(path)
    return paths


def needle_map(records: Records) -> "Figure | None":
    """Score of the needle by length and depth, one map for each arm."""
    arms: dict[str, list[Record]] = defaultdict(list)
    for line in records.of("tasks"):
        if line["depth"] is not None:
            arms[line["arm"]].append(line)
    if not arms:
        return None
    columns = min(4, len(arms))
    rows = -(-len(arms) // columns)
    figure = _figure(3.2 * columns, 2.6 * rows)
    for index, (arm, lines) in enumerate(arms.items(), 1):
        lengths = sorted({line["tokens"] for line in lines})
        depths = sorted({line["depth"] for line in lines})
        scores = np.full((len(depths), len(lengths)), np.nan)
        for i, depth in enumerate(depths):
            for j, length in enumerate(lengths):
                found = [one["score"] for one in lines if (one["depth"], one["tokens"]) == (depth, length)]
                scores[i, j] = np.mean(found) if found else np.nan
        axes = figure.add_subplot(rows, columns, index)
        axes.imshow(scores, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_title(arm, fontsize=8)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=7)
        axes.set_xlabel("tokens", fontsize=7)
        axes.set_ylabel("depth of the needle", fontsize=7)
    return figure


def divergence_plot(rows: Sequence[DivergenceRow]) -> "Figure | None":
    """KL against bits a value, with intervals; the uncompressed cache is the floor."""
    if not rows:
        return None
    figure = _figure(10, 5.5)
    axes = figure.add_subplot()
    for index, row in enumerate(rows):
        if row.kl.value == 0:  # nowhere on a logarithmic axis
            continue
        if row.ratio == 1:
            axes.axhline(row.kl.value, color="grey", linestyle=":", label=f"{row.arm}: rounding alone")
        else:
            _point(axes, row.bits_per_value, row, label=row.arm, **_look(index))
    axes.set_yscale("log")
    axes.set_xlabel("bits a value, measured, all tokens read in the denominator")
    axes.set_ylabel("KL to the uncompressed model, nats")
    _legend(figure)
    return figure


def memory_plot(records: Records) -> "Figure | None":
    """Resident bytes against tokens read, one line for each arm."""
    arms: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in records.of("tasks"):
        if line["depth"] is not None:
            arms[line["arm"]][line["tokens"]].append(line["resident_bytes"] / MEBIBYTE)
    if not arms:
        return None
    figure = _figure(8, 5)
    axes = figure.add_subplot()
    for index, (arm, lengths) in enumerate(arms.items()):
        ordered = sorted(lengths)
        means = [np.mean(lengths[tokens]) for tokens in ordered]
        axes.plot(ordered, means, markersize=4, label=arm, **_look(index))
    axes.set_xlabel("tokens of the context")
    axes.set_ylabel("resident bytes of the cache, MiB")
    _legend(figure)
    return figure


def attention_plot(records: Records) -> "Figure | None":
    """Error of the attention output by layer, one line for each arm."""
    arms: dict[str, list[Any]] = defaultdict(list)
    layers: list[int] = []
    for line in records.of("fidelity"):
        if line["attention"]:
            arms[line["arm"]].append(line["attention"]["output"])
            layers = line["attention"]["layers"]
    if not arms:
        return None
    figure = _figure(10, 5.5)
    axes = figure.add_subplot()
    for index, (arm, errors) in enumerate(arms.items()):
        by_layer = np.mean(errors, axis=(0, 2))
        if by_layer.max() > 0:
            axes.plot(layers, by_layer, label=arm, linewidth=1, markersize=3, **_look(index))
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel("error of the attention output, mean of its heads")
    _legend(figure)
    return figure


def front_plot(rows: Sequence[DivergenceRow]) -> "Figure | None":
    """KL against the share of the bytes, one colour for each width, and the Pareto front."""
    if not rows:
        return None
    figure = _figure(8, 5.5)
    axes = figure.add_subplot()
    colours: dict[str, str] = {}
    for row in rows:
        width = row.arm.rpartition(", ")[2]
        known = width in colours
        colour = colours.setdefault(width, f"C{len(colours)}")
        _point(axes, 1 / row.ratio, row, label=None if known else width, marker="o", color=colour)
    front = pareto_front(rows)
    axes.step([1 / row.ratio for row in front], [row.kl.value for row in front], where="post", color="black")
    for row in front:
        axes.annotate(row.arm, (1 / row.ratio, row.kl.value), (4, 3), textcoords="offset points", fontsize=7)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("bytes of the cache, as a part of all tokens read, uncompressed")
    axes.set_ylabel("KL to the uncompressed model, nats")
    axes.legend(fontsize=7)
    return figure


def _point(axes: Any, x: float, row: DivergenceRow, **look: Any) -> None:
    value, low, high = row.kl.value, row.kl.low, row.kl.high
    spread = None if low is None or high is None else [[max(0, value - low)], [max(0, high - value)]]
    axes.errorbar([x], [value], yerr=spread, linestyle="", markersize=5, capsize=2, **look)


def _look(index: int) -> dict[str, Any]:
    """A colour and a marker; the marker changes where the colours repeat."""
    return {"color": f"C{index % 10}", "marker": MARKERS[index // 10 % len(MARKERS)]}


def _legend(figure: "Figure") -> None:
    figure.legend(fontsize=7, loc="outside right upper")


def _figure(width: float, height: float) -> "Figure":
    return _figure_class()(figsize=(width, height), layout="constrained")


def _figure_class() -> "type[Figure]":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidInputError(
            f"figures are drawn with matplotlib, which is not installed: pip install {extra('eval')}, or "
            "leave them out with --no-figures"
        ) from error
    made: type[Figure] = Figure
    return made
