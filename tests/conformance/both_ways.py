"""Run by `test_kvpress_suite.py`: kvpress's tests wrapped, then, as they are, those that did not pass.

    python both_ways.py wrapped.json plain.json ARGUMENTS -- SELECTION

ARGUMENTS are pytest's for both runs, SELECTION says which tests run wrapped. Each run is a process that forks
from this one, which imports kvpress for both and nothing of ours.
"""

import json
import os
import sys
from pathlib import Path

import kvpress  # noqa: F401
import pytest


def run(mode: str, results: str, arguments: list[str]) -> None:
    """Run pytest in a process of its own, with the plugin in a mode."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    os.environ |= {"QUANTPRESS_CONFORMANCE": mode, "QUANTPRESS_CONFORMANCE_RESULTS": results}
    pytest.main(arguments)
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    """Both runs."""
    wrapped, plain, *rest = sys.argv[1:]
    at = rest.index("--")
    run("wrapped", wrapped, rest[:at] + rest[at + 1 :])
    outcomes = json.loads(Path(wrapped).read_text(encoding="utf-8"))["outcomes"]
    run("plain", plain, rest[:at] + [test for test, one in outcomes.items() if one["outcome"] != "passed"])


if __name__ == "__main__":
    main()
