"""Ask the same questions over several caches and compare answers, bytes and seconds.

Run: python examples/compare_presses.py
     python examples/compare_presses.py "TurboQuant(bits=3)" "KeyDiff(0.7) | TurboQuant" --tokens 4096
"""

import argparse

from rich.console import Console
from transformers import pipeline

from quantpress.evaluation.demo import run_trials, table
from quantpress.pipelines import register
from quantpress.presses.expression import parse_press

PRESSES = [
    "none",
    "TurboQuant(bits=4)",
    "TurboQuant(bits=2)",
    "KeyDiff(0.5)",
    "KeyDiff(0.5) | TurboQuant(bits=4)",
    "SnapKV(0.5) | TurboQuant(bits=4)",
]

parser = argparse.ArgumentParser(description="Numbers hidden in a book, asked for over several caches.")
parser.add_argument("press", nargs="*", default=PRESSES, help='such as "SnapKV(0.5) | TurboQuant(bits=3)"')
parser.add_argument("--model", help="id or folder of a chat model; left out, the small default model")
parser.add_argument("--tokens", type=int, default=2048, help="length of the contexts")
parser.add_argument("--depths", type=int, default=3, help="numbers asked for, each in a context of its own")
options = parser.parse_args()

register()  # of the task; importing a press from quantpress does it too
pipe = pipeline("kv-press-text-generation", model=options.model)
# A press may keep state from one context to the next, so every question gets a new one.
presses = [lambda text=text: parse_press(text) for text in options.press]
rows = run_trials(pipe, options.tokens, options.depths, presses)

Console().print(table(rows, pipe.model.dtype))
print("✓ the number that was hidden, ✗ another answer; the first line of the table names the right ones")
