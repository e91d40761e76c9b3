"""One line of a terminal that is written anew each time there is something new; what else is said goes above."""

from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Any, TextIO, cast

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

BAR = 12  # columns that a bar needs at least
ESSENTIAL = 7  # parts that are never left out


class LiveLine:
    """The line comes with the first ``show``. It is written by the caller's thread, and by none between calls."""

    def __init__(self, stream: TextIO) -> None:
        self.console = Console(file=cast(IO[str], Patient(stream)), force_terminal=True)
        self.live = self._new()

    def _new(self) -> Live:
        return Live(console=self.console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)

    def show(self, parts: Sequence[str], done: float) -> None:
        """``parts``, of which the last ones are left out where there is no room; ``done``: share of the work."""
        if not self.live.is_started:
            self.live.start()
            self.console.show_cursor()  # a run that is killed could not bring it back
        text = fitted(parts, self.console.width)
        line = Table.grid(padding=(0, 1))
        room = self.console.width - len(text) - 1
        bar = [ProgressBar(total=1.0, completed=done, width=min(room, 4 * BAR))] if room >= BAR else []
        loss = Text(text, no_wrap=True, overflow="crop")
        loss.highlight_regex(r"loss \S+", "bold")
        line.add_row(loss, *bar)
        self.live.update(line, refresh=True)

    def say(self, line: str) -> None:
        self.console.print(Text(line), soft_wrap=True)

    def end(self) -> None:
        if self.live.is_started:
            self.live.stop()
            self.live = self._new()


def fitted(parts: Sequence[str], room: int) -> str:
    gap = "  " if len("  ".join(parts[:ESSENTIAL])) <= room else " "
    shown = list(parts)
    while len(shown) > ESSENTIAL and len(gap.join(shown)) > room:
        shown.pop()
    return gap.join(shown)


class Patient:
    """A stream for which a terminal that has gone, or a full disk, is no reason to end a run."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()
