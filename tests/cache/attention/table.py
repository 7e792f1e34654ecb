"""The attention functions that all models share, for tests of who changes them."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantpress.cache.attention.dispatch import PACKED_ATTENTION
from quantpress.cache.attention.functions import TORCH_ATTENTION


def functions() -> dict[str, Any]:
    """Every attention function by name: those in transformers' table, and torch's own."""
    return {**ALL_ATTENTION_FUNCTIONS, TORCH_ATTENTION: F.scaled_dot_product_attention}


@contextmanager
def functions_left_alone() -> Iterator[dict[str, Any]]:
    """After the block, there are the same names and the same objects as before; these are what it gives."""
    gc.collect()
    before = functions()
    assert not PACKED_ATTENTION.users, "an earlier test keeps a packed layer"
    yield before
    gc.collect()
    assert functions() == before
