"""Caches as files: the file format, checks of what was read, and the model that a cache belongs to."""
