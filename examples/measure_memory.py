"""Measure the bytes of a cache part by part, then compute those of a longer context that was not read.

Run: python examples/measure_memory.py
     python examples/measure_memory.py --model some/model --tokens 8192 --bits 3 --context 131072
"""

import argparse

from transformers import pipeline

from quantpress import PackedLayer, TurboQuant
from quantpress.cache.memory_estimate import layer_estimate
from quantpress.evaluation.tasks.haystack import book_text, plant
from quantpress.pipelines.report import format_bytes

parser = argparse.ArgumentParser(description="The bytes of a packed cache.")
parser.add_argument("--model", help="id or folder of a chat model; left out, the small default model")
parser.add_argument("--bits", type=float, default=4, help="of keys and values, 1 to 8")
parser.add_argument("--tokens", type=int, default=2048, help="length of the context that is read")
parser.add_argument("--context", type=int, default=131072, help="length of the context that is computed")
options = parser.parse_args()

pipe = pipeline("kv-press-text-generation", model=options.model)
text = plant(book_text(), [], pipe.tokenizer, options.tokens)  # the beginning of Pride and Prejudice
context = pipe.read(text, press=TurboQuant(bits=options.bits))

memory = context.memory  # measured from the storage of the tensors
dtype = str(pipe.model.dtype).removeprefix("torch.")
print(f"read: {context.tokens_seen:,} tokens, {len(memory.layers)} layers in {dtype}")
print(f"  codes and scales                {format_bytes(memory.packed_bytes):>12}")
print(f"  sinks and recent tokens         {format_bytes(memory.dense_bytes):>12}")
print(f"  mean keys and channel weights   {format_bytes(memory.metadata_bytes):>12}")
print(f"  all                             {format_bytes(memory.total_bytes):>12}")
print(f"  uncompressed                    {format_bytes(memory.uncompressed_bytes):>12}")
print(f"  {memory.bits_per_value:.2f} bits a value, {memory.ratio:.2f}x smaller")


def estimate(tokens: int) -> tuple[int, int]:
    """Bytes of a cache of `tokens` tokens with the settings of this one, packed and uncompressed."""
    packed = whole = 0
    for layer in context.cache.layers:
        keys, values = layer.keys.shape, layer.values.shape  # [B, Hkv, T, D]
        settings = layer.settings if isinstance(layer, PackedLayer) else None
        figures = layer_estimate(settings, tokens, keys[1], keys[3], values[3], dtype=pipe.model.dtype)
        packed, whole = packed + figures.total_bytes, whole + figures.uncompressed_bytes
    return packed, whole


for tokens in (context.tokens_seen, options.context):
    packed, whole = estimate(tokens)
    print(f"computed for {tokens:,} tokens in {dtype}: {format_bytes(whole)}, packed: {format_bytes(packed)}")
