"""Contexts that are read once and asked many times, in memory and on disk."""
