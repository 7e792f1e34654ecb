"""The arrows between folders and their sub-folders, the links, and what importing quantpress brings along."""

import ast
import functools
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from quantpress.codecs.scalar import ScalarPages
from quantpress.presses import Compose, SnapKV, TurboQuant
from tests.limits import HANG
from tests.tiny_models import prompt, tiny_model

ROOT = Path(__file__).parents[1]
ARROWS = (
    "examples",
    "evaluation",
    "pipelines",
    "presses",
    "cache",
    "codecs",
    "kernels",
    "quantization",
)  # each imports only itself and later ones
HOSTS = {"engines": "cache"}  # imports itself, and from that folder on; no other folder imports it
PACKAGED = (*ARROWS[1:], *HOSTS)
ROOMS = {
    "evaluation": ("adapters", "fitting", "results", "sizing", "divergence", "tasks"),
    "pipelines": ("enabling", "contexts", "capture", "reading", "joined", "patching", "default_model"),
    "engines": ("vllm",),
    "presses": ("packing", "models"),
    "cache": ("saved", "paged", "fixed", "attention", "tokens"),
    "kernels": (
        "steps",
        "attend",
        "combine",
        "joined",
        "score",
        "moments",
        "blocks",
        "dequantize",
        "encode",
        "trellis",
    ),
    "quantization": ("trellis",),
}  # the sub-folders of a folder; each imports only itself and later ones
MODULE = re.compile(r"\w+(?:\.py|/)")
MOST_FILES = 15  # in one folder, so that a reader sees what is there
WITHOUT_KVPRESS = (
    "engines",
    "cache",
    "codecs",
    "kernels",
    "quantization",
)  # usable beside a newer transformers
FREE_FOR_ALL = {"deferred", "errors", "kept", "rule", "version"}


@functools.cache
def imports_of(source: str, types: bool = True) -> tuple[str, ...]:
    """The full name of everything a source text imports, by statement or by `import_module("...")`."""
    return tuple(_imports(ast.parse(source), types))


def _imports(node: ast.AST, types: bool) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not types:
        return
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, types)


def violations(folder: str, source: str) -> list[str]:
    """The imports in a file of `folder`, such as "cache" or "cache/tokens", that its arrows forbid."""
    top, _, room = folder.partition("/")
    allowed = {top, *ARROWS[ARROWS.index(HOSTS.get(top, top)) :], *FREE_FOR_ALL}
    rooms = ROOMS.get(top, ())
    forbidden_rooms = rooms[: rooms.index(room)] if room else ()
    found = []
    for name in imports_of(source):
        first, _, rest = name.partition(".")
        second, _, inner = rest.partition(".")
        if first == "":
            found.append(f"{name} is relative: write the full name")
        elif first in PACKAGED and first != top and (ROOT / first / second).with_suffix(".py").exists():
            found.append(f"{name} is imported as quantpress.{name}")
        elif first == "kvpress" and top in WITHOUT_KVPRESS:
            found.append(f"{name}: {folder} does without kvpress")
        elif first != "quantpress" or top == "examples":  # examples are users: they import what is public
            continue
        elif second not in allowed or (second == top and inner.split(".")[0] in forbidden_rooms):
            found.append(f"{name} is not for {folder}")
    return found


def folders() -> list[str]:
    """Every folder of code that arrows hold, and every sub-folder of these."""
    return [*ARROWS, *HOSTS, *(f"{top}/{room}" for top, rooms in ROOMS.items() for room in rooms)]


def test_every_sub_folder_has_its_arrow() -> None:
    for folder in PACKAGED:
        there = {path.parent.name for path in (ROOT / folder).glob("*/*.py")}
        assert there == set(ROOMS.get(folder, ())), folder


@pytest.mark.parametrize("folder", folders())
def test_imports_follow_the_arrows(folder: str) -> None:
    depth = "*.py" if "/" in folder else "**/*.py"
    sources = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / folder).glob(depth))}
    found = [
        f"{path.relative_to(ROOT)}: {v}" for path, text in sources.items() for v in violations(folder, text)
    ]
    assert sources
    assert not found, "\n".join(found)


def modules() -> dict[str, Path]:
    """Every module of the package by its full name."""
    found = {}
    for top in (*PACKAGED, "quantpress"):
        for path in (ROOT / top).glob("**/*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if top == "quantpress" else ("quantpress", *parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: path for name, path in found.items() if not path.parent.is_symlink()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Names that lead back to where they began; empty where there are none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def import_graph(by_room: bool = False) -> dict[str, set[str]]:
    """What each module imports, at any depth but for types alone.

    By room, the modules of a sub-folder are one; a module that lies directly in a folder stays itself.
    """
    paths = modules()
    name_of = {name: name for name in paths}
    if by_room:
        name_of = {name: ".".join(name.split(".")[:3]) if name.count(".") >= 2 else name for name in paths}
    graph: dict[str, set[str]] = {name: set() for name in name_of.values()}
    for name, path in paths.items():
        for full in imports_of(path.read_text(encoding="utf-8"), types=False):
            target = full if full in paths else full.rpartition(".")[0]
            if target in paths and name_of[target] != name_of[name]:
                graph[name_of[name]].add(name_of[target])
    return graph


def at_once(path: Path) -> set[str]:
    """The full names that a module imports when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    statements = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {name for node in statements for name in _imports(node, types=False)}


def test_kernels_are_imported_where_they_are_launched() -> None:
    """There is no Triton on Windows, on macOS and beside vLLM's build for CPUs."""
    paths, needing = modules(), set[str]()
    imported = {name: at_once(path) for name, path in paths.items()}
    while True:
        more = {
            name
            for name, found in imported.items()
            if any(full.partition(".")[0] == "triton" for full in found)
            or any({full, full.rpartition(".")[0]} & needing for full in found)
        }
        if more == needing:
            break
        needing = more
    kernels = {name for name in needing if name.startswith("quantpress.kernels.")}
    assert "quantpress.kernels.attend.split_mma" in kernels
    asked = {name for name in kernels if paths[name].name == "__init__.py"} | (needing - kernels)
    assert not asked, "imports Triton when it is imported"


@pytest.mark.parametrize("by_room", [False, True], ids=["modules", "sub-folders"])
def test_imports_have_no_circle(by_room: bool) -> None:
    found = circle(import_graph(by_room))
    assert not found, " -> ".join(found)


def test_a_circle_is_noticed() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert not circle({"a": {"b", "c"}, "b": {"c"}})
    assert "quantpress.cache.tokens" in import_graph(by_room=True)["quantpress.cache.layer"]


def test_folders_are_seen_at_a_glance() -> None:
    crowded = {
        str(folder.relative_to(ROOT)): count
        for top in (*ARROWS, *HOSTS, "quantpress", "tests")
        for folder in {path.parent for path in (ROOT / top).glob("**/*.py")}
        if (count := len([path for path in folder.iterdir() if path.suffix == ".py"])) > MOST_FILES
    }
    assert not crowded


def test_files_that_texts_name_are_there() -> None:
    """In pages, docstrings and comments; the changelog may name what is gone."""
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *modules().values()]
    named = {
        (path.relative_to(ROOT), match)
        for path in texts
        if path.name != "CHANGELOG.md"
        for match in re.findall(
            rf"(?<![\w/])((?:{'|'.join((*ARROWS, *HOSTS))})/[\w/]+\.py)", path.read_text(encoding="utf-8")
        )
    }
    assert len(named) > 20
    missing = {f"{path}: {match}" for path, match in named if not (ROOT / match).exists()}
    assert missing <= {"CONTRIBUTING.md: kernels/__init__.py"}


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("quantization", "from quantpress.kernels.layout import pack_pages"),
        ("quantization", "from quantpress import kernels"),
        ("kernels", "import quantpress.cache"),
        ("kernels", "from quantpress.codecs.protocol import Codec"),
        ("cache", "from quantpress.presses import TurboQuant"),
        ("cache", "def f():\n    from kvpress import BasePress"),
        ("kernels", "import kvpress.utils"),
        ("presses", "from importlib import import_module\nimport_module('quantpress.pipelines')"),
        ("pipelines", "from quantpress import Compose"),
        ("pipelines", "import quantpress"),
        ("pipelines", "from quantpress.evaluation.demo import main"),
        ("presses", "from .compose import Compose"),
        ("engines", "from quantpress.presses import TurboQuant"),
        ("cache", "from quantpress.engines import vllm"),
        ("evaluation", "from quantpress.engines.vllm.checks import refuse"),
        ("cache/tokens", "from quantpress.cache.attention.states import PackedStates"),
        ("cache/attention", "from quantpress.cache.fixed import cache"),
    ],
)
def test_a_forbidden_import_is_noticed(folder: str, line: str) -> None:
    assert violations(folder, line)


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("quantization", "from quantpress.errors import NonFiniteError"),
        ("kernels", "from quantpress.quantization.spec import CodecSpec"),
        ("presses", "from kvpress import SnapKVPress"),
        ("engines/vllm", "from quantpress.cache.paged import PagedCache"),
        ("evaluation", "from quantpress.pipelines.report import Report"),
        ("cache/attention", "from quantpress.cache.tokens.view import PackedView"),
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


def test_no_name_in_kernels_is_one_of_pythons() -> None:
    """Without an init file pytest puts kernels/ on the search path, where such a name hides the other one."""
    assert not {path.stem for path in (ROOT / "kernels").iterdir()} & sys.stdlib_module_names


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


def test_presses_load_without_kvpress_and_models_and_end_in_silence() -> None:
    """With layers that are still there, reachable or not, and without `uninstall_packed_attention`."""
    folders = ", ".join(f"quantpress.{folder}" for folder in WITHOUT_KVPRESS)
    code = f"""
import sys, {folders}, quantpress.presses, quantpress.evaluation.sizing.model_outline
print([name for name in ('kvpress', 'transformers.modeling_utils') if name in sys.modules])
from quantpress.cache import LayerSettings, PackedLayer, install_packed_attention
from quantpress.codecs.raw import RawPages
settings = LayerSettings(RawPages(64, 16), RawPages(64, 16))
kept, lost = PackedLayer(settings), PackedLayer(settings)
lost.itself = lost
del lost
install_packed_attention()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "[]\n", "")


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


@pytest.mark.parametrize("path", [path for path in modules().values() if path.name == "__init__.py"], ids=str)
def test_a_list_of_modules_is_complete(path: Path) -> None:
    """Where the docstring of a package lists its modules, it lists all of them."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    listed = {
        name for line in text.splitlines() if re.match(r"\w+(\.py|/)", line) for name in MODULE.findall(line)
    }
    there = {one.name for one in path.parent.glob("*.py")} - {"__init__.py"}
    there |= {f"{one.parent.name}/" for one in path.parent.glob("*/*.py") if not one.parent.is_symlink()}
    assert not listed or listed == there


@pytest.mark.parametrize(
    ("writing", "owner"),
    [
        (r"\b__class__ = ", "cache/fixed/plain.py"),
        (
            r"(ALL_ATTENTION_FUNCTIONS|_table\(\))(\[.*\] = |\.(update|pop|register)\()|del ALL_ATTENTION",
            "cache/attention/functions.py",
        ),
        (r"scaled_dot_product_attention = ", "cache/attention/functions.py"),
    ],
    ids=["classes", "attention functions", "torch's attention function"],
)
def test_one_module_alone_changes_them(writing: str, owner: str) -> None:
    sources = {path: path.read_text(encoding="utf-8") for path in modules().values()}
    found = {str(path.relative_to(ROOT)) for path, text in sources.items() if re.search(writing, text)}
    assert found == {owner}


def test_the_straight_path_is_six_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """From `Compose([SnapKV, TurboQuant])` to a packed page, as CONTRIBUTING.md lists it."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Read this first")[1]
    listed = re.findall(r"^\d+\. `(\S+)`", page, re.MULTILINE)
    path: list[str] = []
    encode = ScalarPages.encode

    def watched(self: ScalarPages, *args: Any) -> Any:
        frames = [Path(frame.filename).resolve() for frame in reversed(inspect.stack()[1:])]
        ours = [str(frame.relative_to(ROOT)) for frame in frames if frame.is_relative_to(ROOT)]
        path[:] = [name for name in dict.fromkeys(ours) if name.split("/")[0] in ARROWS]
        return encode(self, *args)

    monkeypatch.setattr(ScalarPages, "encode", watched)
    model = tiny_model("llama")
    with torch.no_grad(), Compose([SnapKV, TurboQuant])(model):
        model.model(input_ids=prompt(700), past_key_values=DynamicCache())
    assert path and len(listed) == 12
    assert {*path, "codecs/scalar.py"} <= {*listed[:6]}, path
