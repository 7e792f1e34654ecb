"""Read and pack a text once, ask many questions about it, and save the packed context.

Run: python examples/many_questions.py
     python examples/many_questions.py --model some/model --tokens 8192 --questions 10 --save book.safetensors

A saved context contains the text. Only the owner can read the file.
"""

import argparse
import tempfile
import time
from pathlib import Path

from transformers import pipeline

from quantpress import CachedContext
from quantpress.evaluation.tasks.haystack import (
    ANSWER_PREFIX,
    book_text,
    is_right,
    needle_question,
    plant,
    random_needles,
)
from quantpress.pipelines.report import format_bytes

parser = argparse.ArgumentParser(description="One packed context, many questions.")
parser.add_argument("--model", help="id or folder of a chat model; left out, the small default model")
parser.add_argument(
    "--press", default="TurboQuant(bits=4)", help='such as "SnapKV(0.5) | TurboQuant(bits=3)"'
)
parser.add_argument("--tokens", type=int, default=2048, help="length of the context")
parser.add_argument("--questions", type=int, default=5, help="numbers hidden in the context and asked for")
parser.add_argument("--save", type=Path, help="keep the context in this file; left out, a temporary one")
options = parser.parse_args()

pipe = pipeline("kv-press-text-generation", model=options.model)
needles = random_needles(options.questions)
text = plant(book_text(), needles, pipe.tokenizer, options.tokens)
questions = [needle_question(needle.city) for needle in needles]
asked = {"answer_prefix": ANSWER_PREFIX, "max_new_tokens": 8}

begin = time.perf_counter()
context = pipe.read(text, press=options.press)
size = format_bytes(context.memory.total_bytes)
print(f"read {context.tokens_seen:,} tokens into {size} in {time.perf_counter() - begin:.1f} s")

begin = time.perf_counter()
answers = pipe(context, questions=questions, **asked)["answers"]  # each is asked as if it were the first
print(f"{len(questions)} questions in {time.perf_counter() - begin:.1f} s, without reading again")
whole = pipe(text, questions=questions, **asked)["answers"]  # the same over an uncompressed cache
for needle, answer, plain in zip(needles, answers, whole, strict=True):
    mark = "✓" if is_right(answer, needle) else "✗"
    print(f"  {mark} {needle.city}: {answer.strip()} (uncompressed: {plain.strip()})")

with tempfile.TemporaryDirectory() as folder:
    file = options.save or Path(folder) / "context.safetensors"
    print(f"saved: {format_bytes(context.save(file))}")
    begin = time.perf_counter()
    loaded = CachedContext.load(file, pipe.model)  # in another process too
    print(f"loaded in {time.perf_counter() - begin:.2f} s")
    again = pipe(loaded, questions=questions, **asked)["answers"]
    print("the loaded context gives", "the same answers" if again == answers else "other answers")
    del loaded  # it reads from the file
