"""How long packing takes on this machine, beside a copy of the same vectors in the same run."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from quantpress.errors import InvalidInputError

QUERIES = 32


class VectorCodec(Protocol):
    """What is timed; `quantpress.codecs.turboquant.TurboQuantCodec` says what each method does."""

    def encode(self, x: Tensor) -> Any: ...
    def decode(self, packed: Any, dtype: torch.dtype) -> Tensor: ...
    def inner_product(self, q: Tensor, packed: Any) -> Tensor: ...


@dataclass(frozen=True)
class CodecBenchmark:
    """Times in seconds, each of the fastest of several runs.

    Args:
        device: name of the device.
        torch: version of torch.
        threads: threads that torch uses on the CPU.
        vectors: how many vectors were packed.
        head_dim: dimension D of the vectors.
        dense_bytes: bytes of the vectors in bfloat16.
        packed_bytes: bytes of their codes and scales.
        copy_s: to copy the vectors in bfloat16.
        encode_s: to pack them.
        decode_s: to bring them back to bfloat16.
        inner_product_s: for inner products of 32 queries with all of them, from the codes.
        matmul_s: for the same inner products with the vectors in bfloat16.
    """

    device: str
    torch: str
    threads: int
    vectors: int
    head_dim: int
    dense_bytes: int
    packed_bytes: int
    copy_s: float
    encode_s: float
    decode_s: float
    inner_product_s: float
    matmul_s: float

    @property
    def encode_ratio(self) -> float:
        """`copy_s` over `encode_s`: the part of the copy's bandwidth that encoding reaches."""
        return self.copy_s / self.encode_s

    @property
    def decode_ratio(self) -> float:
        """`copy_s` over `decode_s`."""
        return self.copy_s / self.decode_s

    def as_dict(self) -> dict[str, Any]:
        """The fields and both ratios as JSON values."""
        return {**asdict(self), "encode_ratio": self.encode_ratio, "decode_ratio": self.decode_ratio}


def benchmark(
    codec: VectorCodec, head_dim: int, vectors: int, device: torch.device, repeats: int
) -> CodecBenchmark:
    """Time a codec; see `TurboQuantCodec.benchmark`."""
    for name, count in (("vectors", vectors), ("repeats", repeats)):
        if count < 1:
            raise InvalidInputError(f"{name} must be at least 1, got {count}")
    x = torch.randn(vectors, head_dim, dtype=torch.float32, device=device).bfloat16()
    q = torch.randn(QUERIES, head_dim, dtype=torch.float32, device=device)
    other, packed, narrow = torch.empty_like(x), codec.encode(x), q.bfloat16()

    def seconds(work: Callable[[], Any]) -> float:
        return min(_timed(work, device) for _ in range(repeats + 1))  # the first one prepares

    return CodecBenchmark(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        vectors=vectors,
        head_dim=head_dim,
        dense_bytes=x.nbytes,
        packed_bytes=packed.nbytes,
        copy_s=seconds(lambda: other.copy_(x)),
        encode_s=seconds(lambda: codec.encode(x)),
        decode_s=seconds(lambda: codec.decode(packed, torch.bfloat16)),
        inner_product_s=seconds(lambda: codec.inner_product(q, packed)),
        matmul_s=seconds(lambda: narrow @ x.T),
    )


def _timed(work: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
