"""Read a document of up to 128K tokens once into a packed cache, and ask questions about it.

Run: python examples/long_document_qa_128k.py book.txt -q "Who wrote it?" --model Qwen/Qwen2.5-7B-Instruct-1M
     python examples/long_document_qa_128k.py --tiny         (default model, a short text, on the CPU)

Without a file it reads Pride and Prejudice. Any chat model that reads 128K tokens will do; needle_128k.py
says how much memory some of them need. The default model is small: its answers with --tiny show that the code
runs, not what a good model knows.
"""

import argparse
from pathlib import Path

import torch
from transformers import pipeline

from quantpress.evaluation.tasks.haystack import book_text, plant
from quantpress.pipelines import register
from quantpress.pipelines.report import format_bytes

TOKENS, TINY_TOKENS = 130048, 600
CHAT_TOKENS = 64  # left free for what the chat form adds to the document
QUESTIONS = ["Who is Mr. Bingley?", "What does Mrs. Bennet want for her daughters?"]

parser = argparse.ArgumentParser(description="Questions about a long document, over a packed cache.")
parser.add_argument("document", nargs="?", type=Path, help="a file of plain text; left out, a novel")
parser.add_argument("-q", "--question", action="append", help="may be given several times")
parser.add_argument("--model", help="id or folder of a long-context chat model")
parser.add_argument(
    "--press", default="TurboQuant(bits=4)", help='such as "SnapKV(0.5) | TurboQuant(bits=3)"'
)
parser.add_argument("--tokens", type=int, help="read at most so many; the rest is left out")
parser.add_argument("--answer-tokens", type=int, default=100, help="most tokens of an answer")
parser.add_argument("--tiny", action="store_true", help="default model, a few hundred tokens")
options = parser.parse_args()
if not (options.model or options.tiny):
    parser.error("give --model with the id of a long-context chat model, or --tiny")

register()  # of the task; importing a press from quantpress does it too
pipe = pipeline("kv-press-text-generation", model=options.model, press=options.press)
text = options.document.read_text(encoding="utf-8") if options.document else book_text()
most = (options.tokens or (TINY_TOKENS if options.tiny else TOKENS)) - CHAT_TOKENS
if len(pipe.tokenizer.encode(text, add_special_tokens=False, verbose=False)) > most:
    text = plant(text, [], pipe.tokenizer, most)  # as many whole words from its beginning as fit

questions = options.question or QUESTIONS
asked = [f"\n\n{question} Answer briefly." for question in questions]
result = pipe(text, questions=asked, max_new_tokens=options.answer_tokens, report=True)
for question, answer in zip(questions, result["answers"], strict=True):
    print(f"{question}\n  {answer.strip()}\n")
print(result["report"])
if torch.cuda.is_available():
    print(f"most GPU memory in use, weights included: {format_bytes(torch.cuda.max_memory_allocated())}")
