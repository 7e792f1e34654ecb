"""Settings of `TurboQuant` by name, and the names of whole compositions."""

from typing import Any

WINDOWS = {"detect_sinks": 8, "recent_tokens": 64}
"""In short contexts, eight detected sinks per head are worth more than the 64 recent tokens they replace;
`docs/choosing.md` has the figures."""

PRESETS: dict[str, dict[str, Any]] = {
    "quality": {"key_bits": 8, "value_bits": 4, **WINDOWS},
    "balanced": {"bits": 4, **WINDOWS},
    "small": {"bits": 3, **WINDOWS},
    "paper": {
        "bits": 4,
        "mean_key": False,
        "balance": False,
        "rotation": "haar",
        "scale": "norm",
        "codebook": "lloyd_max",
    },
}
"""`paper` is TurboQuant as published, with the windows of `TurboQuant()`. The others have what `TurboQuant`
adds to it by default, and detect sinks."""

COMPOSITIONS = ("question_aware",)
"""The names that `Compose.preset` takes."""
