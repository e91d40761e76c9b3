"""What a run prints: facts once, and one line a logged step."""

import math
import shutil
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TextIO


class Progress:
    """One line a logged step: rewritten in place on a terminal, one after the other elsewhere."""

    def __init__(self, steps: int, stream: TextIO) -> None:
        self.steps, self.stream = steps, stream
        self.live = stream.isatty()
        self.open_line = False
        self.seconds: float | None = None  # a step, smoothed; the first one, with its compilations, is left out
        self.logged = 0

    def step(self, record: Mapping[str, float | None]) -> None:
        self._learn(record)
        line = progress_line(record, self.steps, self._time_left(record))
        if not self.live:
            self.say(line)
            return
        width = shutil.get_terminal_size().columns - 1
        self._write(f"\r\x1b[2K{line[:width]}")  # back to the start, and clear what stood there
        self.open_line = True

    def _learn(self, record: Mapping[str, float | None]) -> None:
        seconds = record["perf/step_seconds"] or 0.0
        self.logged += 1
        if self.seconds is None or self.logged == 2:
            self.seconds = seconds
        self.seconds += 0.1 * (seconds - self.seconds)

    def _time_left(self, record: Mapping[str, float | None]) -> float:
        return (self.steps - (record["step"] or 0)) * (self.seconds or 0.0)

    def say(self, line: str) -> None:
        self.end()
        self._write(line + "\n")

    def end(self) -> None:
        if self.open_line:
            self._write("\n")
        self.open_line = False

    def _write(self, text: str) -> None:
        with suppress(OSError):  # a terminal that has gone, or a full disk, is no reason to end a run
            self.stream.write(text)
            self.stream.flush()


def progress_line(record: Mapping[str, float | None], steps: int, seconds_left: float) -> str:
    r = {name: math.nan if value is None else value for name, value in record.items()}
    mfu = f" | mfu {r['perf/mfu']:5.1%}" if record["perf/mfu"] is not None else ""
    waiting = r["perf/data_seconds"] / max(r["perf/step_seconds"], 1e-9)
    return (
        f"step {int(r['step']):>{len(str(steps))}}/{steps} | loss {r['train/loss']:.4f} | lr {r['train/lr']:.2e}"
        f" | norm {r['train/grad_norm']:.2f} | {r['perf/tokens_per_second_per_gpu']:,.0f} tok/s/gpu{mfu}"
        f" | mem {r['memory/peak_reserved_gib']:.1f} GiB | data {waiting:.1%} | {r['perf/step_seconds']:.2f} s"
        f" | {short_count(r['tokens'])} tok | eta {short_time(seconds_left)}"
    )


def short_count(n: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if n >= unit:
            return f"{n / unit:.1f}{name}"
    return f"{n:.0f}"


def short_time(seconds: float) -> str:
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    if hours:
        return f"{hours}h{minutes % 60:02}m"
    return f"{minutes}m{round(seconds) % 60:02}s" if minutes else f"{seconds:.0f}s"


def in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {in_words(part)}" for name, part in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
