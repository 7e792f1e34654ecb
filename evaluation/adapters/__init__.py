"""Evaluation harnesses of others: kvpress's and lm-eval's."""
