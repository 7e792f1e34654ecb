"""Launches the Triton attention kernels: what they can do, their settings, their buffers.

Three launches whatever the length: prepare the queries, attend in splits (one of them the 16-bit tokens),
merge. Nothing is tuned at run time; each head_dim and pair of widths compiles once.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantpress.codecs.spec import CodecSpec
from quantpress.kernels.attend.operands import DenseSegment, PackedSegment, PackedSide, Segment, Visibility
from quantpress.kernels.page_codec import ScalarPages

HEAD_DIMS = (64, 128, 256)
WIDTHS = (2, 3, 4)
MOST_QUERIES = 16
MOST_ROWS = 32
"""Query heads of a group times query tokens that one program attends; more tokens take more launches."""

DENSE_TILE_BYTES = 8192
"""Most bytes of keys that the kernel for 16-bit tokens holds at a time."""

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class SplitSettings:
    """How the split kernel is launched.

    Args:
        programs: programs to aim for, about what the GPU holds at once.
        warps: warps of a program.
        stages: depth of the software pipeline over pages.
    """

    programs: int
    warps: int = 4
    stages: int = 3


SAME_FOUR = SplitSettings(programs=528)
"""Keys and values of 4 bits: four programs on each of an H100's 132 multiprocessors."""

IN_PAIRS = SplitSettings(programs=384)
"""Other widths hold twice the tokens at a time: about three."""

WITH_THREE = SplitSettings(programs=792, stages=2)
"""3 bits read two planes: one stage less leaves room for two programs."""

WITHOUT_FP8 = SplitSettings(programs=264, stages=1)
"""float32 tiles: GPUs before Ada, and the interpreter."""


def supports(query: torch.Tensor, segments: Sequence[Segment], visibility: Visibility) -> bool:
    """Whether the kernels cover this call: few queries, one packed segment, plain codes of 2 to 4 bits.

    Where the last segment has lengths, the tokens of several queries must be among its tokens in use.
    """
    packed = [index for index, segment in enumerate(segments) if isinstance(segment, PackedSegment)]
    alone = len(packed) == 1 and packed[0] <= 1 and len(segments) - packed[0] <= 2
    if not alone or query.shape[2] > MOST_QUERIES or visibility.dropped is not None:
        return False
    if visibility.mask is not None or not (visibility.causal or query.shape[2] == 1):
        return False
    after = sum(segment.tokens for segment in segments[packed[0] + 1 :])
    segment = segments[packed[0]]
    assert isinstance(segment, PackedSegment)
    if not _plain(segment.keys) or not _plain(segment.values):
        return False
    own = query.shape[2] == 1 or after >= query.shape[2]
    return own and query.shape[1] // segment.kv_heads <= MOST_ROWS


def _plain(side: PackedSide) -> bool:
    codec = side.codec
    if not isinstance(codec, ScalarPages) or side.transform.order is not None:
        return False
    spec = codec.spec
    return (
        spec.estimator == "mse"
        and len(spec.groups) == 1
        and spec.groups[0].bits in WIDTHS
        and spec.codebook_of(0).form == "e4m3"
        and spec.head_dim in HEAD_DIMS
    )


def attend_triton(
    query: torch.Tensor,
    segments: Sequence[Segment],
    visibility: Visibility,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    plain: bool = False,
) -> torch.Tensor:
    """As `quantpress.kernels.attend.attend`, for calls that `supports` accepts.

    Args:
        query: [B, Hq, Tq, D].
        segments: the tokens in order.
        visibility: causal, as `supports` has it.
        scaling: factor on q.k.
        softcap: as there.
        sinks: as there.
        plain: float32 arithmetic without assembly or fp8, for Triton's interpreter.

    Returns:
        [B, Hq, Tq, Dv] in the query's dtype.
    """
    before: DenseSegment | None = None
    after: DenseSegment | None = None
    packed: PackedSegment | None = None
    for segment in segments:
        if isinstance(segment, PackedSegment):
            packed = segment
        elif packed is None:
            before = segment
        else:
            after = segment
    assert packed is not None
    queries, step = query.shape[2], MOST_ROWS * packed.kv_heads // query.shape[1]
    cap = 0.0 if softcap is None else softcap * LOG2_E
    outputs = []
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        for start in range(0, queries, step):
            part = query[:, :, start : start + step]
            call = _Call(part, packed, scaling * LOG2_E, cap, plain)
            hidden = queries - 1 - start  # newest tokens that the first of these queries does not see
            partial = call.attend(call.prepare(), before, after, hidden)
            outputs.append(call.merge(partial, before is not None or after is not None, sinks))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


class _Call:
    """Shapes and buffers of one call. Rows are (query head of the group, query token) pairs of a KV head."""

    def __init__(
        self, query: torch.Tensor, packed: PackedSegment, scale: float, softcap: float, plain: bool
    ) -> None:
        self.packed, self.scale, self.softcap, self.plain = packed, scale, softcap, plain
        self.batch, self.query_heads, self.queries, dim = query.shape
        self.kv_heads = packed.kv_heads
        self.heads = self.batch * self.kv_heads
        self.group = self.query_heads // self.kv_heads
        self.rows = self.group * self.queries
        self.padded = max(8, 1 << (self.rows - 1).bit_length())
        self.query = query.reshape(self.heads, self.rows, dim).contiguous()
        self.keys, self.values = _spec(packed.keys), _spec(packed.values)

    def _new(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.query.device)

    def prepare(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        from quantpress.kernels.attend.ends import prepare_kernel

        dim, transform = self.keys.head_dim, self.packed.keys.transform
        dtype = torch.float32 if self.plain else torch.float8_e4m3fn
        q = self._new(self.heads, 2 * self.padded, dim, dtype=dtype)
        factor, bias = (self._new(self.heads, self.padded) for _ in range(2))
        prepare_kernel[(self.padded, self.heads)](
            self.query,
            transform.weight,
            transform.mean,
            self.keys.rotation_of(0).matrix(self.query.device, torch.float32),
            q,
            factor,
            bias,
            self.scale,
            self.keys.codebook_of(0).unit,
            self.rows,
            D=dim,
            R=self.padded,
            HAS_WEIGHT=transform.weight is not None,
            HAS_MEAN=transform.mean is not None,
            PLAIN=self.plain,
            num_warps=16 if dim > 128 else 4,
        )
        return q, factor, bias

    def attend(
        self,
        prepared: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        before: DenseSegment | None,
        after: DenseSegment | None,
        hidden: int,
    ) -> list[torch.Tensor]:
        from quantpress.kernels.attend.lookup import lookup_assembly
        from quantpress.kernels.attend.split_k import attend_split_kernel

        q = prepared[0]
        books = self.keys.codebook_of(0), self.values.codebook_of(0)
        assembly = ("", "") if self.plain else tuple(lookup_assembly(book) for book in books)
        settings = split_settings(books[0].bits, books[1].bits, self.plain)
        pages, value_dim = self.packed.keys.pages, self.values.head_dim
        per_split = pages_per_split(pages, self.heads, settings)
        splits = -(-pages // per_split)
        programs = splits + (before is not None or after is not None)
        out = self._new(self.heads, programs, self.padded, value_dim)
        maximum, total = (self._new(self.heads, programs, self.padded) for _ in range(2))
        sides = (self.packed.keys, self.packed.values)
        planes = [side.planes[name] for side in sides for name in ("codes0", "scale0")]
        tails = [self._tail(segment) for segment in (before, after)]
        lengths = [_lengths(part) for part in (self.packed, before, after)]
        attend_split_kernel[(programs, self.heads)](
            *prepared,
            *planes,
            *(book.level_tensor(q.device) / book.unit if self.plain else q for book in books),
            self.query,
            *(states for keys, values, _ in tails for states in (keys, values)),
            *lengths,
            out,
            maximum,
            total,
            pages,
            per_split,
            splits,
            *(stride for plane in planes for stride in (plane.stride(1), plane.stride(2))),
            *(tokens for _, _, tokens in tails),
            hidden,
            self.rows,
            self.queries,
            self.scale,
            self.softcap,
            D=self.keys.head_dim,
            DV=value_dim,
            R=self.padded,
            TILE=dense_tile(max(self.keys.head_dim, value_dim) * self.query.element_size()),
            K_BITS=books[0].bits,
            V_BITS=books[1].bits,
            K_ASM=assembly[0],
            V_ASM=assembly[1],
            PLAIN=self.plain,
            STAGES=settings.stages,
            ACC=64,
            USED=lengths[0] is not None,
            FIRST_USED=lengths[1] is not None,
            RECENT_USED=lengths[2] is not None,
            num_warps=settings.warps,
        )
        return [out, maximum, total]

    def _tail(self, segment: DenseSegment | None) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Keys, values and number of tokens kept as they are; the query stands in for none."""
        if segment is None:
            return self.query, self.query, 0
        keys, values = (states.to(self.query.dtype).contiguous() for states in (segment.keys, segment.values))
        return keys, values, segment.tokens

    def merge(self, partial: list[torch.Tensor], has_tail: bool, sinks: torch.Tensor | None) -> torch.Tensor:
        from quantpress.kernels.attend.ends import merge_kernel

        value_dim = self.values.head_dim
        out = self._new(self.heads, self.rows, value_dim, dtype=self.query.dtype)
        merge_kernel[(self.rows, self.heads)](
            *partial,
            sinks,
            self.values.rotation_of(0).matrix(out.device, torch.float32),
            out,
            partial[0].shape[1] - has_tail,
            self.rows,
            self.queries,
            self.group,
            self.kv_heads,
            self.values.codebook_of(0).unit,
            DV=value_dim,
            R=self.padded,
            HAS_DENSE=has_tail,
            HAS_SINKS=sinks is not None,
            BLOCK=16,
            num_warps=16 if value_dim > 128 else 4,
        )
        return out.view(self.batch, self.query_heads, self.queries, value_dim)


def dense_tile(token_bytes: int) -> int:
    """16-bit tokens that a program holds at a time, 16 or 32, for keys of `token_bytes` a token."""
    return 32 if 32 * token_bytes <= DENSE_TILE_BYTES else 16


def split_settings(key_bits: int, value_bits: int, plain: bool) -> SplitSettings:
    """How to launch the split kernel for these widths."""
    if plain:
        return WITHOUT_FP8
    if 3 in (key_bits, value_bits):
        return WITH_THREE
    return SAME_FOUR if key_bits == value_bits == 4 else IN_PAIRS


def pages_per_split(pages: int, heads: int, settings: SplitSettings) -> int:
    """Pages that one program reads, an even number, so that all programs together fill the GPU once.

    Args:
        pages: P of one KV head.
        heads: B * Hkv.
        settings: how many programs to aim for.
    """
    splits = max(1, settings.programs // heads)
    return max(2, 2 * math.ceil(pages / splits / 2))


def _lengths(segment: Segment | None) -> torch.Tensor | None:
    return None if segment is None or segment.lengths is None else segment.lengths.contiguous()


def _spec(side: PackedSide) -> CodecSpec:
    assert isinstance(side.codec, ScalarPages)
    return side.codec.spec
