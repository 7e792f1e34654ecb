"""The committed table of presses is what its command writes."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


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


@pytest.mark.slow
def test_table_is_not_stale(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["build.py", "--check"])
    build.main()


def test_a_change_is_noticed(build: ModuleType) -> None:
    """Percentages may move by a little, everything else not at all."""
    old = "| a | stacks | 50 % | 23 % |\n"
    assert not build.differences(old, old.replace("23", "24"))
    for new in (old.replace("23", "30"), old.replace("stacks", "refused"), old + "more", "x"):
        assert build.differences(old, new)
