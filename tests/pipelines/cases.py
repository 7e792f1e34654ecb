"""Contexts, questions and presses that the tests of the pipeline share."""

from collections.abc import Callable

import kvpress

from quantpress.codecs.raw import RawPages
from quantpress.presses import Compose, PyramidKV, SnapKV, TurboQuant
from tests.pipelines.words import text

CONTEXT = text(300)
QUESTIONS = [text(5, seed=1), text(9, seed=2), text(1, seed=3)]
SNAP = {"window_size": 16}
LONG_CONTEXT = text(600)  # half of it still fills pages
PRESSES: dict[str, Callable[[], kvpress.BasePress | None]] = {
    "none": lambda: None,
    "snapkv": lambda: kvpress.SnapKVPress(0.5, **SNAP),
    "knorm": lambda: kvpress.KnormPress(0.5),
    "streaming_llm": lambda: kvpress.StreamingLLMPress(0.5),
    "expected_attention": lambda: kvpress.ExpectedAttentionPress(0.5),
    "adakv": lambda: kvpress.AdaKVPress(kvpress.SnapKVPress(0.5, **SNAP)),
    "key_rerotation": lambda: kvpress.KeyRerotationPress(kvpress.KnormPress(0.4)),
    "composed": lambda: kvpress.ComposedPress([kvpress.KnormPress(0.3), kvpress.ThinKPress(0.3, **SNAP)]),
    "dms": lambda: kvpress.DMSPress(kvpress.KnormPress(), threshold=-3.0),
}
DECODING = {
    "decoding": lambda: kvpress.DecodingPress(kvpress.KnormPress(), compression_interval=4, target_size=100),
    "prefill_decoding": lambda: kvpress.PrefillDecodingPress(
        kvpress.KnormPress(0.5),
        kvpress.DecodingPress(kvpress.KnormPress(), compression_interval=3, target_size=90),
    ),
    "dms": lambda: kvpress.DMSPress(
        kvpress.KnormPress(), threshold=-9.0, sliding_window_size=8, decoding=True
    ),
}
UNEQUAL = {
    "pyramidkv": lambda: kvpress.PyramidKVPress(0.5, **SNAP),
    "chunkkv": lambda: kvpress.ChunkKVPress(kvpress.KnormPress(0.5), chunk_length=7),
}
PACKED = {
    "turboquant": lambda: TurboQuant(bits=4),
    "evict_and_pack": lambda: Compose([SnapKV(0.5, **SNAP), TurboQuant(bits=4)]),
    "unequal_and_packed": lambda: Compose([PyramidKV(0.3, **SNAP), TurboQuant(bits=4)]),
    "evict_and_pack_lossless": lambda: Compose([SnapKV(0.5, **SNAP), TurboQuant(codec=_lossless)]),
}
ALL = {**PRESSES, **{f"while_{name}": make for name, make in DECODING.items()}, **UNEQUAL, **PACKED}


def _lossless(head_dim: int, role: str, layer_idx: int) -> RawPages:
    return RawPages(head_dim)
