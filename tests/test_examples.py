"""Every example runs as it stands."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
ARGUMENTS = {
    "ask_a_text.py": ["{text}", "Where does Ada live?", "--evict", "0.2"],
    "paged_attention.py": ["--bits", "3"],
    "standalone_codec.py": [],
}
SAID = {
    "ask_a_text.py": "tokens",
    "paged_attention.py": "190 tokens served in 60 steps",
    "standalone_codec.py": "2.5 bits",
}


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(ARGUMENTS) == set(SAID)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_example_runs(name: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Ada lives in Lisbon. The sea is near, and the trams are yellow. " * 20)
    arguments = [argument.format(text=text) for argument in ARGUMENTS[name]]
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    assert SAID[name] in done.stdout
