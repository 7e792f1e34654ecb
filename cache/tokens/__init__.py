"""The tokens of one layer: packed pages, windows of 16-bit tokens, and which of them each head keeps."""
