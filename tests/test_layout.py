"""The arrows between the folders, the links, and what importing quantpress brings along."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.limits import HANG

ROOT = Path(__file__).parents[1]
ARROWS = (
    "examples",
    "pipelines",
    "presses",
    "cache",
    "kernels",
    "codecs",
)  # each imports only itself and later ones
PACKAGED = ARROWS[1:]
WITHOUT_KVPRESS = ("cache", "kernels", "codecs")  # environments with a newer transformers can use these
FREE_FOR_ALL = {"errors", "__version__"}


def imports_of(source: str) -> Iterator[str]:
    """The full name of everything a source text imports, by statement or by `import_module("...")`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (
                a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
            )


def violations(folder: str, source: str) -> list[str]:
    """The imports in a file of `folder` that its place in the arrows forbids."""
    allowed = {*ARROWS[ARROWS.index(folder) :], *FREE_FOR_ALL}
    found = []
    for name in imports_of(source):
        first, _, rest = name.partition(".")
        if first == "":
            found.append(f"{name} is relative: write the full name")
        elif first in PACKAGED and first != folder and (ROOT / first / f"{rest.split('.')[0]}.py").exists():
            found.append(f"{name} is imported as quantpress.{name}")
        elif first == "kvpress" and folder in WITHOUT_KVPRESS:
            found.append(f"{name}: {folder} does without kvpress")
        # Examples are users: they import whatever is public.
        elif first == "quantpress" and folder != "examples" and rest.split(".")[0] not in allowed:
            found.append(f"{name} is not for {folder}")
    return found


@pytest.mark.parametrize("folder", ARROWS)
def test_imports_follow_the_arrows(folder: str) -> None:
    sources = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / folder).rglob("*.py"))}
    found = [
        f"{path.relative_to(ROOT)}: {v}" for path, text in sources.items() for v in violations(folder, text)
    ]
    assert sources
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("codecs", "from quantpress.kernels.layout import pack_pages"),
        ("codecs", "from quantpress import kernels"),
        ("kernels", "import quantpress.cache"),
        ("cache", "from quantpress.presses import TurboQuant"),
        ("cache", "def f():\n    from kvpress import BasePress"),
        ("kernels", "import kvpress.utils"),
        ("presses", "from importlib import import_module\nimport_module('quantpress.pipelines')"),
        ("pipelines", "from quantpress import Compose"),
        ("pipelines", "import quantpress"),
        ("presses", "from .compose import Compose"),
    ],
)
def test_a_forbidden_import_is_noticed(folder: str, line: str) -> None:
    assert violations(folder, line)


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("codecs", "from quantpress.errors import NonFiniteError"),
        ("kernels", "from quantpress.quantization.spec import CodecSpec"),
        ("presses", "from kvpress import SnapKVPress"),
        ("pipelines", "from quantpress.evaluation.demo import main"),
        ("examples", "from quantpress import Compose"),
    ],
)
def test_an_allowed_import_is_let_through(folder: str, line: str) -> None:
    assert not violations(folder, line)


@pytest.mark.parametrize("folder", PACKAGED)
def test_link_is_relative_and_resolves(folder: str) -> None:
    link = ROOT / "quantpress" / folder
    assert link.is_symlink()
    assert Path(os.readlink(link)) == Path("..", folder)
    assert link.resolve() == ROOT / folder


def test_every_link_in_the_package_is_known() -> None:
    links = {path.name for path in (ROOT / "quantpress").iterdir() if path.is_symlink()}
    assert links == set(PACKAGED)


def test_kernels_has_no_init_file() -> None:
    """With one, Python started in the repository would take it for Hugging Face's `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    without = [folder for folder in PACKAGED if not (ROOT / folder / "__init__.py").exists()]
    assert without == ["kernels"]


def test_hugging_face_kernels_wins_over_the_folder(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("owner = 'Hugging Face'\n")
    # Without PYTHONSAFEPATH, `-c` puts the working directory first on sys.path.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": ""}
    found = run_python("import kernels; print(kernels.owner)", environment, ROOT)
    assert found == "Hugging Face"


def test_importing_quantpress_is_light() -> None:
    heavy = "{'torch', 'transformers', 'kvpress', 'triton', 'scipy', 'pandas'}"
    assert run_python(f"import sys, quantpress; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_codecs_kernels_and_cache_do_without_kvpress() -> None:
    folders = ", ".join(f"quantpress.{folder}" for folder in WITHOUT_KVPRESS)
    assert run_python(f"import sys, {folders}; print('kvpress' in sys.modules)") == "False"


def run_python(code: str, environment: dict[str, str] | None = None, directory: Path | None = None) -> str:
    """The last line that a fresh interpreter prints for `code`."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]
