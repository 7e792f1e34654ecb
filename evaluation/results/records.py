"""Results as JSON lines: a header, then one line for each arm and case, written when it is finished.

An interrupted run resumes where it stopped: what has a line is not measured again. A last line that was cut
short is dropped.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantpress.errors import InvalidInputError

RESULTS = "results.jsonl"
REFUSED = "refused"
"""The measure of lines that say why a press refused."""
Record = dict[str, Any]


class Records:
    """The lines of one run.

    Args:
        path: the file; its folder is made. An existing file is continued.
        settings: what the results depend on.

    Raises:
        InvalidInputError: the file belongs to a run of other settings, or does not hold results.
    """

    def __init__(self, path: Path, settings: Record) -> None:
        self.path = path
        self.settings: Record = json.loads(json.dumps(settings))
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines: list[Record] = []
        if path.exists() and path.stat().st_size:
            self._resume()
        else:
            self._write({"measure": "settings", **self.settings})
        self._done = {_key(line) for line in self.lines}

    @classmethod
    def read(cls, path: Path) -> "Records":
        """Read a file whatever its settings, to report on it.

        Raises:
            InvalidInputError: there is no such file, or it does not hold results.
        """
        try:
            header = json.loads(path.read_text(encoding="utf-8").partition("\n")[0])
            settings = {name: value for name, value in header.items() if name != "measure"}
        except (OSError, ValueError, AttributeError) as error:
            raise InvalidInputError(f"{path} is no file of results; give the folder of a run") from error
        return cls(path, settings)

    def _resume(self) -> None:
        try:
            text = self.path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            header, *lines = [json.loads(line) for line in whole.split("\n")[:-1]]
            found = {name: value for name, value in header.items() if name != "measure"}
        except (ValueError, TypeError, AttributeError) as error:
            raise InvalidInputError(f"{self.path} is no file of results; give another --output") from error
        if header.get("measure") != "settings" or found != self.settings:
            differing = [n for n in {**found, **self.settings} if found.get(n) != self.settings.get(n)]
            shown = "; ".join(f"{n} {found.get(n)!r}, now {self.settings.get(n)!r}" for n in differing)
            raise InvalidInputError(
                f"{self.path} holds results of other settings ({shown}); give another --output, or delete it"
            )
        self.lines = lines
        if len(whole) < len(text):
            with self.path.open("r+b") as file:
                file.truncate(len(whole.encode("utf-8")))

    def has(self, measure: str, arm: str, case: str) -> bool:
        """Whether there is a result of this arm and case."""
        return (measure, arm, case) in self._done

    def add(self, measure: str, arm: str, case: str, **figures: Any) -> None:
        """Write one result; even after a crash of the machine it is there either whole or not at all."""
        line = {"measure": measure, "arm": arm, "case": case, **figures}
        self._write(line)
        self.lines.append(json.loads(json.dumps(line)))
        self._done.add((measure, arm, case))

    def of(self, measure: str, arm: str | None = None) -> Iterator[Record]:
        """The results of one measure, for one arm or for all."""
        return (
            line for line in self.lines if line["measure"] == measure and (arm is None or line["arm"] == arm)
        )

    def _write(self, line: Record) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _key(line: Record) -> tuple[str, str, str]:
    return line["measure"], line["arm"], line["case"]
