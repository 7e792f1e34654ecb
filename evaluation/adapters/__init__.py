"""Benchmarks of other projects over our presses: kvpress's evaluation and lm-evaluation-harness."""
