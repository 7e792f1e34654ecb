"""kvpress's presses under short names, with defaults that evict something, and what each of them is.

Each is a subclass of kvpress's own class (`isinstance(SnapKV(), kvpress.SnapKVPress)`), which does the work
and documents the remaining arguments. kvpress's default ratio of 0 keeps everything; here it is 0.5. A
ratio outside 0 <= ratio < 1 raises `InvalidInputError`. The last six are kvpress's own classes: what they
need has no natural default.

To add a press, write one class statement here; `quantpress.presses.base` says which keywords it takes.
"""

from typing import TYPE_CHECKING, Any

import kvpress
import torch
from kvpress.presses.kvgrad_press import ReadOnlyDynamicLayer
from torch import nn

from quantpress.presses.arguments import inner_press
from quantpress.presses.base import (
    EvictingPress,
    NamedPress,
    RereadingPress,
    WrappingPress,
)
from quantpress.presses.base_press import ScorerPress
from quantpress.presses.finch import Finch as Finch
from quantpress.presses.models.old_names import take_keywords
from quantpress.presses.traits import describe

take_keywords(ReadOnlyDynamicLayer)
describe(kvpress.BasePress)
describe(kvpress.ScorerPress)
describe(kvpress.ComposedPress)


class Cap(EvictingPress, kvpress.CapPress, like_llama=True):
    """Leverage of values, weighted by how queries so far align with the keys (CapKV)."""


class Compactor(
    EvictingPress, kvpress.CompactorPress, whole_context=True, needs_all_heads=True, like_llama=True
):
    """Leverage scores blended with non-causal attention (Compactor)."""


class CUR(EvictingPress, kvpress.CURPress):
    """Approximate leverage scores of keys and values (CurDKV)."""


class DuoAttention(
    EvictingPress,
    kvpress.DuoAttentionPress,
    ratio_name="head_compression_ratio",
    ratio_follows=True,
    masks_heads=True,
    needs_all_heads=True,
    like_llama=lambda press: press.on_the_fly_scoring,
):
    """Some heads, `head_compression_ratio` of them, see only sinks and recent tokens (DuoAttention)."""


class ExpectedAttention(EvictingPress, kvpress.ExpectedAttentionPress, like_llama=True):
    """Attention that future queries are expected to pay."""


class ExpectedAttentionStats(EvictingPress, kvpress.ExpectedAttentionStatsPress, needs_all_heads=True):
    """`ExpectedAttention` with query statistics from Hugging Face's hub, for some models."""


class FastKVzip(EvictingPress, kvpress.FastKVzipPress, at_exit=True, masks_heads=True, needs_all_heads=True):
    """Gates trained to predict KVzip's scores, from Hugging Face's hub, for some models."""


class KeyDiff(EvictingPress, kvpress.KeyDiffPress):
    """Keeps keys that differ most from the mean key."""


class Knorm(EvictingPress, kvpress.KnormPress):
    """Keeps keys of small norm."""


class KVCompose(
    EvictingPress,
    kvpress.KVComposePress,
    at_exit=True,
    masks_heads=lambda press: not press.structured,
    needs_all_heads=True,
):
    """Composite tokens across heads, after reading the context twice (KVCompose)."""


class KVzap(EvictingPress, kvpress.KVzapPress, whole_context=True, needs_all_heads=True):
    """A small trained model that predicts KVzip's scores, from Hugging Face's hub, for some models."""


class KVzip(
    RereadingPress,
    kvpress.KVzipPress,
    at_exit=True,
    masks_heads=True,
    needs_all_heads=True,
    like_llama=True,
):
    """Attention of the model repeating its context (KVzip); two to three times the prefill's cost."""


class KVgrad(RereadingPress, kvpress.KVgradPress, like_llama=False):
    """Input times gradient of the model reading its context again."""


class LagKV(EvictingPress, kvpress.LagKVPress):
    """Keys and values compared with those of the partition that follows."""


class LeverageScore(
    EvictingPress, kvpress.LeverageScorePress, whole_context=True, normalizes=True, like_llama=True
):
    """Approximate leverage scores of keys before RoPE."""


class NonCausalAttn(
    EvictingPress, kvpress.NonCausalAttnPress, whole_context=True, normalizes=True, like_llama=True
):
    """Attention of all queries of a chunk to all its keys."""


class ObservedAttention(EvictingPress, kvpress.ObservedAttentionPress, whole_context=True):
    """Attention that each token received in the prefill (H2O); needs attn_implementation="eager"."""


class SnapKV(EvictingPress, kvpress.SnapKVPress, by_last_queries=True, like_llama=True, takes_weights=True):
    """Keeps what the last tokens of the context attend to."""


class PyramidKV(EvictingPress, kvpress.PyramidKVPress):
    """SnapKV with more tokens in lower layers."""


class QFilter(EvictingPress, kvpress.QFilterPress, needs_all_heads=True):
    """Learned query directions, from Hugging Face's hub, for some models."""


class Random(EvictingPress, kvpress.RandomPress):
    """Random tokens: the baseline."""


class RestoreKV(RereadingPress, kvpress.RestoreKVPress, adds_tokens=True):
    """KVzip with learned restore tokens, from Hugging Face's hub, for some models."""


class SimLayerKV(
    EvictingPress,
    kvpress.SimLayerKVPress,
    ratio_name="lazy_threshold",
    ratio=0.9,
    ratio_follows=True,
    needs_all_heads=True,
    like_llama=True,
):
    """Only sinks and recent tokens in layers whose attention to them is above `lazy_threshold`."""


class StreamingLLM(EvictingPress, kvpress.StreamingLLMPress, sink_tokens=lambda press: press.n_sink):
    """Keeps the first `n_sink` tokens and the most recent ones.

    With a quantizer behind it in `Compose`, those first tokens stay in 16 bits.
    """


class ThinK(
    EvictingPress,
    kvpress.ThinKPress,
    ratio_name="key_channel_compression_ratio",
    keeps_tokens=True,
    like_llama=True,
):
    """Zeroes the key channels that recent queries use least; evicts no token, saves no memory by itself."""


class TOVA(
    EvictingPress,
    kvpress.TOVAPress,
    needs_all_heads=True,
    by_last_queries=True,
    like_llama=True,
    takes_weights=True,
):
    """Keeps what the last token attends to."""


# Those that work through another press.


class AdaKV(WrappingPress, kvpress.AdaKVPress, inner=SnapKV, masks_heads=True, compares_heads=True):
    """Shares the budget of a layer among its heads by score. Tokens are hidden; a quantizer frees them."""


class Block(WrappingPress, kvpress.BlockPress, inner=KeyDiff, whole_context=True, needs_all_heads=True):
    """Evicts block by block; with KeyDiff the method of the KeyDiff paper."""


class Chunk(WrappingPress, kvpress.ChunkPress, inner=SnapKV, whole_context=True):
    """Evicts the same fraction of every chunk."""


class ChunkKV(WrappingPress, kvpress.ChunkKVPress, inner=SnapKV, compares_heads=True):
    """Keeps or evicts chunks as a whole: those that kvpress's own takes, one at a time, all at once here."""

    def compress(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of the best chunks of the first sequence, in the order of the text.

        Args:
            module: the layer's attention module.
            hidden_states: [B, T, hidden] inputs of the layer.
            keys: [B, Hkv, T, D].
            values: [B, Hkv, T, Dv].
            attentions: for the press inside.
            kwargs: keyword arguments of the layer's forward.
        """
        ratio, tokens = self.press.compression_ratio, keys.shape[2]
        if ratio == 0:
            return keys, values
        if tokens < self.chunk_length:
            pruned: tuple[torch.Tensor, torch.Tensor] = self.press.compress(
                module, hidden_states, keys, values, attentions, kwargs
            )
            return pruned
        scores = self.press.score(module, hidden_states, keys, values, attentions, kwargs)
        chunks = self._chunk_scores(scores)[0]
        best = chunks.topk(max(1, int(len(chunks) * (1 - ratio)))).indices
        of_chunk = torch.zeros_like(chunks, dtype=torch.bool).index_fill(0, best, True)
        kept = of_chunk.repeat_interleave(self.chunk_length)[:tokens].nonzero()[:, 0]
        return keys.index_select(2, kept), values.index_select(2, kept)

    def score(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """[B, Hkv, T] scores of tokens: in every head that of their chunk, a sum over all heads.

        By them `Demote` takes chunks, as this press does when it evicts.
        """
        scores: torch.Tensor = self.press.score(module, hidden_states, keys, values, attentions, kwargs)
        chunks = self._chunk_scores(scores).repeat_interleave(self.chunk_length, dim=1)
        return chunks[:, None, : scores.shape[2]].expand_as(scores)

    def _chunk_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """[B, chunks] sums over heads of means over the tokens of each chunk; the last may be shorter."""
        complete = scores.shape[2] // self.chunk_length
        sums, rest = scores.sum(dim=1).tensor_split([complete * self.chunk_length], dim=1)
        means = [sums.unflatten(1, (complete, self.chunk_length)).mean(dim=-1)]
        return torch.cat([*means, *([rest.mean(dim=-1, keepdim=True)] if rest.shape[1] else [])], dim=1)


class CriticalAdaKV(
    WrappingPress, kvpress.CriticalAdaKVPress, inner=SnapKV, masks_heads=True, needs_all_heads=True
):
    """AdaKV with CriticalKV's scores. Tokens are hidden; a quantizer frees them."""


class CriticalKV(NamedPress, kvpress.CriticalKVPress):
    """Scores times the size of the projected values, in two stages."""

    def __init__(
        self, press: ScorerPress | None = None, epsilon: float = 1e-4, first_stage_ratio: float = 0.5
    ) -> None:
        press = SnapKV() if press is None else inner_press(self, press)
        super().__init__(press, epsilon=epsilon, first_stage_ratio=first_stage_ratio)


class EntropyGatedChunkKV(WrappingPress, kvpress.EntropyGatedChunkKVPress, inner=SnapKV):
    """ChunkKV that keeps only the best tokens of chunks with a single peak."""


class KeyRerotation(WrappingPress, kvpress.KeyRerotationPress, inner=StreamingLLM, rerotates=True):
    """Gives survivors consecutive positions; with StreamingLLM the method of its paper."""


class LUKV(
    WrappingPress,
    EvictingPress,
    kvpress.LUKVPress,
    inner=lambda: ExpectedAttention(epsilon=2e-2),
    masks_heads=True,
    needs_all_heads=True,
):
    """Budgets per head from measured curves, for some models. Tokens are hidden; a quantizer frees them."""


class Merging(WrappingPress, kvpress.MergingPress, inner=SnapKV):
    """Folds evicted values into their most similar survivors."""


# kvpress's own classes.

# Over packed layers tokens stay in the order of the text, where kvpress leaves its unsorted top-k: scorers
# that go by slot (SnapKV's window, StreamingLLM) see the recent tokens last, and equal scores may be decided
# otherwise.
Decoding = kvpress.DecodingPress
describe(
    Decoding,
    decodes=True,
    only_decodes=True,
    keeps_tokens=True,
    # Around AdaKV it names slots instead of removing tokens.
    moves_slots=lambda press: not isinstance(press.base_press, kvpress.AdaKVPress),
)

CAM = kvpress.CAMPress
describe(CAM, merges_while_decoding=True, needs_all_heads=True, like_llama=True)

CompressionRatioDecoding = kvpress.CompressionRatioDecodingPress
describe(CompressionRatioDecoding)

DMS = kvpress.DMSPress
describe(
    DMS,
    decodes=lambda press: press.decoding,
    ratio_follows=True,
    masks_heads=True,
    whole_context=True,
    keeps_scores=True,
)

PerLayerCompression = kvpress.PerLayerCompressionPress
describe(PerLayerCompression, ratio_follows=True)

PrefillDecoding = kvpress.PrefillDecodingPress
describe(PrefillDecoding, decodes=True)

if not TYPE_CHECKING:  # type checkers take every class above without a list
    __all__ = [
        name
        for name, one in list(vars().items())
        if isinstance(one, type) and issubclass(one, kvpress.BasePress) and not name.endswith("Press")
    ]
