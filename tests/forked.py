"""Code in a process that has imported nothing of ours, without the seconds that importing transformers takes.

One process imports torch and transformers for all such tests and forks for each. What the tests are about is
not imported there: neither quantpress nor kvpress nor `transformers.pipelines`. Run as a script, this file is
that process: it reads one call a line.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run_forked(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code as `python -c` does, in the repository and with its `tests` to import.

    Args:
        code: what to run.
        arguments: what it finds in `sys.argv[1:]`.

    Returns:
        How it ended, and what it wrote.
    """
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("out", "err")]
        server.stdin.write(json.dumps([code, list(arguments), paths]) + "\n")
        server.stdin.flush()
        status = server.stdout.readline()
        assert status, f"the process that forks ended with {server.wait()}"
        written = [Path(path).read_text(encoding="utf-8") for path in paths]
    return subprocess.CompletedProcess(["-c", *arguments], int(status), *written)


@functools.cache
def _server() -> Any:
    """The process; it ends when this one does, which closes its input."""
    settings = {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    command, pipe = [sys.executable, __file__], subprocess.PIPE
    return subprocess.Popen(
        command, env=os.environ | settings, cwd=ROOT, stdin=pipe, stdout=pipe, text=True, bufsize=1
    )


def _serve() -> None:
    import pandas  # noqa: F401
    import torch  # noqa: F401
    import transformers.modeling_utils  # noqa: F401

    assert not {"kvpress", "quantpress", "transformers.pipelines"} & set(sys.modules)
    for line in sys.stdin:
        code, arguments, paths = json.loads(line)
        child = os.fork()
        if not child:
            _run(code, arguments, paths)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run(code: str, arguments: list[str], paths: list[str]) -> None:
    for number, path in enumerate(paths, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = ["-c", *arguments]
    status = 0
    try:
        exec(code, {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve()
