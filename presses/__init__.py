"""Presses: what of a KV cache is kept, and how precisely.

compose.py        Compose: several presses as one
composition.py    which presses go together
guard.py          a press's context, with errors that say what is wrong
failures.py       which press failed at which context, and the remedy
demote.py         Demote: fewer bits for tokens that a press would evict
turboquant.py     TurboQuant: packs what is left in 2 to 4 bits
presets.py        its settings by name
names.py          kvpress's evicting presses under short names, with defaults that evict
finch.py          Finch, whose delimiter a pipeline makes a token
wrappers.py       kvpress's presses that work through another press
packing.py        from prefilled layers to packed layers, inside the forward pass
head_wise.py      what head-wise presses name, and what of it is left out
filled_cache.py   the same for a cache that is filled already
prefill.py        what a hook finds out about a prefill
queries.py        queries computed again from hidden states, for channel balance
sinks.py          attention sinks wherever they are
token_order.py    which tokens survived an eviction
filling.py        a reading that fills its cache, or an error
model_support.py  which models can be packed, and where their attention is
model_lock.py     one thread at a time on a model
positions.py      how many positions a model was made for
expression.py     a press written as text
restore.py        a model left as it was found
piping.py         what every press of ours has: |, the lock, a filled cache

Importing this imports kvpress.
"""

from quantpress.presses.compose import Compose
from quantpress.presses.demote import Demote
from quantpress.presses.finch import Finch
from quantpress.presses.names import (
    CAM,
    CUR,
    DMS,
    LUKV,
    TOVA,
    AdaKV,
    Block,
    Cap,
    Chunk,
    ChunkKV,
    Compactor,
    CompressionRatioDecoding,
    CriticalAdaKV,
    CriticalKV,
    Decoding,
    DuoAttention,
    EntropyGatedChunkKV,
    ExpectedAttention,
    ExpectedAttentionStats,
    FastKVzip,
    KeyDiff,
    KeyRerotation,
    Knorm,
    KVCompose,
    KVgrad,
    KVzap,
    KVzip,
    LagKV,
    LeverageScore,
    Merging,
    NonCausalAttn,
    ObservedAttention,
    PerLayerCompression,
    PrefillDecoding,
    PyramidKV,
    QFilter,
    Random,
    RestoreKV,
    SimLayerKV,
    SnapKV,
    StreamingLLM,
    ThinK,
)
from quantpress.presses.turboquant import TurboQuant

__all__ = [
    "AdaKV",
    "Block",
    "CAM",
    "CUR",
    "Cap",
    "Chunk",
    "ChunkKV",
    "Compactor",
    "Compose",
    "CompressionRatioDecoding",
    "CriticalAdaKV",
    "CriticalKV",
    "DMS",
    "Decoding",
    "Demote",
    "DuoAttention",
    "EntropyGatedChunkKV",
    "ExpectedAttention",
    "ExpectedAttentionStats",
    "FastKVzip",
    "Finch",
    "KVCompose",
    "KVgrad",
    "KVzap",
    "KVzip",
    "KeyDiff",
    "KeyRerotation",
    "Knorm",
    "LUKV",
    "LagKV",
    "LeverageScore",
    "Merging",
    "NonCausalAttn",
    "ObservedAttention",
    "PerLayerCompression",
    "PrefillDecoding",
    "PyramidKV",
    "QFilter",
    "Random",
    "RestoreKV",
    "SimLayerKV",
    "SnapKV",
    "StreamingLLM",
    "TOVA",
    "ThinK",
    "TurboQuant",
]
