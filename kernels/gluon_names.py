"""What Gluon kernels call by names that differ between versions of Triton."""

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

# Triton 3.8 calls it `async_load`; the older name, the only one before that, raises from 3.9 on.
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

_descriptor = gl.shared_memory_descriptor
# Shared memory as other numbers, or in another shape or layout; the name had an underscore before Triton 3.9.
reinterpret = getattr(_descriptor, "reinterpret", None) or _descriptor._reinterpret

# All threads of a program wait for each other; Triton 3.6 has the longer name.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
