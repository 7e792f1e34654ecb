"""Settings of `TurboQuant` by name."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "quality": {"key_bits": 8, "value_bits": 4},
    "balanced": {"bits": 4},
    "small": {"bits": 3},
    "paper": {
        "bits": 4,
        "mean_key": False,
        "balance": False,
        "rotation": "haar",
        "scale": "norm",
        "codebook": "lloyd_max",
    },
}
"""`paper` is TurboQuant as published; the others have what `TurboQuant` adds to it by default."""
