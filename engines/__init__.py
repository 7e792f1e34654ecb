"""Hosts other than transformers: one folder for each serving engine."""
