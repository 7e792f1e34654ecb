"""TurboQuant outside a cache: pack vectors, bring them back, or take inner products with their codes."""

from dataclasses import dataclass, fields
from math import prod
from typing import Any

import torch
from torch import Tensor

from quantpress.codecs.benchmark import CodecBenchmark, benchmark
from quantpress.codecs.estimate import estimate
from quantpress.codecs.reports import CodecReport, MemoryReport, codec_report, memory_report
from quantpress.errors import InvalidInputError, did_you_mean
from quantpress.kernels.dequantize import decode_pages
from quantpress.kernels.encode import encode_pages
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform, value_statistics


@dataclass(frozen=True, eq=False)
class PackedVectors:
    """Vectors in packed pages, as `TurboQuantCodec.encode` returns them.

    Args:
        spec: the codec that packed them.
        planes: the packed tensors, [B, Hkv, P, ...]; B = Hkv = 1 without a transform.
        transform: the channel transform they were packed with.
        shape: [..., D] of the vectors.
    """

    spec: CodecSpec
    planes: dict[str, Tensor]
    transform: ChannelTransform
    shape: torch.Size

    @property
    def vectors(self) -> int:
        """Number of vectors."""
        return prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        """Bytes held: codes and scales, the padding of the last page included, and the transform."""
        return sum(plane.nbytes for plane in self.planes.values()) + self.transform.nbytes

    def trim(self, pages: Tensor) -> Tensor:
        """Take the padding off decoded pages [B, Hkv, T, D] and give them the shape of the vectors."""
        lead = prod(pages.shape[:2])
        return pages[:, :, : self.vectors // lead].reshape(self.shape)


class TurboQuantCodec:
    """Random rotation, a codebook known in advance and one scale per vector: nothing is trained.

    Args:
        head_dim: dimension D of the vectors.
        bits: code width per coordinate: 1, 2, 3, 4, 8 or a fraction between 1 and 4.
        role: "key" (norms kept exactly) or "value" (inner products unbiased); also decides the page layout.
        **options: the other fields of `quantpress.quantization.spec.CodecSpec`.

    Raises:
        UnsupportedBitsError: `bits` cannot be stored.
        UnsupportedHeadDimError: `head_dim` cannot be packed.
        InvalidInputError: another option has a value that cannot be used.

    Source: TurboQuant, arXiv 2504.19874.

    >>> codec = TurboQuantCodec(128, bits=3)
    >>> packed = codec.encode(torch.randn(1000, 128))
    >>> codec.decode(packed).shape
    torch.Size([1000, 128])
    >>> codec.compression_ratio
    5.12
    """

    def __init__(self, head_dim: int, bits: float = 4, role: str = "key", **options: Any) -> None:
        known = [field.name for field in fields(CodecSpec) if field.name != "page_keys"]
        unknown = next((name for name in options if name not in known), None)
        if unknown is not None:
            hint = did_you_mean(unknown, known) or f"its arguments are {', '.join(known)}"
            raise InvalidInputError(f"TurboQuantCodec has no argument {unknown!r}; {hint}")
        self.spec = CodecSpec(head_dim, bits, role, **options)

    def __repr__(self) -> str:
        return f"TurboQuantCodec({self.spec})"

    @property
    def compression_ratio(self) -> float:
        """16 over the true bits per coordinate, scales included."""
        return 16 / self.spec.bits_per_value

    def encode(self, x: Tensor, transform: ChannelTransform | None = None) -> PackedVectors:
        """Pack vectors.

        Args:
            x: [..., D] floating, or [B, Hkv, ..., D] where the transform has parts for each [B, Hkv]. The
                last page is padded with zeros.
            transform: a channel transform. One with B = Hkv = 1 is shared by all vectors. Without one, a
                codec of a fractional width gives its wider codes to the channels with the most energy in x;
                `quantpress.quantization.running_moments` is for vectors that arrive little by little.

        Raises:
            InvalidInputError: x has the wrong shape or dtype.
            NonFiniteError: x holds NaN or infinity.
        """
        shared = transform is None or all(part.shape[:2] == (1, 1) for part in transform.tensors().values())
        if x.dim() < (1 if shared else 3) or x.shape[-1] != self.spec.head_dim:
            wanted = f"[..., {self.spec.head_dim}]" if shared else f"[B, Hkv, ..., {self.spec.head_dim}]"
            raise InvalidInputError(f"the vectors must be {wanted}, got {tuple(x.shape)}")
        lead = (1, 1) if shared else tuple(x.shape[:2])
        vectors = x.reshape(*lead, prod(x.shape[:-1]) // max(1, prod(lead)), x.shape[-1])
        if transform is None:
            transform = value_statistics(vectors, self.spec.groups) if x.numel() else ChannelTransform()
        padding = -vectors.shape[2] % PAGE_TOKENS
        if padding:
            vectors = torch.cat((vectors, vectors.new_zeros(*lead, padding, x.shape[-1])), dim=2)
        return PackedVectors(self.spec, encode_pages(vectors, self.spec, transform), transform, x.shape)

    def decode(self, packed: PackedVectors, dtype: torch.dtype = torch.float32) -> Tensor:
        """Bring vectors back: [..., D] `dtype`, in the shape they were packed from.

        Raises:
            InvalidInputError: another codec packed the vectors.
        """
        self._check(packed)
        return packed.trim(decode_pages(packed.planes, self.spec, packed.transform, dtype))

    def inner_product(self, q: Tensor, packed: PackedVectors) -> Tensor:
        """q @ x.T from the codes, without decoding a vector.

        The query is mapped into code space, where it is multiplied by the levels of the codes and, for the
        "prod" estimator, by the signs of the sketch, which make the result unbiased.

        Args:
            q: [..., Q, D] floating; [B, Hkv, Q, D] if the transform of the vectors has parts for each
                [B, Hkv].
            packed: vectors [..., N, D]; one vector [D] counts as N = 1. Leading dimensions broadcast.

        Returns:
            [..., Q, N] float32.

        Raises:
            InvalidInputError: another codec packed the vectors, or q does not fit them.
        """
        self._check(packed)
        return estimate(q, packed.planes, self.spec, packed.transform, packed.shape)

    def validate(self, samples: int = 4096, seed: int = 0) -> CodecReport:
        """Measure the codec on random vectors and compare the result with theory.

        Args:
            samples: how many vectors, at least 2.
            seed: seed of the vectors.

        Raises:
            InvalidInputError: `samples` is below 2.
        """
        if samples < 2:
            raise InvalidInputError(f"samples must be at least 2, got {samples}")
        generator = torch.Generator().manual_seed(seed)
        x = torch.empty(samples, self.spec.head_dim, dtype=torch.float32, device="cpu")
        x.normal_(generator=generator)
        x *= torch.exp2(
            4 * x.new_empty(samples, 1).uniform_(generator=generator)
        )  # lengths over four binades
        decoded = self.decode(self.encode(x, ChannelTransform()))  # no channel stands out
        energy = x.square().sum(-1)
        bias = ((x * decoded).sum(-1) / energy).mean() - 1
        return codec_report(self.spec, (x - decoded).square().sum(-1) / energy, float(bias))

    def memory_report(
        self,
        context: int,
        layers: int,
        kv_heads: int,
        sink_tokens: int = 4,
        recent_tokens: int = 128,
        batch: int = 1,
        dtype: torch.dtype = torch.bfloat16,
    ) -> MemoryReport:
        """Count the bytes of a cache whose keys and values both have this codec's format.

        Args:
            context: tokens cached per sequence.
            layers: layers that are packed.
            kv_heads: KV heads per layer.
            sink_tokens: first tokens kept in `dtype`.
            recent_tokens: last tokens kept in `dtype`, at least.
            batch: number of sequences.
            dtype: dtype of the keys and values that the model computes.

        Raises:
            InvalidInputError: a count is out of range.
        """
        counts = (context, layers, kv_heads, sink_tokens, recent_tokens, batch)
        return memory_report(self.spec, *counts, dtype)

    def benchmark(
        self, vectors: int = 65536, device: torch.device | str = "cpu", repeats: int = 5
    ) -> CodecBenchmark:
        """Time encode, decode and inner products, beside a copy of as many vectors in the same run.

        Args:
            vectors: how many bfloat16 vectors.
            device: device to run on.
            repeats: how many times each is timed; the fastest counts.

        Raises:
            InvalidInputError: a count is below 1.
        """
        return benchmark(self, self.spec.head_dim, vectors, torch.device(device), repeats)

    def _check(self, packed: PackedVectors) -> None:
        if packed.spec != self.spec:
            raise InvalidInputError(
                f"these vectors were packed by another codec: {packed.spec}, not {self.spec}"
            )
