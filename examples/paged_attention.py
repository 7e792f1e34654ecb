"""Use paged attention as a serving engine does: requests of any length arrive, share a prompt, and end.

Keys and values are random here. An engine takes them from its model, layer by layer.

Run: python examples/paged_attention.py --bits 3
"""

import argparse
from collections import deque

import torch

from quantpress import PagedAttention

LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM = 2, 8, 2, 64
REQUESTS = deque([(300, 20), (20, 60), (700, 10), (5, 50), (450, 20), (90, 30)])  # own prompt, new tokens

parser = argparse.ArgumentParser(description="Serve requests over packed pages.")
parser.add_argument("--bits", type=float, default=4, help="of keys and values, 1 to 8")
options = parser.parse_args()


def states(*lead: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random keys and values [*lead, KV heads, tokens, head_dim] in place of a model's."""
    keys, values = torch.randn(2, *lead, KV_HEADS, tokens, HEAD_DIM, dtype=torch.bfloat16)
    return keys, values


paged = PagedAttention(
    num_blocks=16,
    max_sequences=5,
    query_heads=QUERY_HEADS,
    kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    layers=LAYERS,
    bits=options.bits,
)
system = paged.add(*states(LAYERS, tokens=1000))  # read and packed once, for all requests
shared = len(paged.blocks(system))
print(f"system prompt: {paged.length(system)} tokens in {shared} blocks and, not packed yet, 16 bits")

running: dict[int, int] = {}  # tokens still to come
steps = served = 0
while REQUESTS or running:
    while REQUESTS and len(paged.sequences) < 5:  # admit requests that fit until they end
        prompt, new = REQUESTS[0]
        ends = [
            paged.blocks_for(paged.length(s) + left) - len(paged.blocks(s)) for s, left in running.items()
        ]
        if paged.blocks_for(1000 + prompt + new) - shared > paged.free_blocks - sum(ends):
            break
        REQUESTS.popleft()
        sequence = paged.fork(system)
        paged.append([sequence], *states(LAYERS, 1, tokens=prompt))
        running[sequence] = new
        print(f"step {steps:3}: sequence {sequence} joins, {paged.free_blocks} blocks are free")

    batch = list(running)
    paged.extend(batch)  # one more token each: blocks, lengths, and pages that are full
    plan = paged.plan(batch)  # page table and lengths, for all layers
    for layer in range(LAYERS):
        query = torch.randn(len(batch), QUERY_HEADS, 1, HEAD_DIM, dtype=torch.bfloat16)
        paged.write(*states(len(batch), tokens=1), plan, layer=layer)
        paged.attend(query, plan, layer=layer)
    steps, served = steps + 1, served + len(batch)

    for sequence in batch:
        running[sequence] -= 1
        if not running[sequence]:
            print(f"step {steps:3}: sequence {sequence} leaves with {paged.length(sequence)} tokens")
            paged.free(sequence)
            del running[sequence]

memory = paged.memory()
print(f"{served} tokens served in {steps} steps")
print(f"{memory.total_bytes / 2**20:.1f} MiB, all of it taken at the start, for", end=" ")
print(f"{memory.packed_tokens} packed and {memory.dense_tokens} 16-bit tokens")
whole = memory.uncompressed_bytes_per_token
print(f"a packed token takes {memory.bytes_per_token:.0f} bytes, in 16 bits {whole}")
