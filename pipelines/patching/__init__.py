"""Attention on keys and values that are packed and restored just before, live."""
