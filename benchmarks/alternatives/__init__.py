"""How each alternative attends with one new token to a context, through what it publishes for that."""

from .calls import Attention, tensors
from .registry import ALTERNATIVES, Alternative

__all__ = ["ALTERNATIVES", "Alternative", "Attention", "tensors"]
