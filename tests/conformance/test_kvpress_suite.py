"""kvpress's own tests, run twice: as they are, and with every press in front of a quantizer.

Nothing of kvpress is kept here. The source distribution of the installed version is fetched from the package
index, once for the user; its tests run in processes of their own (`both_ways.py`, `wrapped_presses.py`) on
tiny models (`hub.py`).
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from quantpress.pipelines.default_model import cache_folder
from tests.conformance.hub import write_hub
from tests.limits import HANG

HERE = Path(__file__).parent
VERSION = importlib.metadata.version("kvpress")
DIFFERENT_ON_PURPOSE = {
    "tests/test_press_call.py::test_context_manager_adds_and_removes_hook": "Compose adds hooks",
}
# They download, whatever the model, or need a GPU and a real model.
LEFT_OUT = ("tests/integration", "tests/presses/test_duo_attention_press.py")
LEAST_PASSING = 600
LEAST_PACKED = 700

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sources() -> Path:
    """kvpress's source distribution; skips when it cannot be fetched."""
    folder = cache_folder() / "kvpress-sources"
    archive = folder / f"kvpress-{VERSION}.tar.gz"
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "kvpress"]
        command += [
            "--retries",
            "1",
            "--disable-pip-version-check",
            "--dest",
            str(folder),
            f"kvpress=={VERSION}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
        if done.returncode or not archive.exists():
            said = (done.stderr or done.stdout).strip().splitlines()[-1:]
            pytest.skip(f"the sources of kvpress {VERSION} could not be fetched: {' '.join(said)}")
    return archive


@pytest.fixture(scope="module")
def suite(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with kvpress's tests and what they import beside kvpress itself, and a hub for them."""
    folder = tmp_path_factory.mktemp("kvpress")
    with tarfile.open(sources) as archive:
        for member in archive.getmembers():
            name = Path(member.name.partition("/")[2])
            source = archive.extractfile(member)
            if (
                source is not None
                and name.parts[:1] in (("tests",), ("evaluation",))
                and ".." not in name.parts
            ):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(source.read())
    (folder / "pytest.ini").write_text("[pytest]\n")  # not ours, where warnings are errors
    write_hub(folder / "hf")
    return folder


def run(suite: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What all tests did wrapped, and what those that did not pass then did as they are."""
    results = suite / "wrapped.json", suite / "plain.json"
    settings = {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HOME": str(suite / "hf"),
        "HF_HUB_CACHE": str(suite / "hf" / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # of ours, kvpress's tests use none
        "PYTHONPATH": os.pathsep.join(map(str, (suite, HERE))),
    }
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, str(HERE / "both_ways.py"), *map(str, results)]
    command += ["-q", "-p", "no:cacheprovider", "-p", "wrapped_presses", "--tb=no"]
    command += [f"--ignore={path}" for path in LEFT_OUT]
    command += ["--", "tests", "-k", "not CAMPress and not cam_"]  # which is refused in front of a quantizer
    done = subprocess.run(
        command, cwd=suite, env={**clean, **settings}, capture_output=True, text=True, timeout=HANG
    )
    assert results[1].exists(), done.stdout[-4000:] + done.stderr[-4000:]
    wrapped, plain = (json.loads(file.read_text(encoding="utf-8")) for file in results)
    return wrapped, plain


def test_no_test_fails_because_of_the_quantizer(suite: Path) -> None:
    """What does not pass with us runs again without us, where it must not pass either."""
    wrapped, plain = run(suite)
    others = {test: one for test, one in wrapped["outcomes"].items() if one["outcome"] != "passed"}
    passed = len(wrapped["outcomes"]) - len(others)
    assert passed >= LEAST_PASSING, others
    alone = plain["outcomes"]
    failed = {test: one["reason"] for test, one in others.items() if alone[test]["outcome"] == "passed"}
    print(f"{passed} pass with us, {len(failed)} without us alone")
    assert set(failed) == set(DIFFERENT_ON_PURPOSE), failed
    assert wrapped["packed"]["with pages"] >= LEAST_PACKED, wrapped["packed"]
