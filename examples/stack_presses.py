"""Stack presses: first evict, then pack what is left. Each stack below is written in another way.

Run: python examples/stack_presses.py
     python examples/stack_presses.py --model some/model --tokens 8192
"""

import argparse

from transformers import pipeline

from quantpress import AdaKV, Compose, Demote, Knorm, SnapKV, StreamingLLM, TurboQuant
from quantpress.evaluation.tasks.haystack import book_text, plant
from quantpress.pipelines.report import format_bytes

STACKS = [
    TurboQuant,  # every token, 4 bits
    Compose([SnapKV, TurboQuant]),  # a class means its defaults: half of the tokens, 4 bits
    Compose([SnapKV(compression_ratio=0.75), TurboQuant(bits=3)]),  # a quarter of the tokens, 3 bits
    SnapKV(0.5) | TurboQuant(key_bits=4, value_bits=2),  # the same with |, and two widths
    "StreamingLLM(0.5) | TurboQuant(bits=4)",  # the same as text
    StreamingLLM(0.5, n_sink=8) | TurboQuant(sink_tokens=8),  # 8 first tokens survive, unpacked
    Knorm(0.3) | SnapKV(0.3) | TurboQuant,  # two evictors: 0.7 x 0.7 of the tokens
    Compose.preset("question_aware"),  # ChunkKV(SnapKV(0.5)) | TurboQuant(4): chunks that the question needs
    AdaKV(SnapKV(0.5)) | TurboQuant,  # each head keeps its own number of tokens
    Demote(SnapKV(0.5), bits=2) | TurboQuant(bits=4),  # evicts nothing: half of the tokens get 2 bits
]

parser = argparse.ArgumentParser(description="Stacks of presses and what they keep.")
parser.add_argument("--model", help="id or folder of a chat model; left out, the small default model")
parser.add_argument("--tokens", type=int, default=2048, help="length of the context")
options = parser.parse_args()

pipe = pipeline("kv-press-text-generation", model=options.model)
text = plant(book_text(), [], pipe.tokenizer, options.tokens)  # the beginning of Pride and Prejudice

print("tokens kept  bits a value    resident  ratio  press")
for press in STACKS:
    asked = {"question": "Who speaks?", "question_aware": True}  # read with the text, so that presses see it
    report = pipe(text, press=press, max_new_tokens=4, report=True, **asked)["report"]
    kept = f"{report.tokens_kept:,.0f} / {report.tokens_seen:,}"
    name = press.__name__ if isinstance(press, type) else press
    size = format_bytes(report.resident_bytes)
    print(f"{kept:>13} {report.bits_per_value:11.2f} {size:>11} {report.ratio:5.1f}x  {name}")
