"""kvpress's own evaluation (LongBench, RULER, its leaderboard) with a quantizer behind its presses.

In a checkout of https://github.com/NVIDIA/kvpress, with what its evaluation needs installed:

    python -m quantpress.evaluation.adapters.kvpress_evaluation evaluation/ --dataset ruler
        --data_dir 4096 --model <id> --press_name snapkv+turboquant3 --compression_ratio 0.5

Every name of its registry can be followed by + and one of `QUANTIZERS`; no_press+turboquant4 is the
quantizer alone. Ratios, thresholds and windows are set as its evaluation sets them, results go where it puts
them, and a name without + is kvpress's own, through our pipeline.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from quantpress.errors import InvalidInputError
from quantpress.pipelines import register
from quantpress.presses import Compose, TurboQuant
from quantpress.presses.base_press import BasePress

QUANTIZERS: dict[str, Callable[[], TurboQuant]] = {
    "turboquant_quality": lambda: TurboQuant(key_bits=8, value_bits=4),
    "turboquant4": lambda: TurboQuant(bits=4),
    "turboquant3": lambda: TurboQuant(bits=3),
    "turboquant2": lambda: TurboQuant(bits=2),
}
"""What can follow the + of a press's name."""


class PackingPipeline:
    """A pipeline that puts a quantizer after the press of every call.

    kvpress's evaluation often asks for the class of its press, so it keeps the press that it knows.

    Args:
        pipe: the `TextGenerationPipeline` to call.
        quantizer: put last in every composition.
    """

    def __init__(self, pipe: Any, quantizer: TurboQuant) -> None:
        self.pipe, self.quantizer = pipe, quantizer

    def __call__(self, *args: Any, press: BasePress | None = None, **kwargs: Any) -> Any:
        presses = [self.quantizer] if press is None else [press, self.quantizer]
        return self.pipe(*args, press=Compose(presses), **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)


def quantizer_of(press_name: str) -> TurboQuant | None:
    """The quantizer after the + of a name; None where there is no +.

    Raises:
        InvalidInputError: what follows the + is not one of `QUANTIZERS`.

    Example:
        >>> quantizer_of("snapkv+turboquant3").bits, quantizer_of("snapkv")
        (3, None)
    """
    _, plus, name = press_name.partition("+")
    if not plus:
        return None
    if name not in QUANTIZERS:
        raise InvalidInputError(f"there is no quantizer {name!r}; use one of {', '.join(QUANTIZERS)}")
    return QUANTIZERS[name]()


def load_evaluation(folder: Path) -> Any:
    """Import kvpress's module `evaluate` and add the quantizers to its runner and registry.

    Args:
        folder: `evaluation` of a kvpress checkout; it stays on `sys.path`, for its own imports.

    Raises:
        InvalidInputError: the folder holds no such evaluation, or a package that it needs is not installed.
    """
    if not (folder / "evaluate.py").is_file() or not (folder / "evaluate_registry.py").is_file():
        raise InvalidInputError(f"{folder} holds no evaluate.py; give the folder evaluation/ of kvpress")
    register()
    sys.path.insert(0, str(folder.resolve()))
    try:
        evaluate: Any = import_module("evaluate")
        registry = import_module("evaluate_registry")
    except ImportError as error:
        raise InvalidInputError(
            f"kvpress's evaluation needs {error.name}; install what its README asks for"
        ) from error
    presses = registry.PRESS_REGISTRY
    plain = {name: press for name, press in presses.items() if "+" not in name}
    presses.update({f"{name}+{last}": press for name, press in plain.items() for last in QUANTIZERS})
    if not hasattr(evaluate.EvaluationRunner, "packs"):
        evaluate.EvaluationRunner = packing_runner(evaluate.EvaluationRunner)
    return evaluate


def packing_runner(runner: Any) -> Any:
    """A subclass of kvpress's runner that packs where the name of the press asks for it."""

    class PackingRunner(runner):
        """kvpress's runner, with a quantizer after the press."""

        packs = True
        pipeline: Any

        def _setup_model_pipeline(self) -> None:
            super()._setup_model_pipeline()
            quantizer = quantizer_of(self.config.press_name)
            if quantizer is not None:
                self.pipeline = PackingPipeline(self.pipeline, quantizer)
                self.config.press_init_command = f"{self.press} | {quantizer}"

    return PackingRunner


def main(arguments: Sequence[str]) -> None:
    """Run kvpress's command line.

    Args:
        arguments: the folder of kvpress's evaluation, then its own options.

    Raises:
        InvalidInputError: there is no folder, or its evaluation cannot be loaded.
    """
    if not arguments:
        raise InvalidInputError("give the folder evaluation/ of kvpress, then its options")
    evaluate = load_evaluation(Path(arguments[0]))
    evaluate.Fire(evaluate.CliEntryPoint, command=list(arguments[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
