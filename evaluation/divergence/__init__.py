"""Divergence of continuations over a compressed cache from the uncompressed model; errors of attention."""
