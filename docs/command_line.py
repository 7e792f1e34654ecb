"""Writes docs/command_line.md from the commands themselves, with typer's own writer.

python docs/command_line.py            writes the page
python docs/command_line.py --check    fails when the committed page is not what would be written
"""

import argparse
import re
from pathlib import Path

import typer
from typer.cli import get_docs_for_click

from quantpress.cli import app

PAGE = Path(__file__).with_name("command_line.md")

HEADER = """# Command line

Written by `python docs/build.py` from the commands; a test holds it to them. `quantpress COMMAND
--help` says the same. Every command works without a model's name, on the default model.

- `--json` prints one JSON document on the standard output and nothing else there. Warnings, progress bars and
  errors go to the standard error.
- Arguments are checked before a model is loaded: files, numbers, presses, device and dtype.
- `quantpress --install-completion` makes the shell complete commands and options.
- Exit status: 0 done; 1 a bound failed (`validate`); 2 wrong input, a file or model that cannot be used, or a
  press that was refused (`compare`).
- A press is written as in Python: `SnapKV(0.5)`, `TurboQuant(key_bits=4, value_bits=3)`, several with `|`
  between, the quantizer last. The text is read, never run. `none` is the uncompressed cache.

Two environment variables count for every command, and for Python:

- `QUANTPRESS_CACHE` is the folder that the default model is kept in; left out, `quantpress` in the user's
  folder of caches (`XDG_CACHE_HOME`, `~/.cache`, ...).
- `QUANTPRESS_DTYPE`, one of `bfloat16`, `float32` and `float16`, is the dtype of the default model; left out,
  whichever of the first two this machine multiplies faster in. `--dtype` (in Python `dtype=`) wins.
  `quantpress doctor` says what was chosen.

What the figures are:

- A ratio compares a cache with all tokens read, uncompressed in the dtype that the model was loaded in. An
  uncompressed cache has 1.00x on every machine, and 16 or 32 bits a value. Where that dtype is float32, a
  note says that the ratio to 16 bits is half as large.
- `memory` counts the model's own layers without loading weights. The bytes of a cache are those that are
  measured once it is there, for every press that keeps as many tokens as its ratio says; "about" marks the
  others. Work space is an estimate: attention, feed-forward, packing or the scores of a press in one layer,
  whichever needs most.
- `bench` and `compare` go through the pipeline. Peak memory is torch's own count on a GPU; on the CPU it is
  the process's resident memory, looked at every 5 milliseconds. Other work on the machine shows
  in every figure.
- Agreement in `compare` is the share of the answer's tokens before the first one that the uncompressed cache
  would not have given: 100 % is the same answer. A different token early on makes it small, although the
  answer may be as good: read the answers.
- `inspect` suggests the smallest of three settings that keeps the best token of nine queries in ten, on the
  mean over layers. It is a first guess from one text, not an evaluation.

"""


def page() -> str:
    """The whole of docs/command_line.md."""
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="quantpress")
    text = get_docs_for_click(obj=command, ctx=context, indent=1, name="quantpress")
    text = re.sub(r"^Example: (.*)$", r"```bash\n\1\n```", text, flags=re.MULTILINE)
    return HEADER + text.strip() + "\n"


def write() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


def stale() -> list[str]:
    """The name of the page, if it is not what would be written."""
    return [] if PAGE.read_text(encoding="utf-8") == page() else [PAGE.name]


def main() -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description="Writes docs/command_line.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the page is stale")
    if not parser.parse_args().check:
        write()
    elif stale():
        raise SystemExit("docs/command_line.md is stale, run python docs/build.py")


if __name__ == "__main__":
    main()
