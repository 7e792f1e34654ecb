"""Hide numbers in a book of 128K tokens, ask for them over a packed cache, and print lengths by depths.

Run: python examples/needle_128k.py --model meta-llama/Llama-3.1-8B-Instruct
     python examples/needle_128k.py --tiny            (default model, short contexts, on the CPU)

Any chat model that reads 128K tokens will do. The table says how much memory a context of 130,048 tokens
takes, in GB (10^9 bytes). It is computed from the shapes of the models:

| model                             | weights | cache, 16 bits | TurboQuant(bits=4) | TurboQuant(bits=3) |
|-----------------------------------|---------|----------------|--------------------|--------------------|
| meta-llama/Llama-3.1-8B-Instruct  |    16.1 |          17.05 |               4.42 |               3.36 |
| Qwen/Qwen2.5-7B-Instruct-1M       |    15.2 |           7.46 |               1.93 |               1.47 |
| Qwen/Qwen3-4B-Instruct-2507       |     8.0 |          19.18 |               4.97 |               3.78 |
| meta-llama/Llama-3.2-1B-Instruct  |     2.5 |           4.26 |               1.14 |               0.87 |

`quantpress memory MODEL --context 130048` computes the cache of other models. While a model reads, it needs
several more tensors of tokens x hidden size. Each takes 1.07 GB for the 8B model, in 16 bits. The longest
context leaves 1,024 of 131,072 positions to the chat form, the question and the answer.
"""

import argparse

import torch
from rich.console import Console
from rich.table import Table
from transformers import pipeline

from quantpress.evaluation.demo import run_trials
from quantpress.pipelines import register
from quantpress.pipelines.report import format_bytes
from quantpress.presses.expression import parse_press

LENGTHS, DEPTHS = [8192, 32768, 65536, 130048], 5
TINY_LENGTHS, TINY_DEPTHS = [512, 768], 2

parser = argparse.ArgumentParser(description="Needles in a haystack of 128K tokens, over a packed cache.")
parser.add_argument("--model", help="id or folder of a long-context chat model")
parser.add_argument(
    "--press", default="TurboQuant(bits=4)", help='such as "SnapKV(0.5) | TurboQuant(bits=3)"'
)
parser.add_argument("--tokens", type=int, nargs="+", help="lengths of the contexts")
parser.add_argument("--depths", type=int, help="numbers asked for at each length, each in its own context")
parser.add_argument("--tiny", action="store_true", help="default model, a few hundred tokens")
options = parser.parse_args()
if not (options.model or options.tiny):
    parser.error("give --model with the id of a long-context chat model, or --tiny")

register()  # of the task; importing a press from quantpress does it too
pipe = pipeline("kv-press-text-generation", model=options.model)
depths = options.depths or (TINY_DEPTHS if options.tiny else DEPTHS)
shown = Table("tokens", *(f"at {(index + 0.5) / depths:.0%}" for index in range(depths)), "cache", "ratio")
for tokens in options.tokens or (TINY_LENGTHS if options.tiny else LENGTHS):
    (row,) = run_trials(pipe, tokens, depths, [lambda: parse_press(options.press)])
    answers = [f"{'✓' if trial.right else '✗'} {trial.said}" for trial in row.trials]
    size = format_bytes(round(row.mean("resident_bytes")))
    shown.add_row(f"{row.mean('tokens_seen'):,.0f}", *answers, size, f"{row.mean('ratio'):.2f}x")

console = Console()
console.print(shown)
print(f"{options.press}: ✓ where the answer is the number that was hidden")
if torch.cuda.is_available():
    print(f"most GPU memory in use, weights included: {format_bytes(torch.cuda.max_memory_allocated())}")
