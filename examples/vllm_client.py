r"""Ask a model that vLLM serves about a document, several times; later questions find it in the prefix cache.

Start the server first, where quantpress and vLLM are installed (docs/vllm.md):

    vllm serve MODEL --kv-cache-dtype quantpress_4bit --attention-backend QUANTPRESS \
        --max-num-seqs 64 --enable-prompt-tokens-details

Run: pip install openai
     python examples/vllm_client.py notes.txt "Who wrote to whom?" "When was that?"

Every prompt begins with the document. The first one is read and packed. From the second one on, vLLM finds
its blocks of 128 tokens in the cache and reads only what follows them. It reports how many tokens it found
if it was started with --enable-prompt-tokens-details. Other servers with the API of OpenAI answer too.
"""

import argparse
import time
from pathlib import Path

from openai import OpenAI, OpenAIError

QUESTIONS = ["What is this text about?", "Which names are in it?"]

parser = argparse.ArgumentParser(description="Ask a served model about a document.")
parser.add_argument("document", type=Path, help="a file of plain text")
parser.add_argument("questions", nargs="*", default=QUESTIONS, help="left out, two of a general kind")
parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="address of the server")
parser.add_argument("--model", help="name of the model; left out, the first one that is served")
parser.add_argument("--max-tokens", type=int, default=200, help="of each answer")
options = parser.parse_args()


def ask(client: OpenAI, model: str, content: str) -> str:
    """Print an answer while it is made; what the server says about its cost comes back."""
    begin, first, usage = time.perf_counter(), None, None
    parts = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],
        max_tokens=options.max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for part in parts:
        usage = part.usage or usage
        if part.choices and part.choices[0].delta.content:
            first = first or time.perf_counter() - begin
            print(part.choices[0].delta.content, end="", flush=True)
    print()
    said = "no answer" if first is None else f"first token after {first:.2f} s"
    if usage is None:
        return f"{said}; the server does not count tokens"
    details = usage.prompt_tokens_details
    cached = None if details is None else details.cached_tokens
    found = "it does not say how many were cached" if cached is None else f"{cached:,} of them cached"
    return f"{said}; {usage.prompt_tokens:,} tokens in the prompt, {found}"


document = options.document.read_text(encoding="utf-8")
try:
    with OpenAI(base_url=options.url, api_key="none") as client:
        model = options.model or client.models.list().data[0].id
        for question in options.questions:
            print(f"> {question}")
            cost = ask(client, model, f"{document}\n\n{question}")
            print(f"({cost})")
except OpenAIError as error:
    raise SystemExit(f"{options.url}: {error} Start a server as the first lines of this file say.") from error
