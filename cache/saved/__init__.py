"""Caches as files: their format, what is checked, which model they belong to."""
