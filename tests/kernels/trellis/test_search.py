"""The search kernel: its own source in PyTorch, compiled without a GPU, and on a GPU."""

import pytest
import torch

from quantpress.codecs import TrellisPages
from quantpress.kernels.available import ROUNDED
from quantpress.kernels.trellis import nearest_path
from quantpress.kernels.trellis.reference import nearest_path_reference
from quantpress.quantization.transform import ChannelTransform
from quantpress.quantization.trellis import trellis
from tests.kernels.attend.emulate_gluon import emulate
from tests.kernels.triton_cases import compile_only, resources

pytest.importorskip("triton")

WIDTHS = (1, 2, 3, 4)


def unit_vectors(count: int, dim: int) -> torch.Tensor:
    """One of them, of zeros, has many nearest paths."""
    unit = torch.nn.functional.normalize(torch.randn(count, dim), dim=-1)
    unit[3] = 0
    return unit


@pytest.mark.parametrize(("bits", "dim"), [(1, 40), (2, 72), (3, 56), (4, 8)])
def test_emulated(bits: int, dim: int) -> None:
    """Two programs, one of which has two tiles, the last of them not whole; at 2 and 3 bits
    there are more channels than the first search sees."""
    from quantpress.kernels.trellis import triton_kernel
    from quantpress.kernels.trellis.triton_search import search_arguments

    unit = unit_vectors(11, dim)
    codes, arguments = search_arguments(unit, trellis(bits), programs=2)
    codes.fill_(0xA5)
    arguments["kept_ptr"].fill_(0x5A5A5A5A)
    emulate(triton_kernel, "search_kernel", arguments, (2, 1))
    assert torch.equal(codes, nearest_path_reference(unit, trellis(bits)))


@pytest.mark.parametrize(
    ("bits", "dim", "capability"), [(1, 128, 100), (2, 64, 90), (3, 128, 80), (4, 256, 90)]
)
def test_compiles(bits: int, dim: int, capability: int) -> None:
    """As many programs as are launched fit into a multiprocessor, and hardly anything is spilled."""
    from quantpress.kernels.trellis.triton_kernel import search_kernel
    from quantpress.kernels.trellis.triton_search import SETTINGS, WARPS, search_arguments

    _, arguments = search_arguments(torch.empty(16, dim), trellis(bits), programs=1)
    compiled = compile_only(search_kernel, arguments, capability, WARPS, SETTINGS.registers, ROUNDED)
    taken = resources(compiled)
    assert taken["REG"] <= 65536 // (32 * SETTINGS.programs) and taken["STACK"] <= 256
    assert compiled.metadata.shared <= 100 * 1024 // SETTINGS.programs - 1024


@pytest.mark.parametrize(("unit", "taken"), [((4, 80), True), ((4, 36), False), ((0, 64), False)], ids=str)
def test_what_it_takes(unit: tuple[int, int], taken: bool) -> None:
    from quantpress.kernels.trellis.triton_search import supports_search

    assert supports_search(torch.empty(unit)) == taken
    assert not supports_search(torch.empty(unit, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_are_those_of_plain_pytorch_on_a_gpu(bits: int, dim: int) -> None:
    for count in (7, 20001):
        unit = unit_vectors(count, dim).cuda()
        assert torch.equal(nearest_path(unit, trellis(bits)), nearest_path_reference(unit, trellis(bits)))


@pytest.mark.gpu
@pytest.mark.parametrize("role", ["key", "value"])
def test_pages_on_a_gpu(role: str) -> None:
    """Rotations round differently there, so that a few vectors get other codes, as good as the CPU's."""
    codec, x = TrellisPages(128, 2, role), torch.randn(1, 2, 1024, 128)
    transform = ChannelTransform(x.mean(2))
    mine = codec.encode(x.cuda(), transform.map(lambda part: part.cuda()))
    theirs = codec.encode(x, transform)
    assert (mine["codes0"].cpu() == theirs["codes0"]).float().mean() > 0.99
    errors = [
        (codec.decode(planes, transform, torch.float32) - x).square().mean()
        for planes in ({name: plane.cpu() for name, plane in mine.items()}, theirs)
    ]
    torch.testing.assert_close(*errors, rtol=1e-3, atol=0)
