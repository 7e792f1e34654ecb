"""`quantpress doctor`: versions, devices, kernels, and what runs in plain PyTorch instead, and why."""

import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.version import Version
from rich.table import Table

import quantpress
from quantpress.cli.engines.vllm_here import vllm_lines
from quantpress.cli.output import Outcome
from quantpress.errors import extra

PACKAGES = ("torch", "transformers", "kvpress", "triton", "ray")


@dataclass(frozen=True)
class Device:
    """A CUDA device: its name, compute capability such as "9.0", and memory in bytes."""

    name: str
    capability: str
    memory: int


@dataclass(frozen=True)
class Diagnosis(Outcome):
    """What was found, ready to print.

    Attributes:
        system: operating system and machine, as one line.
        versions: versions of Python, quantpress and the packages it needs; None where one is not installed.
        cuda: the CUDA version torch was built for; None in a CPU build.
        devices: the CUDA devices that torch can use.
        backends: for each operation of `quantpress.kernels`, the implementations it has.
        attention: how attention reads packed layers, one line for each kind of device here.
        fallbacks: what runs in plain PyTorch although there is a kernel for it, and why.
        default_model: the folder of the default model, and whether it has been fetched.
        default_dtype: the dtype that the default model is loaded in, and why.
        host: what this version of transformers is to quantpress.
        untested: packages whose versions are outside of the tested range, and what that range is.
        vllm: its version, whether it finds our plugin, and its torch; empty where it is not installed.
    """

    system: str
    versions: dict[str, str | None]
    cuda: str | None
    devices: tuple[Device, ...]
    backends: dict[str, tuple[str, ...]]
    attention: tuple[str, ...]
    fallbacks: tuple[str, ...] = ()
    default_model: str = ""
    default_dtype: str = ""
    host: str = ""
    untested: dict[str, str] = field(default_factory=dict)
    vllm: tuple[str, ...] = ()

    def __rich__(self) -> Table:
        table = Table(title="quantpress on this machine", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for package, installed in self.versions.items():
            table.add_row(package, installed or _missing(package))
            if package == "transformers" and self.host:
                table.add_row("", self.host)
            if package in self.untested:
                table.add_row("", self.untested[package])
        for line in self.vllm:
            table.add_row("vllm", line)
        table.add_row("system", self.system)
        table.add_row("cuda", self.cuda or "torch is a CPU build")
        for device in self.devices:
            table.add_row("device", f"{device.name}, sm {device.capability}, {device.memory / 2**30:.0f} GiB")
        for operation, backends in self.backends.items():
            table.add_row(operation, ", ".join(backends))
        for line in self.attention:
            table.add_row("attention", line)
        for line in self.fallbacks:
            table.add_row("falls back", line)
        table.add_row("default model", self.default_model)
        table.add_row("its dtype", self.default_dtype)
        return table


def doctor() -> Diagnosis:
    """Print versions, devices and kernels, what falls back to plain PyTorch here, and why."""
    versions: dict[str, str | None] = {name: _version(name) for name in PACKAGES}
    versions = {"python": platform.python_version(), "quantpress": quantpress.__version__, **versions}
    cuda, devices = _cuda() if versions["torch"] else (None, ())
    backends = _backends()
    fused = "triton" in backends.get("attend", ()) and versions["triton"] is not None
    return Diagnosis(
        system=f"{platform.platform()}, {sys.implementation.name}",
        versions=versions,
        cuda=cuda,
        devices=devices,
        backends=backends,
        attention=_attention(bool(devices), fused),
        fallbacks=_fallbacks(versions, cuda, devices) if versions["torch"] else (),
        default_model=_default_model(),
        default_dtype=_default_dtype() if versions["torch"] else "",
        host=_host() if versions["torch"] and versions.get("transformers") else "",
        untested=_untested(versions) if versions["torch"] else {},
        vllm=vllm_lines(versions["torch"]),
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _missing(package: str) -> str:
    if package == "kvpress":
        return f"not installed: no eviction presses (pip install {extra('kvpress')})"
    if package == "ray":
        return f"not installed: `batch` answers in one process (pip install {extra('ray')})"
    return "not installed"


def _host() -> str:
    from quantpress.cache.host import described

    return described()


def _untested(versions: Mapping[str, str | None]) -> dict[str, str]:
    from quantpress.kernels.available import TESTED

    found = {}
    for name, (oldest, newest) in TESTED.items():
        release = Version(versions.get(name) or oldest).release[:2]
        if not Version(oldest).release <= release <= Version(newest).release:
            found[name] = f"tested on {oldest} to {newest}"
    return found


def _cuda() -> tuple[str | None, tuple[Device, ...]]:
    import torch

    if not torch.cuda.is_available():
        return torch.version.cuda, ()
    found = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return torch.version.cuda, tuple(Device(p.name, f"{p.major}.{p.minor}", p.total_memory) for p in found)


def _backends() -> dict[str, tuple[str, ...]]:
    """Implementations by operation, read from the files, so that a kernel needs no registration."""
    found = {}
    for root in map(Path, quantpress.kernels.__path__):
        for folder in sorted(init.parent for init in root.glob("*/__init__.py")):
            sources = [file.read_text(encoding="utf-8") for file in folder.glob("*.py")]
            plain = ("reference",) if (folder / "reference.py").exists() else ()
            fused = ("triton",) if any("\nimport triton\n" in source for source in sources) else ()
            found[folder.name] = plain + fused
    return found


def _attention(cuda: bool, fused: bool) -> tuple[str, ...]:
    plain = "page by page in PyTorch, bounded workspace"
    lines = [f"CPU: {plain}"]
    if cuda:
        lines.append(f"CUDA: {'fused Triton kernels' if fused else plain}")
    return tuple(lines)


def _fallbacks(
    versions: dict[str, str | None], cuda: str | None, devices: tuple[Device, ...]
) -> tuple[str, ...]:
    """What runs in plain PyTorch although there is a kernel; the limits come from the kernels."""
    if not devices:
        reason = "torch is a CPU build" if cuda is None else "torch finds no NVIDIA GPU"
        return (f"everything: {reason}, and the kernels need one",)
    if versions.get("triton") is None:
        return ("everything: triton is not installed (pip install triton)",)
    from quantpress.kernels.attend.triton_attend import MOST_HEAD_DIM
    from quantpress.kernels.available import LEAST_CAPABILITY
    from quantpress.kernels.encode.triton_encode import (  # imports triton
        MAX_CHANNELS,
        MAX_IN_TENSOR_MEMORY,
    )

    old = [one.name for one in devices if tuple(map(int, one.capability.split("."))) < LEAST_CAPABILITY]
    recent = [one.name for one in devices if 10 <= float(one.capability) < 12]  # sums in tensor memory
    least = ".".join(map(str, LEAST_CAPABILITY))
    return (
        *(f"everything on {name}: its compute capability is below {least}" for name in old),
        f"attention at a head_dim above {MOST_HEAD_DIM}: no kernel covers it",
        "attention under a mask that hides more than padding on the left: the same",
        f"encoding groups of more than {MAX_CHANNELS} channels: the same",
        *(
            f"encoding groups of more than {MAX_IN_TENSOR_MEMORY} channels on {name}: the same"
            for name in recent
        ),
    )


def _default_model() -> str:
    from quantpress.pipelines.default_model.store import DEFAULT_MODEL_NAME, cache_folder, is_complete

    folder = cache_folder() / DEFAULT_MODEL_NAME
    return f"{folder}" if is_complete(folder) else f"{folder}: fetched when it is first used (93 MB)"


def _default_dtype() -> str:
    from quantpress.errors import InvalidInputError
    from quantpress.pipelines.default_model.quick_dtype import VARIABLE, forced_name, quick_dtype

    try:
        name = str(quick_dtype()).removeprefix("torch.")
    except InvalidInputError as error:
        return str(error)
    return (
        f"{name}, from {VARIABLE}" if forced_name() else f"{name}, the quicker here; {VARIABLE} sets another"
    )
