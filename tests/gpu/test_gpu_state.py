"""Tests on a GPU share a process: torch's own warnings fail none, and none leaves its settings behind."""

import importlib
import warnings

import pytest
import torch
import torch.utils.mkldnn

from tests.gpu.gpu_state import no_synchronization

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
