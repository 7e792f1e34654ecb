"""`PagedAttention`: many sequences of different lengths over one pool of packed pages.

This is the host side of `PagePool`: it knows the blocks and the length of each sequence. Attention reads the
same from `block_tables`, `context_lens` and `page_counts` on the device.
"""

import sys
from collections.abc import Sequence

import torch

from quantpress.cache.paged.buffers import PoolSize
from quantpress.cache.paged.memory import PagedMemory, paged_memory
from quantpress.cache.paged.plan import PagedPlan
from quantpress.cache.paged.pool import PagePool
from quantpress.cache.paged.sequences import PagedSequences
from quantpress.cache.settings import DEFAULT_RECENT_TOKENS, DEFAULT_SINK_TOKENS, LayerSettings
from quantpress.codecs.protocol import PageCodec
from quantpress.codecs.scalar import ScalarPages
from quantpress.errors import InvalidInputError
from quantpress.quantization.moments import finite
from quantpress.quantization.spec import CodecSpec


class PagedAttention(PagedSequences):
    """Keys and values of many sequences in packed pages, and attention over them.

    All memory is allocated at once. A sequence is named by a number, its row in `block_tables`,
    `context_lens` and `page_counts`. A page holds 128 tokens and is written as a whole. Until then, the
    newest tokens of a sequence stay in 16 bits: `recent_tokens` + 1 to `recent_tokens` + 128 of them once it
    has a page.

    Args:
        num_blocks: pages that all sequences together may hold, in every layer.
        max_sequences: S, the number of sequences at a time.
        query_heads: Hq.
        kv_heads: Hkv; Hq is a multiple of it.
        head_dim: D of queries and keys.
        value_dim: Dv of values; None: D.
        layers: L. All layers use the same blocks of a sequence.
        max_tokens: most tokens of one sequence; None: limited by the blocks only.
        bits: code width: 1, 2, 3, 4, 8 or a fraction between 1 and 4; or a pair for (keys, values).
        sink_tokens: number of first tokens of a sequence kept in 16 bits.
        recent_tokens: least number of last tokens kept in 16 bits, once there are pages.
        mean_key: subtract each head's mean key before encoding.
        balance: weight key channels, if `add` is given `query_moment`.
        codecs: codecs of keys and of values; replaces `bits` and `scale_dtype`.
        dtype: dtype of the 16-bit tokens.
        device: device of all tensors.
        scale_dtype: dtype of the stored scales, "float16", "bfloat16" or "float32". float16 holds scales
            below 65504; a longer vector is an error.

    Attributes:
        pool: the memory, for an engine that manages blocks itself; see `quantpress.cache.paged.pool`.
        block_tables: [S, P] int32 on the device, the blocks of each sequence.
        context_lens: [S] int32 on the device, tokens of each sequence; 0 if it is not open.
        page_counts: [S] int32 on the device, pages of each sequence.

    Raises:
        UnsupportedBitsError, UnsupportedHeadDimError: no codec has these bits or this head_dim.
        InvalidInputError: another argument is out of range.

    Source: block tables after PagedAttention (Kwon et al. 2023, arXiv 2309.06180).

    Example:
        >>> paged = PagedAttention(64, 4, query_heads=8, kv_heads=2, head_dim=64, bits=3)
        >>> prompt = torch.randn(2, 2, 1000, 64)
        >>> a = paged.add(*prompt)
        >>> b = paged.fork(a)  # shares the pages
        >>> paged.append([b, a], torch.randn(2, 2, 1, 64), torch.randn(2, 2, 1, 64))
        >>> paged.attend(torch.randn(2, 8, 1, 64), [b, a]).shape
        torch.Size([2, 8, 1, 64])
        >>> paged.length(a), paged.free_blocks
        (1001, 58)
    """

    def __init__(
        self,
        num_blocks: int,
        max_sequences: int,
        *,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        layers: int = 1,
        max_tokens: int | None = None,
        bits: float | tuple[float, float] = 4,
        sink_tokens: int = DEFAULT_SINK_TOKENS,
        recent_tokens: int = DEFAULT_RECENT_TOKENS,
        mean_key: bool = True,
        balance: bool = True,
        codecs: tuple[PageCodec, PageCodec] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        scale_dtype: str = "float16",
    ) -> None:
        if codecs is None:
            codecs = _codecs(bits, head_dim, head_dim if value_dim is None else value_dim, scale_dtype)
        settings = LayerSettings(*codecs, sink_tokens, recent_tokens, mean_key, balance)
        size = PoolSize(num_blocks, max_sequences, layers, kv_heads)
        if query_heads < 1 or query_heads % kv_heads:
            raise InvalidInputError(f"{query_heads} query heads are not a multiple of {kv_heads} KV heads")
        if max_tokens is not None and max_tokens < 1:
            raise InvalidInputError(f"max_tokens is {max_tokens}; give 1 or more, or leave it out")
        pool = PagePool(settings, size, dtype, torch.empty(0, dtype=dtype, device=device).device)
        super().__init__(pool, max_tokens)
        self.query_heads = query_heads

    @property
    def nbytes(self) -> int:
        """All bytes allocated; see `memory`."""
        return self.memory().total_bytes

    def memory(self) -> PagedMemory:
        """The bytes allocated, measured by kind."""
        return paged_memory(self.pool, [self.block_tables, self.context_lens, self.page_counts])

    def fill(
        self,
        sequence: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        layer: int = 0,
        query_moment: torch.Tensor | None = None,
    ) -> None:
        """Write the prompt of an opened sequence, in one layer.

        Args:
            sequence: returned by `open`.
            keys: [Hkv, T, D], post-RoPE.
            values: [Hkv, T, Dv].
            layer: index of the layer.
            query_moment: [Hkv, D] mean square of the prompt's queries over the query heads of each KV head,
                to balance channels; None: no balance.

        Raises:
            NonFiniteError: tokens to be packed contain NaN or infinity; nothing was changed.
            InvalidInputError: the sequence is unknown, keys or values have the wrong shape, or T is not the
                number of tokens given to `open`.
        """
        of = self._of(sequence)
        if keys.dim() == 3 and keys.shape[1] != of.tokens:
            raise InvalidInputError(
                f"sequence {sequence} was opened for {of.tokens} tokens, got {keys.shape[1]}"
            )
        self.pool.fill(keys, values, sequence, of.blocks, layer=layer, query_moment=query_moment)

    def add(
        self, keys: torch.Tensor, values: torch.Tensor, *, query_moment: torch.Tensor | None = None
    ) -> int:
        """Open a sequence and write its prompt, all layers at once.

        Args:
            keys: [Hkv, T, D], post-RoPE; [L, Hkv, T, D] for several layers.
            values: [Hkv, T, Dv], or [L, Hkv, T, Dv].
            query_moment: [Hkv, D], or [L, Hkv, D]; see `fill`.

        Returns:
            The number of the sequence.

        Raises:
            PoolFullError: too few blocks are free, or `max_sequences` sequences are open.
            NonFiniteError: tokens to be packed contain NaN or infinity; no sequence was opened.
            InvalidInputError: wrong shapes or too many tokens; no sequence was opened.
        """
        keys, values = (self._by_layer(states, 4) for states in (keys, values))
        moments = None if query_moment is None else self._by_layer(query_moment, 3)
        sequence = self.open(keys.shape[2])
        try:
            for layer in range(self.pool.size.layers):
                moment = None if moments is None else moments[layer]
                self.fill(sequence, keys[layer], values[layer], layer=layer, query_moment=moment)
        except BaseException:
            self.free(sequence)
            raise
        return sequence

    def append(self, sequences: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append tokens to sequences, all layers at once. Older tokens that fill whole pages are packed.

        Args:
            sequences: B sequences, each once.
            keys: [B, Hkv, n, D], post-RoPE, the same n for all; [L, B, Hkv, n, D] for several layers.
            values: [B, Hkv, n, Dv], or [L, B, Hkv, n, Dv].

        Raises:
            PoolFullError: too few blocks are free; nothing was appended.
            NonFiniteError: tokens to be packed contain NaN or infinity; nothing was appended.
            InvalidInputError: a sequence is unknown or named twice, or a shape is wrong; nothing was
                appended.
        """
        keys, values = (self._by_layer(states, 5) for states in (keys, values))
        tokens, step = keys.shape[3], self.step_tokens
        lead = (self.pool.size.layers, len(sequences), self.pool.size.kv_heads, tokens)
        self.pool.check_states(keys, values, lead)
        if tokens > step:  # else none of the new tokens is packed
            finite(keys, "keys"), finite(values, "values")
        before = {number: of.tokens for number, (of, _) in self._pages_needed(sequences, tokens).items()}
        try:
            for start in range(0, tokens, step):
                part = slice(start, min(start + step, tokens))
                self.extend(sequences, part.stop - start)
                plan = self.plan(sequences)
                for layer in range(self.pool.size.layers):
                    self.write(keys[layer, :, :, part], values[layer, :, :, part], plan, layer=layer)
        except BaseException:
            for number, length in before.items():
                self.crop(number, length)
            raise

    # Steps, layer by layer

    def plan(self, sequences: Sequence[int] | None = None) -> PagedPlan:
        """Page table and present lengths of sequences, which all layers of a step share.

        With None, everything is read from `block_tables`, `context_lens` and `page_counts` on the device. The
        call may then be captured in a CUDA graph together with `write` and `attend`; at each replay the graph
        reads their present contents.

        Args:
            sequences: B sequences in any order; None: every row of `block_tables`, in order, B = S.

        Raises:
            InvalidInputError: a sequence is unknown, or the list is empty.
        """
        chosen = self.sequences if sequences is None else list(sequences)
        if sequences is not None and not chosen:
            raise InvalidInputError("no sequence is named; name one or more, or None for every row")
        held = [(len(of.blocks), self._in_window(of)) for of in map(self._of, chosen)]
        most = min((1 + window for blocks, window in held if blocks), default=sys.maxsize)
        tables = [self.block_tables, self.context_lens, self.page_counts]
        rows = None
        if sequences is not None and chosen != list(range(self.pool.size.sequences)):
            rows = torch.tensor(chosen, dtype=torch.int64, device="cpu").to(self.device, non_blocking=True)
            tables = [table.index_select(0, rows) for table in tables]
        if sequences is not None or self.device.type == "cpu":  # a graph would keep the present number
            tables[0] = tables[0][:, : max([1, *(blocks for blocks, _ in held)])]
        return self.pool.plan(tables[0], tables[1], tables[2], rows, most_queries=most)

    def write(self, keys: torch.Tensor, values: torch.Tensor, plan: PagedPlan, *, layer: int = 0) -> None:
        """Write the tokens that `extend` has counted in every sequence of the plan.

        Args:
            keys: [B, Hkv, n, D], post-RoPE, the n tokens that `extend` has counted.
            values: [B, Hkv, n, Dv].
            plan: made after `extend`.
            layer: index of the layer.

        Raises:
            InvalidInputError: keys or values have the wrong shape.
        """
        self.pool.write(keys, values, plan, layer=layer)

    def attend(
        self,
        query: torch.Tensor,
        sequences: PagedPlan | Sequence[int] | None = None,
        *,
        layer: int = 0,
        scaling: float | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of the last Tq tokens of each sequence over all its tokens.

        Args:
            query: [B, Hq, Tq, D], post-RoPE; causal, aligned at the last token.
            sequences: B sequences in any order, None for every row, or a plan for them.
            layer: index of the layer.
            scaling: factor on q.k; None: 1 / sqrt(D).
            softcap: scores become softcap * tanh(score / softcap), or None.
            sinks: [Hq] learned logits that carry no value, or None.

        Returns:
            [B, Hq, Tq, Dv] in the query's dtype; zeros for a row without a sequence.

        Raises:
            InvalidInputError: a sequence is unknown, or the query has the wrong shape. Tq may be up to
                `step_tokens`, and less after a `crop`.
        """
        plan = sequences if isinstance(sequences, PagedPlan) else self.plan(sequences)
        if query.dim() == 4 and query.shape[1] != self.query_heads:
            raise InvalidInputError(f"the query has {query.shape[1]} heads, not {self.query_heads}")
        return self.pool.attend(query, plan, layer=layer, scaling=scaling, softcap=softcap, sinks=sinks)

    def _by_layer(self, states: torch.Tensor, dims: int) -> torch.Tensor:
        """The tensor with layers as first dimension, which may be missing if there is only one layer."""
        layers = self.pool.size.layers
        states = states.unsqueeze(0) if layers == 1 and states.dim() == dims - 1 else states
        if states.dim() != dims or states.shape[0] != layers:
            raise InvalidInputError(
                f"a tensor of shape {tuple(states.shape)} does not fit; give {dims} dimensions with the "
                f"{layers} layers in front"
            )
        return states


def _codecs(
    bits: float | tuple[float, float], key_dim: int, value_dim: int, scale_dtype: str
) -> tuple[PageCodec, PageCodec]:
    key_bits, value_bits = bits if isinstance(bits, tuple) else (bits, bits)
    return (
        ScalarPages(CodecSpec(key_dim, key_bits, "key", scale_dtype=scale_dtype)),
        ScalarPages(CodecSpec(value_dim, value_bits, "value", scale_dtype=scale_dtype)),
    )
