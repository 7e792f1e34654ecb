"""One process with Triton's interpreter on, for all tests that interpret kernels.

The interpreter has to be chosen before a kernel is made, so it needs a process of its own. Importing torch
there takes longer than most kernels do. Run as a script, this file is that process: it reads one call a line.
"""

import functools
import inspect
import io
import json
import os
import runpy
import subprocess
import sys
import traceback
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any


def interpret(script: str, *arguments: str) -> str:
    """Run a test file as a script under Triton's interpreter.

    Args:
        script: the path of the file.
        arguments: what it finds in `sys.argv`.

    Returns:
        What it printed.
    """
    process = _process()
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps([script, *arguments]) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise AssertionError(f"the process of Triton's interpreter ended with {process.wait()}")
    printed, failed = json.loads(answer)
    if failed:
        raise AssertionError(f"{printed}\n{failed}")
    return str(printed)


@functools.cache
def _process() -> Any:
    """The process; it ends when this one does, which closes its input."""
    root = str(Path(__file__).resolve().parents[2])
    settings = {"TRITON_INTERPRET": "1", "PYTHONPATH": root, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, __file__],
        env=os.environ | settings,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _patch_once_a_launch() -> None:
    """A launch replaces Triton's functions; so does every call inside the kernel, again, for nothing.

    A third of the time goes there. What a launch does, and undoes at its end, stays as it is.
    """
    from triton.runtime import interpreter

    patch: Any = interpreter._patch_lang
    patched = set[str]()

    def patch_the_rest(function: Any) -> Any:
        seen = (value.__name__ for value in function.__globals__.values() if inspect.ismodule(value))
        modules = {name for name in seen if name.startswith("triton.language")}
        if modules <= patched:  # inside a launch, which alone asks for the scope
            return None
        scope = patch(function)
        patched.update(modules)
        restore = scope.restore

        def restore_all() -> None:
            patched.clear()
            restore()

        scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch_the_rest  # type: ignore[assignment]


def _serve() -> None:
    import torch

    _patch_once_a_launch()
    for line in sys.stdin:
        failed, printed = "", io.StringIO()
        torch.manual_seed(0)
        sys.argv = json.loads(line)
        try:
            with redirect_stdout(printed):
                runpy.run_path(sys.argv[0], run_name="__main__")
        except Exception:
            failed = traceback.format_exc()
        print(json.dumps([printed.getvalue(), failed]), flush=True)


if __name__ == "__main__":
    _serve()
