"""Whether a device can run the Triton kernels, and what each launch asks of Triton."""

import importlib.util
import warnings
from functools import lru_cache

import torch

LEAST_CAPABILITY = (8, 0)  # bfloat16 tensor cores

CHAINS = (9, 0)
"""First compute capability on which a kernel can start before the one before it has ended."""

HOPPER = 9
"""Compute capability with tensor cores that take operands from shared memory, which no other has."""

TESTED = {"torch": ("2.11", "2.13"), "triton": ("3.6", "3.9")}
"""The oldest and the newest release of each that the tests run on."""

FUSED = {"enable_fp_fusion": True}
"""Options of a launch: products and sums become one instruction. Triton 3.9 warns where a launch does not say
whether they do, and announces the opposite default for 3.10."""
ROUNDED = {"enable_fp_fusion": False}
"""Options of a launch that rounds products and sums one by one, as PyTorch does."""


@lru_cache(maxsize=16)
def runs_triton(device: torch.device) -> bool:
    """Whether Triton is installed and the device is an NVIDIA GPU of compute capability 8.0 or higher.

    Warns once where only Triton is missing.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return False
    found = importlib.util.find_spec("triton") is not None
    if not found:
        warnings.warn(
            "triton is not installed: packing and attention on CUDA run in plain PyTorch, slowly",
            stacklevel=3,
        )
    return found


@lru_cache(maxsize=16)
def has_tensor_memory(device: torch.device) -> bool:
    """Whether tensor cores add up in a memory of their own, of 512 columns a multiprocessor (10.0, 11.0)."""
    return device.type == "cuda" and 10 <= torch.cuda.get_device_capability(device)[0] < 12


@lru_cache(maxsize=16)
def is_hopper(device: torch.device) -> bool:
    """Whether a device is an NVIDIA GPU of compute capability 9."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == HOPPER


@lru_cache(maxsize=16)
def chains(device: torch.device) -> bool:
    """Whether a kernel can start on this device before the one before it has ended (programmatic launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= CHAINS
