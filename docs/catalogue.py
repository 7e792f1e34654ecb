"""Every press that kvpress exports: its kind, and how to make one.

`CATALOGUE` says how each class is made for a tiny Llama; a press that would download weights or statistics
gets random ones of the right shape. `docs/build.py` makes the table of `docs/presses.md` from it.
`tests/presses/test_matrix.py` tests every entry, and fails when kvpress exports a press that is missing here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import kvpress
import numpy as np
import torch
from kvpress.presses.fastkvzip_press import FastKVzipGate
from kvpress.presses.kvzap_press import KVzapConfig, KVzapModel
from transformers import PreTrainedModel

EVICTS = "evicts tokens"
UNEQUAL = "evicts tokens, a different number in each layer"
RENUMBERS = "evicts tokens and renumbers the rest"
HEAD_WISE = "hides tokens, head by head"
REREADS = "reads again, then hides tokens, head by head"
CHANNELS = "zeroes key channels"
COMPOSES = "chains presses"
DECODING = "evicts while decoding"
BASE = "base class"

RATIO = 0.5
DELIMITER_ID = 4
"""The token that Finch looks for; `FINCH_WINDOW` tokens of the context follow it."""
FINCH_WINDOW = 20


@dataclass(frozen=True)
class Entry:
    """How a press is made, and what it is.

    Args:
        kind: one of the constants above.
        make: a press for a model.
        attention: the attention implementation that it needs.
        newest: "works", or what it waits for on the newest transformers, where test_matrix.py runs too.
    """

    kind: str
    make: Callable[[PreTrainedModel], kvpress.BasePress]
    attention: str = "sdpa"
    newest: str = "works"

    @property
    def one_token(self) -> bool:
        """Whether kvpress itself may fail on a question of several tokens.

        Its one mask does not fit layers of different lengths, and it may find no fake key to hide a token.
        """
        return self.kind in (UNEQUAL, HEAD_WISE, REREADS)


def exported() -> dict[str, type[kvpress.BasePress]]:
    """The presses that kvpress exports, by name, in alphabetical order."""
    classes = {name: getattr(kvpress, name) for name in kvpress.__all__}
    found = {n: c for n, c in classes.items() if isinstance(c, type) and issubclass(c, kvpress.BasePress)}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _plain(press_class: Any, **options: Any) -> Callable[[PreTrainedModel], kvpress.BasePress]:
    return lambda model: press_class(**{"compression_ratio": RATIO, **options})


def _around(press_class: Any, inner: Any = None, **options: Any) -> Callable[..., kvpress.BasePress]:
    return lambda model: press_class((inner or snapkv)(), **options)


def snapkv(ratio: float = RATIO) -> kvpress.SnapKVPress:
    """SnapKV with a window that suits short contexts."""
    return kvpress.SnapKVPress(ratio, window_size=16)


def _decoding(press_class: Any, **options: Any) -> Callable[[PreTrainedModel], kvpress.BasePress]:
    return lambda model: press_class(kvpress.KnormPress(), compression_interval=4, **options)


def _duo_attention(model: PreTrainedModel) -> kvpress.BasePress:
    press = kvpress.DuoAttentionPress(head_compression_ratio=RATIO)
    shape = model.config.num_hidden_layers, model.config.num_key_value_heads
    press.load_attention_pattern = lambda model: (4, 64, np.arange(np.prod(shape)).reshape(shape))
    return press


def _with_stats(model: PreTrainedModel) -> kvpress.BasePress:
    press = kvpress.ExpectedAttentionStatsPress(RATIO)
    config = model.config
    layers, heads, dim = config.num_hidden_layers, config.num_attention_heads, config.head_dim
    press.mu = _random(layers, heads, dim).to(model.dtype)
    press.cov = torch.eye(dim).expand(layers, heads, dim, dim).to(model.dtype)
    return press


def _fast_kvzip(model: PreTrainedModel) -> kvpress.BasePress:
    press, config = kvpress.FastKVzipPress(RATIO), model.config
    heads = config.num_key_value_heads
    shape = config.hidden_size, heads, config.num_attention_heads // heads, model.dtype
    with torch.random.fork_rng():
        torch.manual_seed(0)  # kvpress finds no fake key for every choice of slots
        press.gates = [FastKVzipGate(layer, *shape) for layer in range(config.num_hidden_layers)]
    return press


def _finch(model: PreTrainedModel) -> kvpress.BasePress:
    press = kvpress.FinchPress(RATIO)
    press.delimiter_token_id = DELIMITER_ID
    return press


def _kvzap(model: PreTrainedModel) -> kvpress.BasePress:
    press, config = kvpress.KVzapPress(RATIO), model.config
    shape = {"input_dim": config.hidden_size, "output_dim": config.num_key_value_heads}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        press.kvzap_model = KVzapModel(KVzapConfig(**shape, n_modules=config.num_hidden_layers))
    press.post_init_from_model = lambda model: None
    return press


def _lukv(model: PreTrainedModel) -> kvpress.BasePress:
    press, config = kvpress.LUKVPress(kvpress.KnormPress(), compression_ratio=RATIO), model.config
    curves = np.full((99, config.num_hidden_layers, config.num_key_value_heads), RATIO)
    curves[:, :, 0], curves[:, :, 1] = RATIO - 0.25, RATIO + 0.25
    press._budget_curves = curves
    return press


def _per_layer(model: PreTrainedModel) -> kvpress.BasePress:
    ratios = torch.linspace(RATIO - 0.125, RATIO + 0.125, model.config.num_hidden_layers).tolist()
    return kvpress.PerLayerCompressionPress(kvpress.KnormPress(), ratios)


def _qfilter(model: PreTrainedModel) -> kvpress.BasePress:
    press, config = kvpress.QFilterPress(RATIO), model.config
    filters = _random(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    press.load_q_filters = lambda name: filters
    return press


def _restorekv(model: PreTrainedModel) -> kvpress.BasePress:
    """Add a random adapter to the model, switched off: give it a model of its own."""
    from peft import LoraConfig

    press = kvpress.RestoreKVPress(RATIO)
    if press.adapter_name not in getattr(model, "peft_config", {}):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
            config = LoraConfig(target_modules=projections, task_type="CAUSAL_LM", init_lora_weights=False)
            model.add_adapter(config, adapter_name=press.adapter_name)
    model.disable_adapters()
    press.restore_embeddings = _random(8, model.config.hidden_size).to(model.dtype)
    press.post_init_from_model = lambda model: None
    return press


CATALOGUE: dict[str, Entry] = {
    "AdaKVPress": Entry(HEAD_WISE, _around(kvpress.AdaKVPress)),
    "BasePress": Entry(BASE, lambda model: kvpress.BasePress()),
    "BlockPress": Entry(EVICTS, _around(kvpress.BlockPress, lambda: kvpress.KeyDiffPress(RATIO))),
    "CAMPress": Entry(DECODING, _decoding(kvpress.CAMPress, target_size=100)),
    "CapPress": Entry(EVICTS, _plain(kvpress.CapPress)),
    "ChunkKVPress": Entry(EVICTS, _around(kvpress.ChunkKVPress)),
    "ChunkPress": Entry(EVICTS, _around(kvpress.ChunkPress, chunk_length=160)),
    "CompactorPress": Entry(EVICTS, _plain(kvpress.CompactorPress)),
    "ComposedPress": Entry(
        COMPOSES, lambda model: kvpress.ComposedPress([snapkv(), kvpress.ThinKPress(RATIO)])
    ),
    "CompressionRatioDecodingPress": Entry(DECODING, _decoding(kvpress.CompressionRatioDecodingPress)),
    "CriticalAdaKVPress": Entry(HEAD_WISE, _around(kvpress.CriticalAdaKVPress)),
    "CriticalKVPress": Entry(EVICTS, _around(kvpress.CriticalKVPress)),
    "CURPress": Entry(EVICTS, _plain(kvpress.CURPress)),
    "DecodingPress": Entry(DECODING, _decoding(kvpress.DecodingPress, target_size=100)),
    "DMSPress": Entry(
        HEAD_WISE, _around(kvpress.DMSPress, lambda: kvpress.RandomPress(seed=3), threshold=RATIO)
    ),
    "DuoAttentionPress": Entry(HEAD_WISE, _duo_attention),
    "EntropyGatedChunkKVPress": Entry(EVICTS, _around(kvpress.EntropyGatedChunkKVPress)),
    "ExpectedAttentionPress": Entry(EVICTS, _plain(kvpress.ExpectedAttentionPress)),
    "ExpectedAttentionStatsPress": Entry(EVICTS, _with_stats),
    "FastKVzipPress": Entry(HEAD_WISE, _fast_kvzip),
    "FinchPress": Entry(RENUMBERS, _finch),
    "KeyDiffPress": Entry(EVICTS, _plain(kvpress.KeyDiffPress)),
    "KeyRerotationPress": Entry(
        RENUMBERS, _around(kvpress.KeyRerotationPress, lambda: kvpress.StreamingLLMPress(RATIO))
    ),
    "KnormPress": Entry(EVICTS, _plain(kvpress.KnormPress)),
    "KVComposePress": Entry(UNEQUAL, _plain(kvpress.KVComposePress)),
    "KVgradPress": Entry(REREADS, _plain(kvpress.KVgradPress)),
    "KVzapPress": Entry(EVICTS, _kvzap),
    "KVzipPress": Entry(REREADS, _plain(kvpress.KVzipPress)),
    "LagKVPress": Entry(EVICTS, _plain(kvpress.LagKVPress, lag_size=32)),
    "LeverageScorePress": Entry(EVICTS, _plain(kvpress.LeverageScorePress)),
    "LUKVPress": Entry(HEAD_WISE, _lukv),
    "MergingPress": Entry(EVICTS, _around(kvpress.MergingPress)),
    "NonCausalAttnPress": Entry(EVICTS, _plain(kvpress.NonCausalAttnPress)),
    "ObservedAttentionPress": Entry(EVICTS, _plain(kvpress.ObservedAttentionPress), attention="eager"),
    "PerLayerCompressionPress": Entry(UNEQUAL, _per_layer),
    "PrefillDecodingPress": Entry(
        DECODING, lambda model: kvpress.PrefillDecodingPress(snapkv(), CATALOGUE["DecodingPress"].make(model))
    ),
    "PyramidKVPress": Entry(UNEQUAL, _plain(kvpress.PyramidKVPress, window_size=8, beta=2)),
    "QFilterPress": Entry(EVICTS, _qfilter),
    "RandomPress": Entry(EVICTS, _plain(kvpress.RandomPress, seed=3)),
    "RestoreKVPress": Entry(REREADS, _restorekv, newest="needs peft 0.22"),
    "ScorerPress": Entry(BASE, lambda model: kvpress.ScorerPress(RATIO)),
    "SimLayerKVPress": Entry(
        UNEQUAL, lambda model: kvpress.SimLayerKVPress(lazy_threshold=0.0, n_recent=380)
    ),
    "SnapKVPress": Entry(EVICTS, lambda model: snapkv()),
    "StreamingLLMPress": Entry(EVICTS, _plain(kvpress.StreamingLLMPress)),
    "ThinKPress": Entry(CHANNELS, lambda model: kvpress.ThinKPress(RATIO)),
    "TOVAPress": Entry(EVICTS, _plain(kvpress.TOVAPress)),
}
