"""Use the codec by itself, without a model or a cache.

Run: python examples/standalone_codec.py
"""

import torch

from quantpress import TurboQuantCodec

keys = torch.randn(1024, 128)
queries = torch.randn(16, 128)

for bits in (2, 2.5, 3, 4):
    codec = TurboQuantCodec(head_dim=128, bits=bits)
    packed = codec.encode(keys)
    error = (codec.decode(packed) - keys).square().sum() / keys.square().sum()
    scores = codec.inner_product(queries, packed)  # read from the codes
    agreement = torch.corrcoef(torch.stack([scores.flatten(), (queries @ keys.T).flatten()]))[0, 1]
    print(f"{bits} bits: {packed.nbytes} bytes for {keys.numel() * 2} in 16 bits, ", end="")
    print(f"squared error {error:.4f}, correlation of scores {agreement:.4f}")

codec = TurboQuantCodec(head_dim=128, bits=3)
print(codec.validate())
print(codec.memory_report(context=131072, layers=32, kv_heads=8))
