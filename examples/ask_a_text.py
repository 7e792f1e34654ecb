"""Ask one question about a text of yours over a packed cache.

Run: python examples/ask_a_text.py notes.txt "Who wrote to whom?" --model some/model --evict 0.3
"""

import argparse
from pathlib import Path

from transformers import pipeline

from quantpress import Compose, KeyDiff, TurboQuant

parser = argparse.ArgumentParser(description="Ask about a text over a packed KV cache.")
parser.add_argument("text", type=Path, help="a file of plain text")
parser.add_argument("question")
parser.add_argument("--model", help="id or folder of a chat model; left out, the small default model")
parser.add_argument("--bits", type=float, default=4, help="of keys and values, 1 to 8")
parser.add_argument("--evict", type=float, default=0.0, help="fraction of the tokens to evict first")
options = parser.parse_args()

quantizer = TurboQuant(bits=options.bits)
press = Compose([KeyDiff(compression_ratio=options.evict), quantizer]) if options.evict else quantizer
pipe = pipeline("kv-press-text-generation", model=options.model, press=press)
result = pipe(options.text.read_text(encoding="utf-8"), question=options.question, report=True)

print(result["answer"])
print(result["report"])
