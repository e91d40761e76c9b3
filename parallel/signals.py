"""Signals that ask to leave, as the process hears them that has started workers, and as those do not."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SAVE_SECONDS = 300  # from the first SIGTERM or SIGINT to the end; a step over 1M tokens and its checkpoint fit


class Signals:
    """The first signal asks the workers to leave, the second does not ask."""

    def __init__(self) -> None:
        self.received = 0
        self.deadline = float("inf")

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.deadline = 0 if self.received else time.monotonic() + SAVE_SECONDS
        self.received = self.received or number

    @property
    def too_late(self) -> bool:
        return time.monotonic() > self.deadline


@contextmanager
def heard() -> Iterator[Signals]:
    """Inside, SIGTERM and SIGINT are noted and do nothing else.

    SIGUSR2 too, where somebody waits for it: that is submitit, which then queues the job again. It is passed on to that
    handler at the end.
    """
    signals, numbers = Signals(), [signal.SIGTERM, signal.SIGINT]
    if callable(signal.getsignal(signal.SIGUSR2)):
        numbers.append(signal.SIGUSR2)
    before = {number: signal.signal(number, signals) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if signals.received == signal.SIGUSR2:
            signal.raise_signal(signal.SIGUSR2)


@contextmanager
def deaf() -> Iterator[None]:
    """Inside, processes are started that hear neither Ctrl-C, which a terminal sends to all of its group's, nor
    SIGUSR2, which SLURM sends to all of a job's, and which would end them."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGUSR2)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
