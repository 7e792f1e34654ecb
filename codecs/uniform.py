"""Uniform integer codes, as most cache quantizers use them: the controls that TurboQuant is compared with.

A group of numbers is stored as equal steps between its minimum and its maximum; nothing is rotated, and no
statistics of the context are taken. The codes are kept in the same `PackedLayer` as TurboQuant's, so their
bytes are really held and their answers really computed from them.
"""

from dataclasses import dataclass

import torch

from quantpress.codecs.parts import portable
from quantpress.codecs.protocol import PageCodec, Planes
from quantpress.errors import InvalidInputError
from quantpress.kernels.layout import PAGE_TOKENS, pack_pages, unpack_pages
from quantpress.quantization.transform import ChannelTransform

BITS = (2, 4, 8)
AXES = ("token", "channel")


@portable("uniform_codec")
@dataclass(frozen=True)
class UniformPages(PageCodec):
    """x is stored as round((x - low) / step), with low and step in float16 for each group of numbers.

    Args:
        head_dim: dimension D of the vectors.
        bits: code width, 2, 4 or 8.
        axis: "token": a group is neighbouring channels of one token. "channel": neighbouring tokens of one
            channel, as KIVI quantizes keys.
        group: numbers in a group; None is all D channels, or all 128 tokens of a page.

    Raises:
        InvalidInputError: the width or axis is unknown, or the groups do not divide the axis.

    Source: KIVI (arXiv 2402.02750) for groups along tokens; asymmetric min-max quantization in general.

    Example:
        >>> UniformPages(64, 4).bits_per_value
        4.5
        >>> UniformPages(64, 2, "channel", 32).bits_per_value
        3.0
    """

    head_dim: int
    bits: int
    axis: str = "token"
    group: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in BITS or self.axis not in AXES:
            raise InvalidInputError(
                f"uniform codes of {self.bits!r} bits along {self.axis!r}; give bits of {BITS}, axes of "
                f"{AXES}"
            )
        if self._length % self._group:
            raise InvalidInputError(
                f"groups of {self.group} do not divide {self._length} numbers along the {self.axis} axis"
            )

    @property
    def _length(self) -> int:
        return self.head_dim if self.axis == "token" else PAGE_TOKENS

    @property
    def _group(self) -> int:
        return self._length if self.group is None else self.group

    @property
    def bits_per_value(self) -> float:
        return self.bits + 32 / self._group

    def encode(self, x: torch.Tensor, transform: ChannelTransform) -> Planes:
        """Pack x as `PageCodec.encode` describes.

        Raises:
            InvalidInputError: a minimum or a step is not finite in float16.
        """
        grouped = self._grouped(x)
        low = grouped.amin(-1, keepdim=True).half()
        step = ((grouped.amax(-1, keepdim=True) - low.float()) / (2**self.bits - 1)).half()
        if not bool((low.isfinite() & step.isfinite()).all()):
            raise InvalidInputError(
                f"numbers up to {float(grouped.abs().max()):.4g} do not fit into uniform codes, which keep "
                "minimum and step in float16, at most 65504; leave this control out"
            )
        codes = (grouped - low.float()) / step.float().clamp(min=torch.finfo(torch.float16).tiny)
        codes = self._ungrouped(codes.round_().clamp_(0, 2**self.bits - 1))
        return {
            "codes": pack_pages(codes.to(torch.uint8), self.bits, "key"),
            "low": low.squeeze(-1),
            "step": step.squeeze(-1),
        }

    def decode_code_space(self, planes: Planes) -> torch.Tensor:
        codes = unpack_pages(planes["codes"], self.bits, self.head_dim, "key").float()
        low, step = (planes[name].float().unsqueeze(-1) for name in ("low", "step"))
        values: torch.Tensor = self._grouped(codes.flatten(2, 3)) * step + low
        return self._ungrouped(values).flatten(2, 3)

    def _grouped(self, x: torch.Tensor) -> torch.Tensor:
        """[B, Hkv, T, D] -> [B, Hkv, P, 128, D / g, g], or [B, Hkv, P, D, 128 / g, g], float32."""
        batch, heads, tokens, dim = x.shape
        pages = x.float().view(batch, heads, tokens // PAGE_TOKENS, PAGE_TOKENS, dim)
        pages = pages if self.axis == "token" else pages.transpose(-1, -2)
        return pages.reshape(*pages.shape[:-1], self._length // self._group, self._group)

    def _ungrouped(self, grouped: torch.Tensor) -> torch.Tensor:
        """Back to [B, Hkv, P, 128, D]."""
        pages = grouped.flatten(-2)
        return pages if self.axis == "token" else pages.transpose(-1, -2).contiguous()
