"""Where the engine of these tests runs: on the GPU where there is one, else on the CPU."""

from __future__ import annotations

from typing import Any

import torch

ON_GPU = torch.cuda.is_available()

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, where tests can look into it
    "VLLM_NO_USAGE_STATS": "1",
}
OPTIONS: dict[str, Any] = {"enforce_eager": True}
if ON_GPU:
    ENVIRONMENT |= {"VLLM_USE_DEEP_GEMM": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    OPTIONS = {
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
        "async_scheduling": True,
        "gpu_memory_utilization": 0.3,  # must be free at the start, and is not taken
    }
else:
    ENVIRONMENT |= {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # leave this process on the cores that it was given
    }
