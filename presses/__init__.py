"""Presses: what of a KV cache is kept, and how precisely.

compose.py        Compose: several presses as one
turboquant.py     TurboQuant: packs what is left in 2 to 4 bits
presets.py        its settings by name, and names of whole compositions
demote.py         Demote: fewer bits for tokens that a press would evict
base_press.py     BasePress and ScorerPress: what a press offers
names.py          kvpress's presses under short names, one class statement each
finch.py          Finch, whose delimiter a pipeline makes a token
arguments.py      which arguments and values a press takes; presses given as classes
base.py           the base classes with which names.py declares presses; what all presses of ours have
traits.py         what a press is: the table of traits, and what is read from it
rules.py          which presses may stand together, and every reason why not
ranks.py          presses on a model that several processes share
guard.py          a press's context, with errors that name the press and the remedy
expression.py     a press written as text
models/           what presses ask of a model, and how they leave it
packing/          from prefilled layers to packed layers

kvpress is imported when one of the names of `names.py` is first used.
"""

from typing import TYPE_CHECKING, Any

from quantpress.errors import unknown_name
from quantpress.presses.base_press import BasePress as BasePress
from quantpress.presses.base_press import ScorerPress as ScorerPress
from quantpress.presses.compose import Compose as Compose
from quantpress.presses.demote import Demote as Demote
from quantpress.presses.traits import import_kvpress
from quantpress.presses.turboquant import TurboQuant as TurboQuant

if TYPE_CHECKING:
    from quantpress.presses.finch import Finch as Finch
    from quantpress.presses.names import *  # noqa: F403
else:
    # fmt: off
    OF_KVPRESS = (
        "AdaKV", "Block", "CAM", "CUR", "Cap", "Chunk", "ChunkKV", "Compactor", "CompressionRatioDecoding",
        "CriticalAdaKV", "CriticalKV", "DMS", "Decoding", "DuoAttention", "EntropyGatedChunkKV",
        "ExpectedAttention", "ExpectedAttentionStats", "FastKVzip", "Finch", "KVCompose", "KVgrad", "KVzap",
        "KVzip", "KeyDiff", "KeyRerotation", "Knorm", "LUKV", "LagKV", "LeverageScore", "Merging",
        "NonCausalAttn", "ObservedAttention", "PerLayerCompression", "PrefillDecoding", "PyramidKV",
        "QFilter", "Random", "RestoreKV", "SimLayerKV", "SnapKV", "StreamingLLM", "TOVA", "ThinK",
    )
    # fmt: on
    __all__ = sorted(["Compose", "Demote", "TurboQuant", *OF_KVPRESS])

    def __getattr__(name: str) -> Any:
        if name not in OF_KVPRESS:
            raise unknown_name(__name__, name, __all__)
        value = getattr(import_kvpress(name), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
