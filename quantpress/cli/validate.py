"""`quantpress validate`: the codec measured on random vectors, beside what theory says of it."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from quantpress.cli.output import Outcome, new_table, progress

if TYPE_CHECKING:
    from quantpress.codecs.reports import CodecReport

DEFAULT_BITS = (1.0, 2.0, 2.5, 3.0, 3.5, 4.0, 8.0)
DEFAULT_HEAD_DIMS = (64, 128, 256)


@dataclass(frozen=True)
class Check:
    """One codec.

    Args:
        role: "key" or "value".
        bits: code width.
        report: what was measured and what is expected.
    """

    role: str
    bits: float
    report: "CodecReport"

    @property
    def ok(self) -> bool:
        """Whether it is as exact as its codebook says and, up to noise, within the bounds of theory."""
        report = self.report
        if report.paper_bound is None:
            return report.ok
        noise = 5 * report.standard_error
        return report.ok and report.shannon - noise <= report.distortion <= report.paper_bound + noise


@dataclass(frozen=True)
class Validated(Outcome):
    """All codecs that were measured."""

    checks: tuple[Check, ...]

    @property
    def exit_status(self) -> int:
        """1 when a bound failed."""
        return int(not all(check.ok for check in self.checks))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        rows = [
            {"role": check.role, "bits": check.bits, "ok": check.ok, **asdict(check.report)}
            for check in self.checks
        ]
        return {"ok": not self.exit_status, "codecs": rows}

    def __rich__(self) -> RenderableType:
        codec = ("head\ndim", "bits", "of")
        exact = new_table(
            "Distortion E|x - x^|^2 / |x|^2 of random vectors",
            (*codec, "measured", "expected", "Lloyd-Max", "Shannon", "bound", ""),
            words=("of", ""),
            caption="expected: from the codebook and the scale rule. Lloyd-Max: the best scalar code. "
            "Shannon: what no code of as many bits can beat. bound: Theorem 1 of TurboQuant, arXiv "
            "2504.19874, group by group, where it applies.",
        )
        biased = new_table(
            "Bias of inner products, E<x, x^> / |x|^2 - 1",
            (*codec, "true\nbits", "measured", "expected"),
            words=("of",),
        )
        for check in self.checks:
            one = check.report
            name = (str(one.head_dim), f"{check.bits:g}", check.role)
            figures = (one.distortion, one.expected, one.optimum, one.shannon)
            exact.add_row(
                *name,
                *(f"{figure:.3g}" for figure in figures),
                "" if one.paper_bound is None else f"{one.paper_bound:.3g}",
                Text("ok", "green") if check.ok else Text("FAILED", "bold red"),
            )
            biases = (f"{bias:+.4f}" for bias in (one.bias, one.expected_bias))
            biased.add_row(*name, f"{one.bits_per_value:.3f}", *biases)
        return Group(exact, biased)


def validate(
    bits: Annotated[
        list[float] | None, typer.Option(help="Code width, such as 3 or 2.5; may be repeated; else all.")
    ] = None,
    head_dim: Annotated[
        list[int] | None, typer.Option(help="Dimension of the vectors; may be repeated; else 64, 128, 256.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Vectors for each codec.", min=1)] = 4096,
    seed: Annotated[int, typer.Option(help="Of the vectors.")] = 0,
    rotation: Annotated[str, typer.Option(help="hadamard, haar or identity.")] = "hadamard",
    scale: Annotated[str, typer.Option(help="auto, norm_corrected, unbiased or norm.")] = "auto",
    codebook: Annotated[str, typer.Option(help="int8 or lloyd_max.")] = "int8",
    estimator: Annotated[str, typer.Option(help="mse or prod.")] = "mse",
) -> Validated:
    """Measure the codec against theory on random vectors; exit status 1 when a bound fails."""
    from quantpress.codecs.turboquant import TurboQuantCodec
    from quantpress.quantization.spec import ROLES

    spec = {"rotation": rotation, "scale": scale, "codebook": codebook, "estimator": estimator}
    codecs = [
        (width, TurboQuantCodec(dim, width, role, **spec))
        for dim in head_dim or DEFAULT_HEAD_DIMS
        for width in bits or DEFAULT_BITS
        for role in ROLES
    ]
    checks = [
        Check(codec.spec.role, width, codec.validate(samples, seed))
        for width, codec in progress(codecs, "measuring", len(codecs))
    ]
    return Validated(tuple(checks))
