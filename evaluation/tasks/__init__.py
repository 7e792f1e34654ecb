"""Texts with planted facts, and questions about them."""
