"""`quantpress doctor` where vLLM is installed."""

import subprocess
import sys
from importlib.util import find_spec

import pytest


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here")
def test_doctor_says_what_vllm_finds() -> None:
    found = subprocess.run(
        [sys.executable, "-P", "-m", "quantpress", "doctor"], capture_output=True, text=True, check=False
    )
    assert not found.returncode, found.stderr
    about = [line for line in found.stdout.splitlines() if "vllm" in line.lower()]
    assert any("0.33.0" in line for line in about), found.stdout
    assert any("loads the plugin" in line for line in about), found.stdout
