"""Processes of `benchmarks/peers.py`: one for each alternative, so that what it breaks breaks there."""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .registry import Alternative
from .table import Row

SCRIPT = str(Path(__file__).parents[1] / "peers.py")
COMPILE_TOKENS = 2048
"""Tokens of the first, untimed call: enough for every kernel that a long context takes."""


class Process:
    """A child: started and imported at once, released by `rows`."""

    def __init__(
        self, alternative: Alternative, arguments: argparse.Namespace, tokens: list[int], check: bool
    ):
        self.alternative, self.tokens = alternative, tokens
        self.folder = tempfile.TemporaryDirectory()
        self.output, self.log = (Path(self.folder.name) / name for name in ("rows", "log"))
        command = [sys.executable, SCRIPT, "--child", alternative.name, "--json", str(self.output)]
        command += [*(["--check"] if check else []), "--tokens", *map(str, tokens)]
        if arguments.sites:
            command += ["--sites", str(arguments.sites)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True)

    def release(self) -> None:
        """Let it begin."""
        with suppress(BrokenPipeError), self.process.stdin as stdin:  # it may have ended already
            stdin.write("\n")

    def rows(self, timeout: float) -> list[Row]:
        """Wait for its rows; one more says so if it did not end well, and what it printed goes to stderr."""
        late = ""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            late = f"took more than {timeout:.0f} s"
            self.process.kill()
            self.process.wait()
        lines = self.log.read_text(errors="replace").strip().splitlines()
        written = self.output.read_text().splitlines() if self.output.exists() else []
        self.folder.cleanup()
        found = [Row(**json.loads(line)) for line in written]
        if self.process.returncode:
            note = late or f"process ended: {' '.join(lines[-1:])[:160] or self.process.returncode}"
            found.append(Row(self.alternative.name, "", "", self.tokens[-1], note=note))
        if any(row.note and row.us is None for row in found):
            print(f"--- {self.alternative.name}", *lines[-20:], sep="\n", file=sys.stderr)
        return found


def compile_all(chosen: list[Alternative], arguments: argparse.Namespace) -> dict[str, Process]:
    """Let every alternative attend to few tokens; do not wait for those that compile for long."""
    compiling = {one.name: Process(one, arguments, [COMPILE_TOKENS], True) for one in chosen}
    for process in compiling.values():
        process.release()
    for one in chosen:
        if not one.builds:
            compiling.pop(one.name).rows(arguments.timeout)
    return compiling


def run(chosen: list[Alternative], arguments: argparse.Namespace) -> Iterator[Row]:
    """Compile all at once, then measure one at a time, those that compile for long last."""
    chosen = sorted(chosen, key=lambda one: one.builds)
    compiling = {} if arguments.check else compile_all(chosen, arguments)
    processes = [Process(one, arguments, arguments.tokens, arguments.check) for one in chosen]
    for one, process in zip(chosen, processes, strict=True):
        if one.name in compiling:
            compiling[one.name].rows(arguments.timeout)
        process.release()
        yield from process.rows(arguments.timeout)
