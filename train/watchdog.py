"""Ends a run in which a rank no longer gets anywhere, and says which rank that is and what it was doing.

A rank that waits in a collective looks like one that hangs. So every rank's watchdog counts what its rank has begun;
when one of them sees no progress it asks the others, and the rank that is behind, or does not answer, is named.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist

from ringspan.train.files import why

FIRST_STEP = 10  # times the limit: libraries load, kernels compile, and ranks do so at their own speed
ANSWER_SECONDS = 10.0  # after which a rank that has not told where it is counts as stopped
GRACE_SECONDS = 60.0  # more than is allowed, after which a process ends whose watchdog itself no longer gets anywhere
SLOW = 10  # a phase may take this many times as long as the longest one yet


class Watchdog:
    """``at(what)`` says what this rank does next. ``limit`` is in seconds, 0 watches nothing.

    Where a phase takes longer, stacks and PyTorch's flight recorder are written into ``folder`` and the process ends
    with exit code 1 (torchrun then starts the run again). ``store`` is where ranks find each other. Where a call into a
    driver or a library never gives Python's lock back, no thread of Python can tell: then faulthandler's own thread
    writes the stacks to stderr, and ends the process.
    """

    def __init__(
        self,
        folder: Path,
        limit: float,
        store: dist.Store,
        *,
        rank: int,
        world: int,
        leave: Callable[[], None] = lambda: os._exit(1),
    ) -> None:
        self.folder, self.limit, self.store, self.rank, self.world, self.leave = (
            folder,
            limit,
            store,
            rank,
            world,
            leave,
        )
        self.count, self.what, self.since = 0, "start", time.monotonic()
        self.longest = 0.0
        self.settled = self.slow = False
        self.closed = threading.Event()
        if limit:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def at(self, what: str, *, slow: bool = False) -> None:
        """``slow``: it may take as long as the first step, whatever those before it took."""
        now = time.monotonic()
        if self.settled and not self.slow:
            self.longest = max(self.longest, now - self.since)
        self.slow = slow
        self.count, self.what, self.since = self.count + 1, what, now

    def settle(self) -> None:
        """The first step is over: from here on a phase takes as long as it takes."""
        self.settled = True

    def close(self) -> None:
        self.closed.set()

    def allowed(self) -> float:
        """Seconds that the phase may take."""
        usual = max(self.limit, SLOW * self.longest)
        return usual if self.settled and not self.slow else max(usual, FIRST_STEP * self.limit)

    def _watch(self) -> None:
        try:
            while not self.closed.wait(min(1.0, self.limit / 4)):
                faulthandler.dump_traceback_later(self.allowed() + GRACE_SECONDS, file=2, exit=True)
                if time.monotonic() - self.since > self.allowed():
                    self._tell()
                    return
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _tell(self) -> None:
        waited = time.monotonic() - self.since
        try:
            self._record()
            recorded = f"stacks are in {self.folder}"
        except OSError as error:  # a full disk must not keep a rank that hangs
            recorded = f"stacks could not be written: {why(error, self.folder)}"
        print(self._verdict(waited, recorded), file=sys.stderr, flush=True)
        self.leave()

    def _record(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        place = self.folder / f"rank-{self.rank:05d}"
        with open(place.with_suffix(".stacks.txt"), "w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        for backend, recorded in flight_records().items():
            place.with_suffix(f".{backend}.json").write_bytes(recorded)

    def _verdict(self, waited: float, recorded: str) -> str:
        mine = f"hang: rank {self.rank} has been in {self.what!r} for {waited:.0f} s"
        return f"{mine}; {self._behind()}; {recorded}; slow steps are allowed by a higher train.hang_seconds"

    def _behind(self) -> str:
        """Which rank the others wait for. Those that hang in Python tell; those that are stopped or gone do not."""
        store: dist.Store = cast(Any, self.store).clone()  # the main thread may wait in the other
        store.set(f"hang/{self.rank}", json.dumps([self.count, self.what]))
        deadline = time.monotonic() + max(ANSWER_SECONDS, 2 * self.longest)  # others notice at about the same time
        while len(self._answering(store)) < self.world and time.monotonic() < deadline:
            time.sleep(0.05)
        told = {rank: json.loads(store.get(f"hang/{rank}")) for rank in self._answering(store)}
        silent = [rank for rank in range(self.world) if rank not in told]
        if silent:
            return f"no answer from ranks {silent}: stopped, ended or busy outside of Python"
        count, what = min(told.values())
        ranks = [rank for rank, (at, _) in told.items() if at == count]
        if len(ranks) == self.world:
            return "all ranks are there"
        return f"all wait for ranks {ranks}, in {what!r}"

    def _answering(self, store: dist.Store) -> list[int]:
        return [rank for rank in range(self.world) if store.check([f"hang/{rank}"])]


def flight_records() -> dict[str, bytes]:
    """PyTorch's records of the last collectives, JSON by backend, where it keeps them (TORCH_FR_BUFFER_SIZE)."""
    from torch._C import _distributed_c10d as c10d  # noqa: PLC0415 - not in every build of torch

    dumps = {"nccl": "_dump_nccl_trace_json", "gloo": "_dump_fr_trace_json"}  # a recorder each
    return {backend: getattr(c10d, name)() for backend, name in dumps.items() if hasattr(c10d, name)}
