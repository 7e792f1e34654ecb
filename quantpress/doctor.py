"""What this machine offers: versions, devices, and which path the attention over a packed cache takes."""

import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import quantpress.kernels

PACKAGES = ("torch", "transformers", "kvpress", "triton")


@dataclass(frozen=True)
class Device:
    """A CUDA device: its name, compute capability such as "9.0", and memory in bytes."""

    name: str
    capability: str
    memory: int


@dataclass(frozen=True)
class Diagnosis:
    """What was found, ready to print.

    Attributes:
        system: operating system and machine, as one line.
        versions: version of Python, quantpress and each package it stands on; None when not installed.
        cuda: the CUDA version torch was built for; None in a CPU build.
        devices: the CUDA devices that torch can use.
        backends: for each operation of `quantpress.kernels`, the implementations it has.
        attention: which path the attention over packed layers takes, one line for each kind of device here.
    """

    system: str
    versions: dict[str, str | None]
    cuda: str | None
    devices: tuple[Device, ...]
    backends: dict[str, tuple[str, ...]]
    attention: tuple[str, ...]


def diagnose() -> Diagnosis:
    """Look at this machine; nothing is changed, and a missing package is reported, not raised."""
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
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cuda() -> tuple[str | None, tuple[Device, ...]]:
    import torch

    if not torch.cuda.is_available():
        return torch.version.cuda, ()
    found = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return torch.version.cuda, tuple(Device(p.name, f"{p.major}.{p.minor}", p.total_memory) for p in found)


def _backends() -> dict[str, tuple[str, ...]]:
    """Read off the files, so that a kernel shows up here without being registered anywhere."""
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
