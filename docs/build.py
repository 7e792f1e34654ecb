"""Writes what is generated and committed: tables in the pages, and a page. `make docs` builds the site.

    python docs/build.py            writes it
    python docs/build.py tables     writes one part: tables or presses
    python docs/build.py --check    fails when what is committed is not what would be written

tables      tables of measurements, and the pictures, from docs/results/
presses     docs/presses.md, from measurements of every press: takes minutes
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "writers")]  # PYTHONSAFEPATH leaves them out

import press_table  # noqa: E402
import tables  # noqa: E402

WRITERS = {"tables": tables, "presses": press_table}


def main() -> None:
    """Write the parts, or check them."""
    parser = argparse.ArgumentParser(description="Writes what is generated and committed.")
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(WRITERS)}; left out, all")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a page is stale")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(WRITERS):
        parser.error(f"there is no part {min(unknown)}; use some of {', '.join(WRITERS)}")
    writers = [WRITERS[part] for part in options.parts or WRITERS]
    if not options.check:
        for writer in writers:
            writer.write()
    elif stale := [one for writer in writers for one in writer.stale()]:
        raise SystemExit("\n".join(["stale, run python docs/build.py:", *stale]))


if __name__ == "__main__":
    main()
