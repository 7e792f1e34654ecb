"""Inner products from codes, against the same products with decoded vectors."""

import pytest
import torch

import quantpress.kernels.score.reference as reference
from quantpress.errors import InvalidInputError
from quantpress.kernels.dequantize import decode_pages, to_code_space
from quantpress.kernels.encode import encode_pages
from quantpress.kernels.score import inner_products
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform
from tests.grids import covering

ALL = [(bits, "mse") for bits in (1, 2, 3, 4, 8, 2.5, 3.25)] + [(bits, "prod") for bits in (2, 3, 4)]


@pytest.mark.parametrize(("dim", "width", "role"), covering([64, 80, 128], ALL, ["key", "value"]), ids=str)
def test_every_width_scores_as_its_decoded_vectors(
    dim: int, width: tuple[float, str], role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits, estimator = width
    monkeypatch.setattr(reference, "WORKSPACE_VALUES", 2 * 128 * 64)  # several chunks, the last one shorter
    spec = CodecSpec(dim, bits, role, estimator=estimator, seed=3)
    planes = encode_pages(torch.randn(2, 3, 5 * 128, dim), spec, ChannelTransform())
    q = torch.randn(2, 3, 7, dim)
    decoded = decode_pages(planes, spec, ChannelTransform(), torch.float32)
    expected = q.double() @ decoded.double().mT
    found = inner_products(to_code_space(q, spec), planes, spec)
    assert found.shape == (2, 3, 7, 640) and found.dtype == torch.float32
    assert float((found - expected).norm() / expected.norm()) < 2e-6


def test_views_of_pages_and_no_pages() -> None:
    spec = CodecSpec(64, 3, "key")
    planes = encode_pages(torch.randn(1, 2, 512, 64), spec, ChannelTransform())
    q = to_code_space(torch.randn(1, 2, 4, 64), spec)
    whole = inner_products(q, planes, spec)
    middle = {name: plane[:, :, 1:3] for name, plane in planes.items()}
    assert torch.allclose(inner_products(q, middle, spec), whole[..., 128:384], atol=1e-4)
    none = {name: plane[:, :, :0] for name, plane in planes.items()}
    assert inner_products(q, none, spec).shape == (1, 2, 4, 0)


def test_refusals() -> None:
    spec = CodecSpec(64, 3, "key")
    planes = encode_pages(torch.randn(1, 2, 128, 64), spec, ChannelTransform())
    for query in (torch.randn(2, 2, 4, 64), torch.randn(1, 2, 4, 32), torch.randn(2, 4, 64)):
        with pytest.raises(InvalidInputError, match="queries must be"):
            inner_products(query, planes, spec)
    with pytest.raises(InvalidInputError, match="float64"):
        inner_products(torch.randn(1, 2, 4, 64).double(), planes, spec)
    with pytest.raises(InvalidInputError, match="plane"):
        inner_products(torch.randn(1, 2, 4, 64), planes, CodecSpec(64, 4, "key"))
