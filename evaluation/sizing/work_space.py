"""What reading a context takes beside weights and cache: the largest of a few stages of one decoder layer.

The numbers of tensors were counted at the peak on the CPU, for four Llama shapes. A context that is read
whole has them for all tokens; one that is read in chunks (`chunked_prefill`) has some for all tokens and some
for a chunk.
"""

from dataclasses import dataclass

from quantpress.kernels.encode.reference import WORKSPACE_VALUES
from quantpress.pipelines.reading.chunk_sizes import QUERY_CHUNKS

ENCODER_BYTES = 24
"""Bytes for each of up to `WORKSPACE_VALUES` coordinates that are packed at a time."""


@dataclass(frozen=True)
class Widths:
    """Numbers that a token takes in one decoder layer.

    Args:
        hidden: in its hidden state.
        intermediate: in the feed-forward.
        queries: in all query heads.
        states: in the keys of all KV heads; the values have as many.
        rotary: in both tables of the rotary embedding together.
    """

    hidden: int
    intermediate: int
    queries: int
    states: int
    rotary: int

    def whole(self, tokens: int, pressed: bool, packed: bool) -> int:
        """Peak count of numbers while a context is read whole.

        Args:
            tokens: tokens of all sequences.
            pressed: whether there is a press.
            packed: whether a press packs.
        """
        feed_forward = 6 * self.hidden + 3 * self.intermediate
        attention = 4 * self.hidden + 3 * self.queries + (3 + pressed) * self.states
        packing = 4 * self.hidden + 12 * self.states if packed else 0
        return tokens * max(feed_forward, attention, packing)

    def in_chunks(self, tokens: int, chunk: int, evicts: bool, packed: bool, itemsize: int) -> int:
        """Peak count of numbers while a context is read in chunks.

        Args:
            tokens: tokens of all sequences.
            chunk: tokens of a chunk, of all sequences.
            evicts: whether a press scores tokens. Presses differ; ExpectedAttention, and SnapKV with 128
                channels a head, take four tensors of all query heads.
            packed: whether a press packs.
            itemsize: bytes of a number.
        """
        kept = 3 * self.hidden + self.rotary
        raw = 2 * self.states if evicts or packed else 0  # otherwise they are the cache
        queries = min(tokens, QUERY_CHUNKS * chunk)
        attending = 4 * self.queries + 2 * self.states
        first = tokens * (kept - self.hidden + raw) + queries * attending  # no output yet
        later = tokens * (kept + raw) + min(queries, tokens - queries) * attending
        feed_forward = tokens * kept + min(tokens, chunk) * (3 * self.intermediate + 2 * self.hidden)
        scoring = tokens * (kept + raw + 4 * self.queries) if evicts else 0
        coded = min(WORKSPACE_VALUES, tokens * self.states) * ENCODER_BYTES // itemsize
        packing = tokens * (kept + raw) + coded if packed else 0
        return max(first, later, feed_forward, scoring, packing)
