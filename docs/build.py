"""Writes everything in the pages that is generated.

    python docs/build.py            writes it
    python docs/build.py tables     writes one part: tables, commands, api or presses
    python docs/build.py --check    fails when what is committed is not what would be written

tables      tables of measurements, and docs/divergence.png, from docs/results/
commands    docs/command_line.md, from the commands
api         docs/api/, from the docstrings; not kept in git
presses     docs/presses.md, from measurements of every press: takes minutes
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "writers")]  # PYTHONSAFEPATH leaves them out

import api_reference  # noqa: E402
import command_line  # noqa: E402
import press_table  # noqa: E402
import tables  # noqa: E402

WRITERS = {"tables": tables, "commands": command_line, "api": api_reference, "presses": press_table}


def main() -> None:
    """Write the parts, or check them."""
    parser = argparse.ArgumentParser(description="Writes everything in the pages that is generated.")
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(WRITERS)}; left out, all")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a page is stale")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(WRITERS):
        parser.error(f"there is no part {min(unknown)}; use some of {', '.join(WRITERS)}")
    writers = [WRITERS[part] for part in options.parts or WRITERS]
    if not options.check:
        for writer in writers:
            writer.write()
    elif stale := [one for writer in writers if writer is not api_reference for one in writer.stale()]:
        raise SystemExit("\n".join(["stale, run python docs/build.py:", *stale]))


if __name__ == "__main__":
    main()
