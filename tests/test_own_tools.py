"""What tests share holds its promises: thinned grids keep every pair; a GPU's settings are as they were."""

import importlib
import warnings
from itertools import combinations, product

import pytest
import torch
import torch.utils.mkldnn

from tests.gpu.gpu_state import no_synchronization
from tests.grids import covering

PROTOTYPE = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing"
TENSOR_CORES = (
    "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled. Consider"
)


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The modes set so far; as in torch, one is in force before the warning is raised."""
    found = [0]

    def set_mode(mode: int | str) -> None:
        found.append({"default": 0, "warn": 1, "error": 2}.get(mode, mode))  # type: ignore[arg-type]
        warnings.warn(PROTOTYPE, UserWarning, stacklevel=2)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: found[-1])
    return found


def test_the_sync_debug_mode_is_always_put_back(modes: list[int]) -> None:
    with no_synchronization():
        assert modes[-1] == 2
    with pytest.raises(RuntimeError, match="waited"), no_synchronization():
        raise RuntimeError("waited")
    modes.append(1)
    with no_synchronization():
        pass
    assert modes == [0, 2, 0, 2, 0, 1, 2, 1]


def test_a_warning_of_the_code_inside_is_still_an_error(modes: list[int]) -> None:
    with pytest.raises(UserWarning, match="ours"), no_synchronization():
        warnings.warn("ours", UserWarning, stacklevel=1)
    assert modes[-1] == 0


def test_warnings_inside_the_compiler_are_no_errors() -> None:
    """Inductor imports `torch.utils.mkldnn`, whose methods torch itself calls deprecated."""
    importlib.reload(torch.utils.mkldnn)
    warnings.warn_explicit(TENSOR_CORES, UserWarning, "compile_fx.py", 1, module="torch._inductor.compile_fx")


@pytest.mark.parametrize("module", ["quantpress.pipelines.capture.captured", "torch.jit._script"])
def test_other_deprecations_stay_errors(module: str) -> None:
    with pytest.raises(DeprecationWarning):
        warnings.warn_explicit(
            "`torch.jit.trace` is deprecated.", DeprecationWarning, "a.py", 1, module=module
        )
    with pytest.raises(UserWarning):
        warnings.warn_explicit(
            TENSOR_CORES, UserWarning, "a.py", 1, module="quantpress.pipelines.capture.captured"
        )


PARAMETERS = ([1, 2, 3, 4, 8], ["key", "value"], [True, False], [64, 80, 128])


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_every_combination_of_so_many_parameters_appears(strength: int) -> None:
    rows = covering(*PARAMETERS, strength=strength)
    for places in combinations(range(len(PARAMETERS)), strength):
        found = {tuple(row[place] for place in places) for row in rows}
        assert found == set(product(*(PARAMETERS[place] for place in places)))
    assert len(rows) < 60 and len(rows) == len(set(rows))


def test_rows_are_few_and_the_same_every_time() -> None:
    assert len(covering(*PARAMETERS, strength=1)) == 5
    assert len(covering(*PARAMETERS)) <= 18
    assert covering(*PARAMETERS) == covering(*PARAMETERS)
