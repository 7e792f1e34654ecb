"""Evaluation: what a press costs in quality and saves in memory, measured on the compressed cache itself.

`evaluate` and `quantpress eval` run all of it; `quantpress demo`, `bench`, `compare`, `inspect` and `memory`
use parts.

evaluation.py           evaluate: a suite over presses, and what it has found
arms.py                 what is compared, with its controls
equal_bytes.py, filled_kvzip.py   arms that take the same bytes: more tokens, or more bits
suites.py, runner.py    how much is measured; runs that can be resumed
attention_fidelity.py, key_statistics.py   attention over packed keys, and the keys, of one model
demo.py                 facts in a book, asked for over several caches
measuring.py            token times, peak memory, the machine
divergence/             continuations over a compressed cache against the uncompressed model
tasks/                  questions about a context, of RULER's kinds, and what answers are worth
fitting/                widths for each layer of a model, by what their errors cost
results/                records, statistics, tables, figures
sizing/                 what a model and its cache will weigh, before they are loaded
adapters/               other projects' benchmarks over our presses
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantpress.evaluation.evaluation import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("quantpress.evaluation.evaluation"), name)
