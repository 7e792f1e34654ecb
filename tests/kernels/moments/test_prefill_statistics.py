"""Statistics of a prefill: the kernels in the interpreter, compiled, and on a GPU, against float64."""

import math
from typing import Any

import pytest
import torch

from quantpress.errors import InvalidInputError, NonFiniteError
from quantpress.kernels import moments
from quantpress.kernels.moments import key_statistics, not_finite, query_moment, triton_moments
from quantpress.quantization.budget import split_channels
from tests.kernels.interpreter import interpret
from tests.kernels.triton_cases import compile_only, resources

FLOOR = 0.05
CASES = [  # batch, heads, tokens, head_dim, dtype
    (1, 2, 700, 64, torch.bfloat16),
    (2, 1, 130, 80, torch.float16),
    (1, 1, 1, 128, torch.float32),
]


def keys_of(
    batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype, device: str = "cpu"
) -> torch.Tensor:
    """Part of a larger tensor, with means far larger than what is around them."""
    x = torch.randn(batch, heads, tokens + 9, dim) + torch.randn(dim) * 50
    return x.to(device, dtype)[:, :, 4 : tokens + 4]


def exact(keys: torch.Tensor, moment: torch.Tensor | None, mean: bool) -> dict[str, torch.Tensor]:
    """Mean and weight in float64, before it is rounded, and the energy of keys less their mean."""
    x = keys.double()
    centre = x.mean(2) if mean else torch.zeros_like(x[:, :, 0])
    energy = (x - centre[:, :, None]).square().mean(2)
    found = {"mean": centre, "energy": energy}
    if moment is not None:
        parts = [one / one.mean(-1, keepdim=True) for one in (moment.double(), energy)]
        q, k = (part.nan_to_num(1.0).clamp_min(FLOOR) for part in parts)
        power = (q / k).log() / 4
        weight = (power - power.mean(-1, keepdim=True)).exp()
        known = moment.double().amax(-1, keepdim=True) > 0
        found["weight"] = weight.where(known, 1.0)
    return found


def check_keys(keys: torch.Tensor, moment: torch.Tensor | None, mean: bool) -> None:
    """As exact as float32 is, where the mean is 50 times what is around it."""
    dim = keys.shape[-1]
    expected = exact(keys, moment, mean)
    for groups in (split_channels(3, dim), split_channels(2.5, dim)):
        found = key_statistics(keys, moment, groups, mean=mean)
        assert (found.mean is not None) == mean and (found.weight is not None) == (moment is not None)
        if found.mean is not None:
            torch.testing.assert_close(found.mean.double(), expected["mean"], rtol=3e-7, atol=3e-7)
        if found.weight is not None:
            assert torch.equal(found.weight, found.weight.to(torch.bfloat16).float())
            torch.testing.assert_close(found.weight.double(), expected["weight"], rtol=2**-8 + 2e-6, atol=0)
        assert (found.order is not None) == (len(groups) > 1)
        if found.order is not None:
            weight = 1.0 if found.weight is None else found.weight.double()
            ordered = (expected["energy"] * weight * weight).gather(-1, found.order.long())
            assert (ordered.diff(dim=-1) <= 1e-6 * ordered[..., 1:].abs()).all()


def check_queries(device: str) -> None:
    heads, group, dim = 2, 3, 48
    tall = torch.randn(2, 40, heads * group, dim, device=device).bfloat16().transpose(1, 2)  # as after RoPE
    kept = torch.arange(dim, device=device) > 4
    actual = keys_of(2, heads, 30, dim, torch.bfloat16, device)[:, :, -8:] * kept
    near = (actual.float() * 1.01 + (actual == 0) * 7).bfloat16()  # zeros do not count
    expected = tall.double().square().view(2, heads, group, 40, dim).mean((2, 3))
    for computed, right in ((near, True), (actual * 1.1, False), (actual * math.nan, False), (None, True)):
        against = None if computed is None else actual
        found, agree = query_moment(tall, heads, computed, against, 0.02)
        assert (agree is None) == (computed is None) and (agree is None or bool(agree) == right)
        torch.testing.assert_close(found.double(), expected * right, rtol=1e-6, atol=0)
    assert not query_moment(tall, heads, actual, actual * 0, 0.02)[1], "keys of zeros say nothing"


def check_not_finite(device: str) -> None:
    keys, values = torch.randn(1, 2, 9000, 8, device=device), torch.randn(1, 2, 90, 8, device=device)
    assert not any(not_finite(keys, values).tolist())
    for states, place in ((keys, 0), (values, 1)):
        for bad in (math.nan, math.inf, -math.inf):
            states[0, 1, -1, -1] = bad
            assert [bool(flag) for flag in not_finite(keys, values).tolist()] == [place == 0, place == 1]
        states[0, 1, -1, -1] = 3e38


def check_all(device: str) -> None:
    for case in CASES:
        keys = keys_of(*case, device=device)
        moment = torch.rand(*keys.shape[:2], keys.shape[3], device=device)
        moment[0, 0] = 0  # unknown queries
        for given, mean in ((moment, True), (moment, False), (None, True)):
            check_keys(keys, given, mean)
    check_queries(device)
    check_not_finite(device)
    check_refusals(device)


def check_refusals(device: str) -> None:
    keys, groups = torch.randn(1, 2, 40, 32, device=device), split_channels(4, 32)
    moment = torch.rand(1, 2, 32, device=device)
    for bad in (math.nan, math.inf):
        with pytest.raises(NonFiniteError, match="keys hold NaN or infinity"):
            key_statistics(torch.cat((keys, keys[:, :, :1] * bad), 2), moment, groups)
        with pytest.raises(NonFiniteError, match="query_moment hold NaN or infinity"):
            key_statistics(keys, moment.clone().fill_(bad), groups)
    moment[0, 1, 3] = -0.5
    with pytest.raises(InvalidInputError, match=r"query_moment holds -0\.5"):
        key_statistics(keys, moment, groups)


def test_plain() -> None:
    check_all("cpu")


def test_interpreted() -> None:
    interpret(__file__)


class Recorded:
    """In a kernel's place: the arguments of its launch, by name."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.arguments = kernel, dict[str, Any]()

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **named: Any) -> None:
            self.arguments = dict(zip(self.kernel.arg_names, arguments, strict=False)) | named

        return launch


@pytest.mark.parametrize("capability", [80, 90])
def test_compiled(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("token_moments_kernel", "key_transform_kernel", "query_moment_kernel", "not_finite_kernel")
    kernels = [Recorded(getattr(triton_moments, name)) for name in names]
    for name, kernel in zip(names, kernels, strict=True):
        monkeypatch.setattr(triton_moments, name, kernel)
    keys = torch.zeros(1, 8, 8000, 128, dtype=torch.bfloat16)
    triton_moments.launch_statistics(keys, torch.ones(1, 8, 128), True, FLOOR, True)
    triton_moments.launch_query_moment(keys[:, :, :256], 2, keys[:, :2, :8], keys[:, :2, :8], 0.02)
    triton_moments.launch_not_finite(keys, keys)
    for recorded in kernels:
        warps = recorded.arguments.get("num_warps", 4)
        used = resources(compile_only(recorded.kernel, recorded.arguments, capability, warps))
        assert used["STACK"] <= 32 and used["LOCAL"] == 0  # Triton 3.9 needs a few bytes


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    check_all("cuda")
    for dim in (128, 256):
        keys = keys_of(4, 8, 20_000, dim, torch.bfloat16, "cuda")
        check_keys(keys, torch.rand(4, 8, dim, device="cuda"), True)


if __name__ == "__main__":
    moments.runs_triton = lambda device: True
    check_all("cpu")
