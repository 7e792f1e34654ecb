"""The committed table of presses is what its command writes."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.limits import HANG

ROOT = Path(__file__).parents[2]


def test_table_is_not_stale() -> None:
    command = [sys.executable, str(ROOT / "docs" / "build.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """docs/build.py as a module; docs/ is no package, and its names go again."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("build", ROOT / "docs" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["build"] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        for name in ("build", "api_reference", "catalogue", "docstrings"):
            sys.modules.pop(name, None)


def test_a_change_is_noticed(build: ModuleType) -> None:
    """Percentages may move by a little, everything else not at all."""
    old = "| a | stacks | 50 % | 23 % |\n"
    assert not build.differences(old, old.replace("23", "24"))
    for new in (old.replace("23", "30"), old.replace("stacks", "refused"), old + "more", "x"):
        assert build.differences(old, new)
