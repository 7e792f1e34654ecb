"""`quantpress validate`: the codec measured on random vectors, beside what theory says of it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from quantpress.cli.output import progress
from quantpress.codecs.reports import CodecReport
from quantpress.codecs.turboquant import TurboQuantCodec
from quantpress.quantization.spec import ROLES

DEFAULT_BITS = (1.0, 2.0, 2.5, 3.0, 3.5, 4.0, 8.0)
DEFAULT_HEAD_DIMS = (64, 128, 256)


@dataclass(frozen=True)
class Check:
    """One codec.

    Args:
        role: "key" or "value".
        bits: code width.
        report: measured and expected.
    """

    role: str
    bits: float
    report: CodecReport

    @property
    def ok(self) -> bool:
        """Whether it is as exact as its codebook says and, but for sampling, within the bounds of theory."""
        report = self.report
        if report.paper_bound is None:
            return report.ok
        room = 5 * report.standard_error
        return report.ok and report.shannon - room <= report.distortion <= report.paper_bound + room


@dataclass(frozen=True)
class Validated:
    """Every codec that was measured."""

    checks: tuple[Check, ...]

    @property
    def exit_status(self) -> int:
        """1 when a bound failed."""
        return int(not all(check.ok for check in self.checks))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        rows = [
            {
                "role": check.role,
                "bits": check.bits,
                "ok": check.ok,
                **asdict(check.report),
            }
            for check in self.checks
        ]
        return {"ok": not self.exit_status, "codecs": rows}

    def __rich__(self) -> Table:
        table = Table(
            title="Distortion E|x - x^|^2 / |x|^2 of random vectors",
            caption="expected: from the codebook and the scale rule. Lloyd-Max: the best scalar code. "
            "Shannon: what no code of as many bits can beat. bound: Theorem 1 of TurboQuant, arXiv "
            "2504.19874, group by group.",
        )
        names = (
            "head\ndim",
            "bits",
            "of",
            "true\nbits",
            "measured",
            "expected",
            "Lloyd-Max",
            "Shannon",
            "bound",
        )
        for name in (*names, "bias", "bias\nexpected", ""):
            table.add_column(name, justify="left" if name in ("of", "") else "right", no_wrap=True)
        for check in self.checks:
            one = check.report
            figures = (one.distortion, one.expected, one.optimum, one.shannon)
            table.add_row(
                str(one.head_dim),
                f"{check.bits:g}",
                check.role,
                f"{one.bits_per_value:.3f}",
                *(f"{figure:.3g}" for figure in figures),
                "" if one.paper_bound is None else f"{one.paper_bound:.3g}",
                *(f"{figure:+.4f}" for figure in (one.bias, one.expected_bias)),
                Text("ok", "green") if check.ok else Text("FAILED", "bold red"),
            )
        return table


def main(
    bits: Sequence[float] = DEFAULT_BITS,
    head_dims: Sequence[int] = DEFAULT_HEAD_DIMS,
    samples: int = 4096,
    seed: int = 0,
    **spec: str,
) -> Validated:
    """Measure codecs.

    Args:
        bits: code widths.
        head_dims: dimensions.
        samples: vectors for each.
        seed: of the vectors.
        **spec: rotation, scale, codebook, estimator, as for `CodecSpec`.

    Raises:
        InvalidInputError: there is no such codec.
    """
    wanted = [(dim, width, role) for dim in head_dims for width in bits for role in ROLES]
    codecs = [(width, TurboQuantCodec(dim, width, role, **spec)) for dim, width, role in wanted]
    checks = []
    for width, codec in progress(codecs, "measuring", len(codecs)):
        report = codec.validate(samples, seed)
        checks.append(Check(codec.spec.role, width, report))
    return Validated(tuple(checks))
