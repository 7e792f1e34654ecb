"""The committed table of presses is what its command writes."""

import subprocess
import sys
from pathlib import Path

from tests.limits import HANG

ROOT = Path(__file__).parents[2]


def test_table_is_not_stale() -> None:
    command = [sys.executable, str(ROOT / "docs" / "build.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr


def test_a_change_is_noticed(tmp_path: Path) -> None:
    """Percentages may move by a little, everything else not at all."""
    code = (
        "import importlib.util, pathlib\n"
        f"spec = importlib.util.spec_from_file_location('build', {str(ROOT / 'docs' / 'build.py')!r})\n"
        "build = importlib.util.module_from_spec(spec)\n"
        "import sys; sys.modules['build'] = build\n"
        "spec.loader.exec_module(build)\n"
        "old = '| a | stacks | 50 % | 23 % |\\n'\n"
        "assert not build.differences(old, old.replace('23', '24'))\n"
        "for new in (old.replace('23', '30'), old.replace('stacks', 'refused'), old + 'more', ''):\n"
        "    assert build.differences(old, new) or not new\n"
        "assert build.differences(old, 'x')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
