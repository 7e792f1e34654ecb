"""Limits of time, which end what hangs: no machine that works is slow enough to meet them."""

HANG = 1800  # seconds; pytest's own limit for a test is twice that
