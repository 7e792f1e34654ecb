"""`TextCache`: the length of the text, not of what is kept of it."""

import copy

import torch

from quantpress.cache import host
from quantpress.cache.text_cache import TextCache


def test_text_cache_counts_the_text() -> None:
    cache = TextCache()
    states = torch.arange(6.0)[None, None, :, None]
    cache.update(states, states, 0)
    cache.layers[0].keys = cache.layers[0].values = states[:, :, 2:]
    cache.has_read(6)
    cache.update(states[:, :, :3], states[:, :, :3], 0)
    assert cache.get_seq_length() == 9 and cache.get_mask_sizes(host.mask_query(2), 0) == (9, 2)
    cache.crop(7)
    assert cache.get_seq_length() == 7 and cache.layers[0].keys.flatten().tolist() == [2, 3, 4, 5, 0]
    cache.crop(-1)
    cache.crop(100)
    assert cache.get_seq_length() == 6
    other = copy.deepcopy(cache)
    cache.reset()
    assert cache.evicted == {} and other.get_seq_length() == 6
