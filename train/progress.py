"""What a run prints: facts once, and one line a logged step."""

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from ringspan.train.live_line import LiveLine


class Progress:
    """One line a logged step: rewritten in place on a terminal, one after the other elsewhere.

    Args:
        stream: None says nothing.
        prefix: of every line.
        rewrites: whether a line may be: not where several processes write to one terminal.
    """

    def __init__(self, steps: int, stream: TextIO | None, *, prefix: str = "", rewrites: bool = True) -> None:
        self.steps, self.stream, self.prefix = steps, stream, prefix
        self.live = live_line(stream) if stream is not None and rewrites and is_terminal(stream) else None
        self.seconds: float | None = None  # a step, smoothed; the first one, with its compilations, is left out
        self.logged = 0

    def step(self, record: Mapping[str, float | None]) -> None:
        self._learn(record)
        if self.live:
            self.live.show(parts(record, self.steps, self._time_left(record)), (record["step"] or 0) / self.steps)
        else:
            self.say(progress_line(record, self.steps, self._time_left(record)))

    def _learn(self, record: Mapping[str, float | None]) -> None:
        seconds = record["perf/step_seconds"] or 0.0
        self.logged += 1
        if self.seconds is None or self.logged == 2:
            self.seconds = seconds
        self.seconds += 0.1 * (seconds - self.seconds)

    def _time_left(self, record: Mapping[str, float | None]) -> float:
        return (self.steps - (record["step"] or 0)) * (self.seconds or 0.0)

    def say(self, line: str) -> None:
        if self.live:
            self.live.say(line)
        elif self.stream is not None:
            with suppress(OSError):  # a terminal that has gone, or a full disk, is no reason to end a run
                self.stream.write(f"{self.prefix}{line}\n")
                self.stream.flush()

    def end(self) -> None:
        """The line stays as it is; what follows comes below."""
        if self.live:
            self.live.end()


def live_line(stream: TextIO) -> "LiveLine":
    from ringspan.train.live_line import LiveLine  # noqa: PLC0415 - rich, for one rank and for terminals alone

    return LiveLine(stream)


def is_terminal(stream: TextIO) -> bool:
    """One whose lines can be rewritten."""
    return stream.isatty() and os.environ.get("TERM", "").lower() not in {"", "dumb", "unknown"}


def words(record: Mapping[str, float | None], steps: int, seconds_left: float) -> dict[str, str]:
    r = {name: math.nan if value is None else value for name, value in record.items()}
    step_seconds = max(r["perf/step_seconds"], 1e-9)
    return {
        "step": f"{int(r['step'])}/{steps}",
        "loss": f"{r['train/loss']:.4f}",
        "lr": f"{r['train/lr']:.2e}",
        "norm": f"{r['train/grad_norm']:.2f}",
        "rate": f"{r['perf/tokens_per_second_per_gpu']:,.0f} tok/s/gpu",
        "mfu": "" if record["perf/mfu"] is None else f"{r['perf/mfu']:.1%}",
        "mem": f"{r['memory/peak_reserved_gib']:.1f} GiB",
        "data": f"{r['perf/data_seconds'] / step_seconds:.1%}",
        "comm": f"{r['perf/exposed_comm_seconds'] / step_seconds:.1%}",
        "seconds": f"{r['perf/step_seconds']:.2f} s",
        "tokens": f"{short_count(r['tokens'])} tok",
        "left": short_time(seconds_left),
    }


def progress_line(record: Mapping[str, float | None], steps: int, seconds_left: float) -> str:
    """All of it, one beside the other."""
    w = words(record, steps, seconds_left)
    mfu = f" | mfu {w['mfu']:>5}" if w["mfu"] else ""
    return (
        f"step {w['step']:>{2 * len(str(steps)) + 1}} | loss {w['loss']} | lr {w['lr']} | norm {w['norm']}"
        f" | {w['rate']}{mfu} | mem {w['mem']} | data {w['data']} | comm {w['comm']}"
        f" | {w['seconds']} | {w['tokens']} | eta {w['left']}"
    )


def parts(record: Mapping[str, float | None], steps: int, seconds_left: float) -> list[str]:
    """The same for a line that has to be short, the most important first."""
    w = words(record, steps, seconds_left)
    mfu = [f"{w['mfu']} mfu"] if w["mfu"] else []
    first = [w["step"], f"loss {w['loss']}", w["rate"], *mfu, w["mem"], f"data {w['data']}", f"{w['left']} left"]
    return [*first, f"comm {w['comm']}", f"norm {w['norm']}", w["seconds"], w["tokens"]]


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
