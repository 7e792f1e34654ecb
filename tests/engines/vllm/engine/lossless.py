"""A dtype whose pages hold keys and values in float32.

Run as a script, this is vLLM's own command with that dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantpress.codecs.raw import RawPages
from quantpress.quantization.transform import ChannelTransform

DTYPE = "quantpress_test_raw"


def register_lossless() -> None:
    """Make the dtype known in this process."""
    from quantpress.engines.vllm.dtypes import register_dtype

    register_dtype(DTYPE, lambda head_dim, value_dim, _: (RawPages(head_dim, 32), RawPages(value_dim, 32)))


class DoublePages(RawPages):
    """The same numbers in pages twice as large."""

    def encode(self, x: Tensor, transform: ChannelTransform) -> dict[str, Tensor]:
        return {"raw": super().encode(x, transform)["raw"].double()}


def codecs_by_width(
    name: str, head_dim: int, value_dim: int, dtype: torch.dtype, widths: tuple[int, int] | None = None
) -> list[RawPages]:
    """Codecs of keys and of values: float64 where a plan has 4 bits, else float32."""
    kinds = [DoublePages if bits == 4 else RawPages for bits in widths or (2, 2)]
    return [kind(dim, 32) for kind, dim in zip(kinds, (head_dim, value_dim), strict=True)]


if __name__ in ("__main__", "__mp_main__"):  # the server, and the engine that it spawns
    register_lossless()

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
