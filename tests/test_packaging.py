"""What users install: from a clean clone, the wheel and the sdist, each in an empty environment."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.limits import HANG

ROOT = Path(__file__).parents[1]
FOLDERS = ("cache", "codecs", "engines", "evaluation", "kernels", "pipelines", "presses", "quantization")
SHIPPED = (".py", ".json", ".xz", ".md", "py.typed")

USE = """
import importlib.util, sys
from pathlib import Path
import torch
import quantpress
from quantpress import Compose, SnapKV, TurboQuant, TurboQuantCodec

home = Path(quantpress.__file__).parent
assert home.is_relative_to(sys.prefix), home
assert (home / "py.typed").is_file()
assert not [path for path in home.rglob("*") if path.is_symlink()]
assert quantpress.__version__ != "0+unknown"
spec = importlib.util.find_spec("kernels")
assert spec is None or "quantpress" not in str(spec), spec

x = torch.randn(100, 64)
codec = TurboQuantCodec(64, bits=4, role="value")
packed = codec.encode(x)
error = (codec.decode(packed) - x).square().sum() / x.square().sum()
assert 0.001 < error < 0.02, error
Compose([SnapKV, TurboQuant])
print("used")
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ROOT / ".git").exists() or not shutil.which("git"), reason="needs a git checkout"
    ),
]


def run(*command: str | Path, directory: Path) -> str:
    """Standard output of a command that has to succeed, run as a user would, with no settings of this run."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST", "COV"))}
    done = subprocess.run(
        [*map(str, command)], cwd=directory, env=clean, capture_output=True, text=True, timeout=HANG
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean clone of what is committed."""
    path = tmp_path_factory.mktemp("packaging") / "clone"
    run("git", "clone", "--quiet", "--no-hardlinks", ROOT, path, directory=path.parent)
    return path


@pytest.fixture(scope="module")
def artifacts(clone: Path) -> dict[str, Path]:
    """The sdist, built from the clone with the setuptools installed here, and the wheel, built from that."""
    built = clone.parent / "dist"
    command = ("-m", "build", "--no-isolation", "--outdir", built, clone)
    run(sys.executable, *command, directory=clone.parent)
    return {"wheel": next(built.glob("*.whl")), "sdist": next(built.glob("*.tar.gz"))}


def shipped(clone: Path) -> set[str]:
    """Where every committed file that a user needs lies once it is installed."""
    tracked = run("git", "ls-files", "quantpress", *FOLDERS, directory=clone).split()
    wanted = (name for name in tracked if name.endswith(SHIPPED))
    return {name if name.startswith("quantpress/") else f"quantpress/{name}" for name in wanted}


def test_wheel_holds_every_file_and_one_import_name(clone: Path, artifacts: dict[str, Path]) -> None:
    with zipfile.ZipFile(artifacts["wheel"]) as wheel:
        names = wheel.namelist()
    package = {name for name in names if name.startswith("quantpress/")}
    assert package == shipped(clone)
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"quantpress", next(top for top in tops if top.endswith(".dist-info"))}


def test_sdist_holds_files_for_links(clone: Path, artifacts: dict[str, Path]) -> None:
    with tarfile.open(artifacts["sdist"]) as sdist:
        members = sdist.getmembers()
    assert not [member.name for member in members if member.issym() or member.islnk()]
    names = {member.name.partition("/")[2] for member in members if member.isfile()}
    assert shipped(clone) | {"LICENSE", "README.md", "pyproject.toml"} <= names


def test_installs_and_works_in_an_empty_environment(artifacts: dict[str, Path], tmp_path: Path) -> None:
    home = tmp_path / "env"
    venv.create(home, with_pip=False, symlinks=os.name != "nt")
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    site = Path(
        run(python, "-c", "import site; print(site.getsitepackages()[0])", directory=tmp_path).strip()
    )
    # The heavy dependencies are borrowed from here; a path in a .pth file brings no editable install with it.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed", "--quiet")
    pip = (sys.executable, "-m", "pip", "--python", python, "install")
    run(*pip, *offline, artifacts["wheel"], directory=tmp_path)

    installed = {path.name for path in site.iterdir() if path.name not in ("borrowed.pth", "__pycache__")}
    assert {name.partition("-")[0] for name in installed} == {"quantpress"}
    assert run(python, "-c", USE, directory=tmp_path).split()[-1] == "used"
    assert run(scripts / "quantpress", "version", directory=tmp_path).strip()[0].isdigit()
