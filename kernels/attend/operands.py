"""What attention reads: segments of tokens, and which of them each query token sees.

Shapes: B batch, Hq query heads, Hkv KV heads, Tq query tokens, T key tokens, D head_dim of keys, Dv of
values.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch

from quantpress.errors import InvalidInputError
from quantpress.kernels.attend.schedule import PageSchedule
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.quantization.codebook import Codebook
from quantpress.quantization.rotation import Rotation
from quantpress.quantization.transform import ChannelTransform
from quantpress.quantization.trellis.code import Filters


@dataclass(frozen=True)
class DenseSegment:
    """Tokens kept as they are.

    Without a page table every sequence has T tokens of its own. With one, keys and values are pools of pages
    of n tokens of all KV heads, and token t of batch entry b is token t % n of page table[b, t // n]; batch
    entries may share pages. The kernels read pools of the query's dtype whose pages hold the tokens of a head
    together (strides n * D, or less, D and 1 within a head); others are gathered by plain PyTorch.

    Args:
        keys: [B, Hkv, T, D] any float dtype; with a table, a pool [N, Hkv, n, D].
        values: [B, Hkv, T, Dv] any float dtype; with a table, a pool [N, Hkv, n, Dv].
        lengths: [B, Hkv] int32 on the same device, the number of tokens in use of each KV head; None: all.
            Tokens that are not in use may hold anything, NaN included.
        starts: [B, Hkv] int32 on the same device, the first token in use of each KV head: those in use are
            starts <= t < starts + lengths. None: 0. Needs `lengths`.
        table: [B, P] int32 on the same device, the pages of each batch entry, T = P * n. Pages without a
            token in use may name any row of the pool. Needs `lengths`.

    Raises:
        InvalidInputError: `starts` or `table` are given without `lengths`, the table is not int32 [B, P], or
            keys and values by table are not pools of the same pages.
    """

    keys: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor | None = None
    starts: torch.Tensor | None = None
    table: torch.Tensor | None = None

    def __post_init__(self) -> None:
        _check_counted(self.lengths, self.starts, self.table, "[B, P]")
        if self.table is None:
            return
        keys, values = tuple(self.keys.shape), tuple(self.values.shape)
        if len(keys) != 4 or len(values) != 4 or keys[:3] != values[:3]:
            raise InvalidInputError(
                f"by table, keys of shape {keys} and values of shape {values} are not pools of the same "
                "pages; give [N, Hkv, n, D] and [N, Hkv, n, Dv]"
            )

    @property
    def tokens(self) -> int:
        own = self.keys.shape[2]
        return own if self.table is None else own * self.table.shape[1]

    def states(self, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, Hkv, n, D] of tokens `low` to `high`; copies where there is a table."""
        if self.table is None:
            return self.keys[:, :, low:high], self.values[:, :, low:high]
        token = torch.arange(low, min(high, self.tokens), device=self.table.device)
        own = self.keys.shape[2]
        pages = self.table.index_select(1, token // own).long()  # [B, n]
        keys, values = (pool[pages, :, token % own].transpose(1, 2) for pool in (self.keys, self.values))
        return keys, values

    def check_slots(self) -> None:
        """Refuse slots where there is a table, which names the pages of each batch entry already."""
        if self.table is not None:
            raise InvalidInputError(
                "slots beside 16-bit tokens with a table; leave them out: the table names each entry's pages"
            )

    def of_slots(self, slots: torch.Tensor) -> "DenseSegment":
        """The segment of the sequences in `slots` [B] int64; their keys and values are copied.

        Raises:
            InvalidInputError: the segment has a table.
        """
        self.check_slots()
        keys, values = (states.index_select(0, slots) for states in (self.keys, self.values))
        return replace(self, keys=keys, values=values)

    @property
    def used(self) -> torch.Tensor | int:
        """Number of tokens in use: [B, Hkv], or T where all of them are."""
        return self.tokens if self.lengths is None else self.lengths

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def device(self) -> torch.device:
        return self.keys.device


MOST_FINE = 255.0
"""The largest level of two bytes, in units of the coarse one."""


@dataclass(frozen=True)
class ScalarOperands:
    """How kernels read pages of scalar codes: each channel of a vector in code space is scale * level[code].

    The codes are the plane "codes0", in the layout of `quantpress.kernels.layout` for keys or for values; the
    scales, one per token, are the plane "scale0".

    Args:
        rotation: into code space, over all D channels.
        codebook: levels of the codes.
        page_keys: the planes "mean0" and "sink0" have two keys of each page [D], transformed and not rotated:
            the mean, without which the codes are, and that of the token whose scale is negative.
    """

    rotation: Rotation
    codebook: Codebook
    page_keys: bool = False
    filters: ClassVar[Filters] = ()

    @property
    def head_dim(self) -> int:
        return self.rotation.dim

    @property
    def bits(self) -> int:
        return self.codebook.bits

    @property
    def fine(self) -> bool:
        """Whether a level is two bytes: odd whole numbers of one unit, and of a 256th of it."""
        return self.codebook.form != "int8"

    @property
    def unit(self) -> float:
        """Factor on all `levels`."""
        book = self.codebook
        return book.unit * book.scaled[-1] / MOST_FINE if self.fine else book.unit

    @property
    def levels(self) -> tuple[float, ...]:
        """Those of the codes; up to `MOST_FINE` where they are `fine`."""
        book = self.codebook
        return tuple(level * (book.unit / self.unit) for level in book.scaled) if self.fine else book.scaled


@dataclass(frozen=True)
class SignOperands:
    """How kernels read pages of bit planes: a vector in code space is linear in the bits of its codes.

    Its channel t is scale * unit * sum_k sum_j filters[k][j] * s_k[(t - j) % D], with s_k = 1 where bit k of
    a code is set and -1 elsewhere; or scale * unit * s_0[t], for codes of one bit. The plane "codes0" has a
    page of single bits for each k, one after the other, in the layout of `quantpress.kernels.layout`; the
    scales are the plane "scale0".

    Args:
        rotation: into code space, over all D channels.
        unit: factor on all levels.
        filters: taps by bit plane and lag, [b][lags]; none: codes of one bit.
    """

    rotation: Rotation
    unit: float
    filters: Filters = ()
    codebook: ClassVar[None] = None
    fine: ClassVar[bool] = False
    levels: ClassVar[tuple[float, ...]] = (-1.0, 1.0)
    page_keys: ClassVar[bool] = False

    @property
    def head_dim(self) -> int:
        return self.rotation.dim

    @property
    def bits(self) -> int:
        return max(len(self.filters), 1)


@dataclass(frozen=True)
class CodePart:
    """Channels in code space that have codes and a scale of their own: each is scale * levels[code].

    With `reach` codes are bit planes, and those of `reach` channels, the own one and the ones before it,
    around the end, choose a level: bit k * reach + j of its number is bit k of the code j channels back.

    Args:
        codes: name of the plane of codes.
        scales: name of the plane of scales, one for each token.
        bits: code width.
        channels: C.
        levels: 2**bits levels; 2**(bits * reach), 512 at most, with a reach.
        reach: 0 where a level is that of one code.
    """

    codes: str
    scales: str
    bits: int
    channels: int
    levels: tuple[float, ...]
    reach: int = 0


@dataclass(frozen=True, eq=False)
class PartOperands:
    """How kernels read pages whose vectors are a sum of parts: x = sum_i turn_i.T (scale_i * levels_i).

    So scores are q.x = sum_i scale_i (turn_i q).levels_i. Parts may be groups of channels, each with a
    rotation of its own, or a code and the sketch of what it leaves over. Equal by value, as tables of the
    kernels are kept by them.

    Args:
        parts: one or two.
        turn: [C of all parts, D] float64 on the CPU, the rows of turn_i one after the other.
        groups: those of the parts, from the first on, that are codes of channels side by side.
    """

    parts: tuple[CodePart, ...]
    turn: torch.Tensor
    groups: tuple[ScalarOperands, ...] = ()
    codebook: ClassVar[None] = None
    fine: ClassVar[bool] = False
    levels: ClassVar[tuple[float, ...]] = ()
    page_keys: ClassVar[bool] = False
    filters: ClassVar[Filters] = ()

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, PartOperands) and self._value == other._value)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _value(self) -> tuple[Any, ...]:
        turn = hashlib.sha256(self.turn.contiguous().numpy().tobytes()).digest()
        return self.parts, tuple(self.turn.shape), turn, self.groups

    @cached_property
    def _hash(self) -> int:
        return hash(self._value)

    @property
    def head_dim(self) -> int:
        return self.turn.shape[1]

    @property
    def bits(self) -> int:
        """Those of the widest codes."""
        return max(part.bits for part in self.parts)


KernelOperands = ScalarOperands | SignOperands | PartOperands


class PageReader(Protocol):
    """How pages of one codec are read; `quantpress.codecs.protocol.PageCodec` says what each method does."""

    @property
    def head_dim(self) -> int: ...
    @property
    def heads(self) -> tuple[tuple[int, ...], ...]: ...
    @property
    def kv_heads(self) -> int | None: ...
    def of_heads(
        self, planes: dict[str, torch.Tensor], transform: ChannelTransform, heads: tuple[int, ...]
    ) -> tuple["PageReader", dict[str, torch.Tensor], ChannelTransform]: ...
    def to_code_space(self, x: torch.Tensor) -> torch.Tensor: ...
    def from_code_space(self, y: torch.Tensor) -> torch.Tensor: ...
    def decode_code_space(self, planes: dict[str, torch.Tensor]) -> torch.Tensor: ...
    def decode(
        self, planes: dict[str, torch.Tensor], transform: ChannelTransform, dtype: torch.dtype
    ) -> torch.Tensor: ...
    def gather(self, planes: dict[str, torch.Tensor], tokens: torch.Tensor) -> dict[str, torch.Tensor]: ...
    def kernel_operands(self) -> KernelOperands | None: ...


@dataclass(frozen=True)
class PackedSide:
    """The keys, or the values, of packed pages.

    Args:
        codec: reads the planes.
        planes: the codec's tensors [B, Hkv, P, ...]; where it has groups of heads, each of the heads of its
            group; where the segment has a table, a pool [N, ...] of pages of single heads.
        transform: the channel transform of these planes, for each [B, Hkv], or [1, Hkv] for all.
    """

    codec: PageReader
    planes: dict[str, torch.Tensor]
    transform: ChannelTransform


@dataclass(frozen=True)
class PackedSegment:
    """Tokens in packed pages, `PAGE_TOKENS` to a page.

    Without a page table every head has P pages of its own. With one the planes are a pool, and each row of
    the pool is a page of one head; heads and batch entries may share rows. A serving engine's blocks
    [blocks, Hkv, ...] are such a pool: head h of block b is row b * Hkv + h.

    Args:
        keys: the key side.
        values: the value side, with the same pages.
        lengths: [B, Hkv] int32 on the same device, the number of tokens in use of each KV head, 0 included;
            None: all. Tokens that are not in use may hold anything.
        table: [B, Hkv, P] int32 on the same device: page p of head (b, h) is row table[b, h, p] of the pool;
            pages without a token in use may name any row. Needs `lengths`.
        starts: [B, Hkv] int32 on the same device: the tokens in use are starts <= t < starts + lengths out of
            the P * 128. None: 0. Whole pages may lie before a start. Needs `lengths`.
        schedule: what `page_schedule` made of these lengths, this table and these starts; None: each call
            works it out.

    Raises:
        InvalidInputError: the table is not int32 [B, Hkv, P]; a table or starts are given without lengths; or
            a schedule without a table.
    """

    keys: PackedSide
    values: PackedSide
    lengths: torch.Tensor | None = None
    table: torch.Tensor | None = None
    starts: torch.Tensor | None = None
    schedule: PageSchedule | None = None

    def __post_init__(self) -> None:
        _check_counted(self.lengths, self.starts, self.table, "[B, Hkv, P]")
        if self.schedule is not None and self.table is None:
            raise InvalidInputError("a schedule is for pages by table; leave it out, or give the table")

    @property
    def pages(self) -> int:
        """P, the pages of the longest head; 0 where there are no planes."""
        return self._shape[2] if self.table is not None or self.keys.planes else 0

    @property
    def tokens(self) -> int:
        return self.pages * PAGE_TOKENS

    @property
    def used(self) -> torch.Tensor | int:
        """Number of tokens in use: [B, Hkv], or T where all of them are."""
        return self.tokens if self.lengths is None else self.lengths

    @property
    def kv_heads(self) -> int:
        return self.keys.codec.kv_heads or self._shape[1]

    @property
    def device(self) -> torch.device:
        return self._first.device

    def of_slots(self, slots: torch.Tensor) -> "PackedSegment":
        """The segment with the transforms of the sequences in `slots` [B] int64, copied; the pages stay."""
        keys, values = (
            replace(side, transform=side.transform.entries(lambda part: part.index_select(0, slots)))
            for side in (self.keys, self.values)
        )
        return replace(self, keys=keys, values=values)

    def narrow(self, start: int, stop: int) -> tuple[PackedSide, PackedSide]:
        """Keys and values of pages `start` to `stop` of every head, planes [B, Hkv, n, ...].

        The planes are views, or copies where there is a table.
        """
        return self._narrowed(self.keys, start, stop), self._narrowed(self.values, start, stop)

    def whole_keys(self) -> PackedSide:
        """The keys of all P pages, planes [B, Hkv, P, ...]; a copy where there is a table."""
        return self._narrowed(self.keys, 0, self.pages)

    def whole_values(self) -> PackedSide:
        """The values of all P pages, as `whole_keys` returns the keys."""
        return self._narrowed(self.values, 0, self.pages)

    def _narrowed(self, side: PackedSide, start: int, stop: int) -> PackedSide:
        rows = None if self.table is None else self.table[:, :, start:stop].long()
        planes = {
            name: plane[:, :, start:stop] if rows is None else plane[rows]
            for name, plane in side.planes.items()
        }
        return PackedSide(side.codec, planes, side.transform)

    @property
    def _first(self) -> torch.Tensor:
        """A tensor whose first dimensions are B, Hkv and P."""
        return next(iter(self.keys.planes.values())) if self.table is None else self.table

    @property
    def _shape(self) -> torch.Size:
        return self._first.shape


Segment = DenseSegment | PackedSegment


def _check_counted(
    lengths: torch.Tensor | None, starts: torch.Tensor | None, table: torch.Tensor | None, shape: str
) -> None:
    if lengths is None and (starts is not None or table is not None):
        raise InvalidInputError("a segment has a table or starts, but no lengths; give them too")
    if table is not None and (table.dim() != len(shape.split(",")) or table.dtype != torch.int32):
        raise InvalidInputError(
            f"the table of a segment is {table.dtype} {tuple(table.shape)}; give torch.int32 {shape}"
        )


@dataclass(frozen=True)
class Visibility:
    """Which key tokens each query token sees.

    Args:
        queries: Tq.
        tokens: T over all segments, in use or not.
        causal: query token i sees tokens up to T - Tq + i. Where segments have `lengths`, tokens that are not
            in use do not count: the last Tq - 1 - i tokens in use are hidden.
        mask: [B or 1, 1 or Hq, Tq or 1, >= T] bool (True: seen) or float (added to scores), or None; replaces
            the causal rule.
        dropped: [B, Hkv, T] bool, True where a KV head must not see a token, or None.
    """

    queries: int
    tokens: int
    causal: bool = True
    mask: torch.Tensor | None = None
    dropped: torch.Tensor | None = None

    def bias(
        self, start: int, stop: int, shape: tuple[int, int, int, int], device: torch.device
    ) -> torch.Tensor | None:
        """What `mask` and `dropped` add to the scores of tokens `start` to `stop`.

        Args:
            start: first token.
            stop: one past the last token.
            shape: (B, Hkv, G, Tq), the leading dimensions of the scores; G query heads share a KV head.
            device: device of the result.

        Returns:
            float32 broadcastable to [B, Hkv, G, Tq, stop - start], or None when everything is seen.
        """
        heads, group = shape[1], shape[2]
        total: torch.Tensor | None = None
        if self.mask is not None:
            part = self.mask[..., start:stop].to(device)
            part = additive(part) if part.dtype == torch.bool else part.float()
            if part.shape[1] == 1:
                total = part.unsqueeze(1)  # [B or 1, 1, 1, Tq or 1, n]
            else:
                total = part.reshape(part.shape[0], heads, group, part.shape[2], part.shape[3])
        if self.dropped is not None:
            part = additive(~self.dropped[:, :, start:stop].to(device))[:, :, None, None]
            total = part if total is None else total + part
        return total

    def unseen(
        self, segment: Segment, low: int, high: int, behind: torch.Tensor | int
    ) -> torch.Tensor | None:
        """Which of tokens `low` to `high` of a segment are not in use, or hidden by the causal rule.

        Args:
            segment: holds the tokens.
            low: first token, counted in the segment.
            high: one past the last token.
            behind: number of tokens in use in later segments, [B, Hkv] where they have lengths.

        Returns:
            bool (True: not seen) broadcastable to [B, Hkv, G, Tq, high - low], or None where all are seen.
        """
        causal = self.causal and self.mask is None and self.queries > 1
        if segment.lengths is None and isinstance(behind, int):
            causal = causal and behind + segment.tokens - high < self.queries - 1
        if segment.lengths is None and not causal:
            return None
        token = torch.arange(low, high, device=segment.device)
        if segment.starts is not None:
            token = token - segment.starts.unsqueeze(-1)  # [B, Hkv, n], counted from the first in use
        used = segment.used
        used = used if isinstance(used, int) else used.unsqueeze(-1)
        behind = behind if isinstance(behind, int) else behind.unsqueeze(-1)
        unused = (token < 0) | (token >= used)  # [n] or [B, Hkv, n]
        unused = unused if unused.dim() == 1 else unused[:, :, None, None]
        if not causal:
            return unused
        newer = behind + used - token  # tokens in use from this one on
        waiting = torch.arange(
            self.queries - 1, -1, -1, device=token.device
        )  # newest that query i must not see
        hidden = newer.unsqueeze(-2) <= waiting.unsqueeze(-1)
        return unused | (hidden if hidden.dim() == 2 else hidden.unsqueeze(2))


def additive(seen: torch.Tensor) -> torch.Tensor:
    """0 where `seen` is True and minus infinity elsewhere, float32."""
    return torch.zeros(seen.shape, dtype=torch.float32, device=seen.device).masked_fill_(~seen, float("-inf"))
