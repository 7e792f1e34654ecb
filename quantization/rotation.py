"""Random orthogonal rotations that spread a vector's energy evenly over its channels.

After a random rotation every coordinate of a vector follows (nearly) the density of one coordinate of a
uniform unit vector, so one codebook, known in advance, fits every model, layer and head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from quantpress.errors import InvalidInputError
from quantpress.kept import kept
from quantpress.quantization.numerics import exact_product

ROTATION_KINDS = ("hadamard", "haar", "identity")
MAX_SEED = 2**62


@dataclass(frozen=True)
class Rotation:
    """An orthogonal [D, D] matrix R, fixed by its kind and seed.

    Args:
        dim: D, at least 1.
        kind: "hadamard", a structured matrix with random column signs: for D = odd * 2**k the Kronecker
            product of an orthonormal discrete Hartley transform (odd part) and a Walsh-Hadamard matrix
            (2**k), so that no head_dim needs padding; "haar", uniform over all orthogonal matrices;
            "identity", no rotation.
        seed: 0 <= seed < 2**62. The same seed gives the same matrix on every device: the matrix is built in
            float64 on the CPU and then cast.

    Raises:
        InvalidInputError: `dim`, `kind` or `seed` has none of these values.

    Source: TurboQuant, arXiv 2504.19874, Algorithm 1; random signs after QuIP#, arXiv 2402.04396.

    >>> Rotation(4, "identity").forward(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist()
    [1.0, 2.0, 3.0, 4.0]
    """

    dim: int
    kind: str = "hadamard"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ROTATION_KINDS:
            raise InvalidInputError(f"unknown rotation {self.kind!r}; use one of {', '.join(ROTATION_KINDS)}")
        if not isinstance(self.dim, int) or self.dim < 1:
            raise InvalidInputError(f"a rotation needs a whole dim of at least 1, got {self.dim!r}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < MAX_SEED:
            raise InvalidInputError(
                f"a rotation's seed must be a whole number in 0 to 2**62 - 1, got {self.seed!r}"
            )

    def matrix(self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
        """The [D, D] matrix R. Cached and shared: do not write to it.

        Args:
            device: device of the matrix; the CPU when None.
            dtype: its floating dtype.
        """
        return _cast_matrix(self, torch.device("cpu" if device is None else device), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate: y = x @ R.T.

        Args:
            x: [..., D] floating. 16-bit input is rotated in float32, whatever `torch.autocast` and
                `torch.set_float32_matmul_precision` say.

        Returns:
            [..., D] on x's device, float64 for float64 input and float32 otherwise.

        Raises:
            InvalidInputError: x's last dimension is not D, or x is not floating.
        """
        x = self._checked(x)
        return x if self.kind == "identity" else exact_product(x, self.matrix(x.device, x.dtype).T)

    def inverse(self, y: Tensor) -> Tensor:
        """Undo `forward`: x = y @ R. Arguments, result and errors as for `forward`."""
        y = self._checked(y)
        return y if self.kind == "identity" else exact_product(y, self.matrix(y.device, y.dtype))

    def _checked(self, x: Tensor) -> Tensor:
        if x.ndim == 0 or x.shape[-1] != self.dim:
            raise InvalidInputError(
                f"a rotation of dim {self.dim} cannot take a tensor of shape {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise InvalidInputError(f"a rotation needs floating values, got {x.dtype}; convert them first")
        return x if x.dtype == torch.float64 else x.float()


@kept
def _cast_matrix(rotation: Rotation, device: torch.device, dtype: torch.dtype) -> Tensor:
    # Cached: a tensor made under inference_mode could not be used under autograd later.
    return _exact_matrix(rotation).to(device=device, dtype=dtype)


@lru_cache(maxsize=256)
def _exact_matrix(rotation: Rotation) -> Tensor:
    dim = rotation.dim
    if rotation.kind == "identity":
        return torch.eye(dim, dtype=torch.float64, device="cpu")
    generator = torch.Generator(device="cpu").manual_seed(rotation.seed)
    if rotation.kind == "haar":
        gaussian = torch.randn(dim, dim, generator=generator, dtype=torch.float64, device="cpu")
        basis, triangle = torch.linalg.qr(gaussian)
        signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0).double()  # makes it uniform: Mezzadri 2007
    else:
        power = dim & -dim
        basis = torch.kron(_hartley(dim // power), _walsh_hadamard(power))
        signs = torch.randint(0, 2, (dim,), generator=generator, device="cpu").double() * 2 - 1
    rotated: Tensor = basis * signs
    return rotated.contiguous()  # QR returns columns; kernels read rows


def _hartley(n: int) -> Tensor:
    """Orthonormal discrete Hartley transform, [n, n] float64, cas(2 pi j k / n) / sqrt(n)."""
    index = torch.arange(n, device="cpu")
    angle = (index[:, None] * index % n).double() * (2 * math.pi / n)
    return (angle.cos() + angle.sin()) / math.sqrt(n)


def _walsh_hadamard(n: int) -> Tensor:
    """Orthonormal Walsh-Hadamard matrix in Sylvester's order, [n, n] float64, n a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu")
    while matrix.shape[0] < n:
        matrix = torch.kron(step, matrix)
    return matrix / math.sqrt(n)
