"""Write a long answer within fixed bytes: old tokens are evicted meanwhile, and the rest stay packed.

Run: python examples/reasoning_decode.py
     python examples/reasoning_decode.py --model some/model --budget 2048 --interval 256 --new-tokens 16384

Every `interval` tokens the cache is cut back to `budget` tokens. The tokens that stay keep their codes, so
nothing is quantized twice. The small default model does not reason. With it, watch the bytes.
"""

import argparse
from typing import Any

import torch
from transformers import DynamicCache, pipeline
from transformers.generation.streamers import BaseStreamer

from quantpress import Compose, Decoding, Knorm, TurboQuant, cache_memory
from quantpress.pipelines.report import format_bytes

PROBLEM = "A train leaves at 9:40 and takes 2 hours and 35 minutes. A second one leaves 50 minutes later and "
PROBLEM += "takes half as long. Which one arrives first, and how long does it wait for the other?"

parser = argparse.ArgumentParser(description="A long answer within fixed bytes.")
parser.add_argument("--model", help="id or folder of a chat model; left out, the small default model")
parser.add_argument("--budget", type=int, default=256, help="tokens kept at every cut")
parser.add_argument("--interval", type=int, default=64, help="new tokens from one cut to the next")
parser.add_argument("--new-tokens", type=int, default=512, help="length of the answer")
parser.add_argument("--bits", type=float, default=4, help="of keys and values, 1 to 8")
options = parser.parse_args()


class Watch(BaseStreamer):
    """Measures the cache at every new token; what arrives first is the question."""

    def __init__(self, cache: DynamicCache) -> None:
        self.cache, self.written, self.most = cache, -1, 0

    def put(self, value: torch.Tensor) -> None:
        self.written += 1
        memory = cache_memory(self.cache)
        self.most = max(self.most, memory.total_bytes)
        if self.written and self.written % options.interval == 0:
            kept, size = memory.layers[0].tokens, format_bytes(memory.total_bytes)
            print(f"{self.written:6} tokens written, {kept:5} tokens kept in {size}", flush=True)

    def end(self) -> None:
        seen = self.cache.layers[0].tokens_seen
        whole = sum(layer.token_bytes * seen for layer in cache_memory(self.cache).layers)
        print(f"at most {format_bytes(self.most)}; all {seen:,} tokens uncompressed: {format_bytes(whole)}")


cut: Any = Decoding(Knorm(0), compression_interval=options.interval, target_size=options.budget)
cache = DynamicCache()
pipe = pipeline("kv-press-text-generation", model=options.model)
answer = pipe(
    PROBLEM,
    question="\nThink step by step.",
    press=Compose([cut, TurboQuant(bits=options.bits, recent_tokens=64)]),
    cache=cache,
    streamer=Watch(cache),
    enable_thinking=True,
    max_new_tokens=options.new_tokens,
    min_new_tokens=options.new_tokens,  # the whole length, so that the bytes can be watched
)["answer"]
print(f"\n{answer.strip()[-300:]}")
