"""Writes codebooks.json, the codebooks of common dimensions: `python -m quantpress.quantization.tables`.

Codes must be read back with the levels that they were made with. The table keeps the levels of packed caches
the same to the last bit whatever the version of scipy; for dimensions that are not in it codebooks are
computed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from quantpress.quantization.budget import WHOLE_BITS, split_channels
from quantpress.quantization.codebook import CODEBOOK_FORMS, compute_codebook

HEAD_DIMS = (32, 40, 48, 64, 80, 96, 112, 128, 160, 192, 256)
"""Head dimensions of published models."""

SPLITS = (1 + 1 / 4, 1 + 1 / 3, 1 + 1 / 2, 1 + 2 / 3, 1 + 3 / 4)
"""Fractional widths whose group sizes are in the table; 2 and 3 bits split alike."""


def group_dims() -> list[int]:
    """Every head dimension of the table and every group size that its splits produce, ascending."""
    parts = (group.channels for dim in HEAD_DIMS for bits in SPLITS for group in split_channels(bits, dim))
    return sorted({*HEAD_DIMS, *parts})


def build_table() -> dict[str, dict[str, Any]]:
    """Rows by "form/bits/dimension": the positive half of `scaled`, `unit` and `distortion`.

    There are 8-bit rows for whole heads only, since no split has an 8-bit group.
    """
    rows: dict[str, dict[str, Any]] = {}
    for form in CODEBOOK_FORMS:
        for bits in WHOLE_BITS:
            for dim in HEAD_DIMS if bits == 8 else group_dims():
                book = compute_codebook(bits, dim, form)
                half = book.scaled[len(book.scaled) // 2 :]
                rows[f"{form}/{bits}/{dim}"] = {
                    "scaled": list(half),
                    "unit": book.unit,
                    "distortion": book.distortion,
                }
    return rows


def main() -> None:
    """Write codebooks.json beside this file, one row a line."""
    path = Path(__file__).with_name("codebooks.json")
    rows = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in build_table().items()]
    path.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    sys.stdout.write(f"{len(rows)} codebooks written to {path.name}\n")


if __name__ == "__main__":
    main()
