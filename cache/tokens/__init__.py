"""The tokens of one layer: packed pages, 16-bit sinks and recent tokens, and how many each head keeps."""
