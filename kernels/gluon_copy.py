"""Copies from global to shared memory in Gluon kernels, whichever Triton there is."""

from triton.experimental.gluon.language.nvidia.ampere import async_copy

# Triton 3.8 calls it `async_load`; the older name, the only one before that, raises from 3.9 on.
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
