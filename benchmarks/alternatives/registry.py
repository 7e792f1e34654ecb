"""What is measured: packages, the versions that were read for it, and settings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from . import caches, kernels
from .calls import Attention, dense, quantpress


@dataclass(frozen=True)
class Alternative:
    """A package with its settings.

    Attributes:
        name: its name in the table.
        settings: what `make` takes first, by the name of the row.
        make: with a setting, keys and values [1, Hkv, T, D] and a query [1, Hq, 1, D] in bfloat16 gives an
            `Attention`. The package is imported there and nowhere else.
        package: its name for pip; empty: nothing to install.
        version: the version whose source `make` follows.
        builds: its first call compiles for long.
    """

    name: str
    settings: Mapping[str, Any]
    make: Callable[..., Attention]
    package: str = ""
    version: str = ""
    builds: bool = False


ALTERNATIVES = (
    Alternative("torch bfloat16", {"16/16": 1.0}, dense),
    Alternative("kvpress's SnapKV(0.5)", {"16/16": 0.5}, dense),
    Alternative("quantpress", {"4/4": 4, "3/3": 3, "2/2": 2}, quantpress),
    Alternative("aither-kvcache", {"4/4": 4}, kernels.aither, "aither-kvcache", "2.4.1"),
    Alternative("turboquant-vllm, paged", {"4/4": 4}, kernels.turboquant_vllm, "turboquant-vllm", "1.5.0"),
    Alternative(
        "turboquant-vllm, cache", {"3/3": 3, "4/4": 4}, caches.turboquant_vllm, "turboquant-vllm", "1.5.0"
    ),
    Alternative("tqai", {"8/8": ("auto", 8), "4/4, full": ("full", 4)}, caches.tqai, "tqai", "0.6.1"),
    Alternative("turboquant", {"3/3": 3, "4/4": 4}, caches.turboquant, "turboquant", "0.2.0"),
    Alternative("transformers, quanto", {"4/4": 4}, caches.quanto, "optimum-quanto", "0.2.7"),
    Alternative("turbo-attn", {"4/4": 4, "3/3": 3}, kernels.turbo_attn, "turbo-attn", "0.70.1", builds=True),
)
