"""The table of rules about captured decode steps, in docs/limits.md, from the rules themselves."""

import re

from quantpress.pipelines.capture.eligibility import RULES

SILENTLY, WARNING, THIS_STEP = "no warning", "one warning", "this step only"
THEN = {
    "device": ("the model", SILENTLY),
    "press": ("the press", SILENTLY),
    "mode": ("the call", SILENTLY),
    "model": ("the model", WARNING),
    "cache": ("the cache", f"{WARNING}, if a layer is packed"),
    "changes": ("the cache", WARNING),
    "compiled_under": ("`compile=True`", "an error"),
    "mask": ("the step", THIS_STEP),
    "gradients": ("the step", THIS_STEP),
    "others_sample": ("the call", "until that call ends"),
}
"""What each kind of rule looks at, and what comes of it."""


def capture_rules() -> str:
    """Every rule; the values that its message names are in italics."""
    lines = ["| a step is not captured if | looks at | then |", "|---|---|---|"]
    for kind, rules in RULES.items():
        subject, then = THEN[kind]
        for rule in rules:
            waits = kind == "cache" and not rule.lasting
            message = re.sub(r"\{(.*?)\}", r"*\1*", rule.message)
            lines.append(f"| {message} | {subject} | {'until it has more tokens' if waits else then} |")
    return "\n".join(lines) + "\n"
