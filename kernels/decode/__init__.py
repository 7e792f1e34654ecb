"""Decoding of pages: the public entries, and the seam where a device kernel goes in.

Code space is where decoding ends and attention works: channels permuted by the transform, rotated per group.
"""

from quantpress.kernels.decode.reference import (
    decode_code_space,
    decode_pages,
    from_code_space,
    to_code_space,
)

__all__ = ["decode_code_space", "decode_pages", "from_code_space", "to_code_space"]
