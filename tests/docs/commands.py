"""Commands in the bash blocks of a page: run where that is quick, checked for their options where not."""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from typer.testing import CliRunner

from quantpress import cli
from quantpress.engines.vllm import BACKEND
from quantpress.engines.vllm.dtypes import dtype_names
from quantpress.engines.vllm.options import options_of
from tests.limits import HANG

ROOT = Path(__file__).parents[2]
QUICK = frozenset({"compare", "doctor", "inspect", "memory", "pack", "run", "validate", "version"})
"""Commands of quantpress that are run; of others, which take minutes, the options are read."""


def commands(code: str) -> list[list[str]]:
    """The words of each command of a block; comments are left out, lines that go on are joined."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def check(words: list[str]) -> None:
    """Run a command in the current folder, or say that what it names is there.

    Raises:
        AssertionError: it is wrong, or of a kind that nobody checks.
    """
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "quantpress":
        _quantpress(rest)
    elif program == "make":
        targets = [word for word in rest if "=" not in word]
        assert shutil.which("make") is None or _make_knows(targets), words
    elif program in ("python", "python3"):
        _python(rest)
    elif program == "ln":
        assert (ROOT / rest[1].replace("$PWD/", "")).exists(), words
    elif program == "vllm":
        _vllm(rest)
    elif program == "pip":
        assert rest[0] == "install", words
    else:
        raise AssertionError(f"nobody checks the command {program}: {' '.join(words)}")


def _quantpress(arguments: list[str]) -> None:
    # Help is printed once every option is known to be one.
    only_read = [] if arguments[0] in QUICK else ["--help"]
    result = CliRunner().invoke(cli.app, [*arguments, *only_read], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def _vllm(arguments: list[str]) -> None:
    """What the plugin says to the options; vLLM is not there to read them."""
    serve, _, *rest = arguments
    options = dict(zip(rest[::2], rest[1::2], strict=True))
    assert serve == "serve" and options.pop("--attention-backend") == BACKEND, arguments
    assert options.pop("--kv-cache-dtype") in dtype_names(), arguments
    requests = int(options.pop("--max-num-seqs"))
    options_of(json.loads(options.pop("--additional-config", "{}")), requests)
    assert not options, f"nobody checks {sorted(options)}"


def _make_knows(targets: list[str]) -> bool:
    done = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, timeout=HANG)
    return done.returncode == 0


def _python(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]) is not None, arguments
        return
    source = (ROOT / arguments[0]).read_text(encoding="utf-8")
    for option in (word for word in arguments[1:] if word.startswith("--")):
        assert re.search(rf"[\"']{option.split('=')[0]}[\"']", source), f"{arguments[0]} has no {option}"
