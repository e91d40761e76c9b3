"""A run's small files: written whole or not at all, and logs that go on where a disk is full."""

import json
import math
import os
from pathlib import Path


class Lines:
    """A file that lines are appended to. What the disk does not take waits in memory, and goes before the next line."""

    def __init__(self, path: Path) -> None:
        self.path, self.waiting = path, b""

    def add(self, line: str) -> str | None:
        """Why it is not in the file yet; None if it is."""
        self.waiting += line.encode() + b"\n"
        return self.flush()

    def flush(self) -> str | None:
        if not self.waiting:
            return None
        try:
            with open(self.path, "ab", buffering=0) as file:
                while self.waiting:
                    self.waiting = self.waiting[file.write(self.waiting) :]  # a disk may take a part
        except OSError as error:
            return why(error, self.path)
        return None


def why(error: OSError, path: Path) -> str:
    return f"{error.strerror} ({error.filename or path})"


def whole_lines(path: Path) -> list[str]:
    """The lines of a log; none where there is no such file.

    A last one without an end is being written, or was cut by a kill or a full disk, and is left out.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return text[: text.rfind("\n") + 1].splitlines()


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of a log after ``step``, and a last line that a kill or a full disk has cut."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
    replace(path, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf


def write_json(path: Path, value: object) -> None:
    replace(path, json.dumps(value, indent=1) + "\n")


def replace(path: Path, text: str) -> None:
    """Write all of a file or nothing. OSError: the one that was there is there still."""
    half = path.with_name(path.name + ".tmp")
    try:
        half.write_text(text, encoding="utf-8")
    except OSError:
        half.unlink(missing_ok=True)  # others need the room
        raise
    os.replace(half, path)
