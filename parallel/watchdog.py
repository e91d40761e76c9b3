"""A rank that waits in vain says so and ends: on the host, as a device that waits for a dead peer waits for ever."""

import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

POLL_SECONDS = 0.2  # how often the device is asked: an event's query is a microsecond
MARGIN = 0.9  # of the group's time-out: at its end NCCL ends the process itself, and knows neither step nor ranks


class TransportError(RuntimeError):
    """An exchange of the ring has failed: names the rank, the step and the transport."""


class Event(Protocol):
    def query(self) -> bool: ...


class _Watched(NamedTuple):
    begun: Event
    over: Event
    seconds: float
    what: Callable[[], str]


class Watchdog:
    """Calls ``give_up`` with what a device has waited for longer than it may: from ``begun`` on, not from its issue,
    as the host runs far ahead."""

    def __init__(self, give_up: Callable[[str], None]) -> None:
        self.give_up = give_up
        self.watched: queue.SimpleQueue[_Watched] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None

    def watch(self, begun: Event, over: Event, seconds: float, what: Callable[[], str]) -> None:
        """To be called in the order of the stream."""
        self.watched.put(_Watched(begun, over, seconds, what))
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, name="ringspan-watchdog", daemon=True)
            self.thread.start()

    def _run(self) -> None:
        while True:
            one = self.watched.get()
            since = None
            while not one.over.query():
                if since is None and one.begun.query():
                    since = time.monotonic()
                if since is not None and time.monotonic() - since > one.seconds:
                    self.give_up(one.what())
                    break
                time.sleep(min(POLL_SECONDS, one.seconds / 10))


def _end_process(message: str) -> None:
    """The thread that should hear of it sits inside CUDA, where no exception reaches it, and what it has computed from
    keys that never came must not be saved: so this is no exception, but the end."""
    sys.stderr.write(f"ringspan: {message}\n")
    sys.stderr.flush()
    os._exit(1)


_watchdog = Watchdog(_end_process)


class Wait:
    """``with Wait(...)``: what the current stream is given to wait for inside is watched, on CUDA; on the CPU the group
    itself times out. Either way the failure names the ranks, the step and the transport."""

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, transport: str, what: str, source: int, to: int
    ) -> None:
        self.group, self.device, self.transport = group, device, transport
        self.what, self.source, self.to = what, source, to
        self.begun: Any = None

    def __enter__(self) -> None:
        if self.device.type == "cuda":
            self.begun = torch.cuda.Event()
            self.begun.record()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            raise TransportError(self.message()) from error
        if self.begun is not None and error is None:
            over = torch.cuda.Event()
            over.record()
            _watchdog.watch(self.begun, over, MARGIN * time_out(self.group, self.device), self.message)

    def message(self) -> str:
        ranks = dist.get_process_group_ranks(self.group)
        return (
            f"rank {ranks[self.group.rank()]}: {self.what} over {self.transport} failed: rank {ranks[self.source]}, "
            f"which sends to it, or rank {ranks[self.to]}, which it sends to, has died or not come to this step within "
            f"{time_out(self.group, self.device):.0f} s"
        )


def time_out(group: dist.ProcessGroup, device: torch.device) -> float:
    """Seconds that the group's collectives may take."""
    limit: timedelta = group._get_backend(device).options._timeout  # type: ignore[attr-defined]
    return limit.total_seconds()
