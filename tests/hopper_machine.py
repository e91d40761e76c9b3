"""A Hopper multiprocessor in Python, on which the Gluon kernels run on the CPU: their logic is tested without a GPU.

What the chip does in its own time happens at a time drawn at random: the order of warps and of blocks, and the copy
engine's loads and stores. So a stage that is given back too soon, a barrier of the wrong parity or a missing wait is a
wrong result or a deadlock, which is reported. `hopper_language.py` is what kernels say to it.
"""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

RESIDENT = 3  # blocks that run at the same time


class Barrier:
    """An mbarrier: its phase is over when all have arrived and all bytes have come."""

    def __init__(self, count: int) -> None:
        self.count = self.missing = count
        self.nbytes = self.phase = 0

    def change(self, arrivals: int = 0, nbytes: int = 0) -> None:
        self.missing, self.nbytes = self.missing - arrivals, self.nbytes + nbytes
        assert self.missing >= 0, "more arrivals than a barrier counts"
        if self.missing == self.nbytes == 0:
            self.phase, self.missing = self.phase + 1, self.count


class Barriers:
    """`barriers` of hopper_tiles."""

    def __init__(self, number: int, arrivals: int) -> None:
        self.all = [Barrier(arrivals) for _ in range(number)]

    def index(self, i: Any) -> Barrier:
        return self.all[int(i)]


class NamedBarriers:
    """Of one block of threads, by number: how many have come, and how often it was passed."""

    def __init__(self) -> None:
        self.come: dict[int, int] = defaultdict(int)
        self.passed: dict[int, int] = defaultdict(int)

    def arrive(self, number: int, threads: int, own: int) -> int:
        """How often it was passed before these came."""
        before = self.passed[number]
        self.come[number] += own
        assert self.come[number] <= threads, f"{self.come[number]} threads at barrier {number} of {threads}"
        if self.come[number] == threads:
            self.come[number], self.passed[number] = 0, before + 1
        return before


class Warps:
    """A partition of a block: warps that run the same function, as a thread that runs when it is its turn."""

    def __init__(self, machine: Machine, block: Block, warps: int, work: Callable[[], None]) -> None:
        self.machine, self.block, self.threads, self.work = machine, block, 32 * warps, work
        self.turn, self.ready, self.awaits = threading.Semaphore(0), lambda: True, "its start"
        self.products: list[Any] = []  # issued, and not waited for
        self.stores: list[Callable[[], None]] = []  # of shared memory to global, on their way
        self.unfenced: set[object] = set()  # shared memory that was stored to, which copies and products may not see
        self.over = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self.turn.acquire()
        try:
            if not self.machine.stopping:
                self.work()
                assert not self.products, "a product is never waited for"
                assert not self.stores, "a store is never waited for"
        except BaseException as error:
            self.machine.error = self.machine.error or error
        self.over = True
        self.machine.back.release()

    def wait(self, awaits: str, ready: Callable[[], bool]) -> None:
        """Lets others run; goes on at some time when ``ready``."""
        self.ready, self.awaits = ready, awaits
        self.machine.back.release()
        self.turn.acquire()
        if self.machine.stopping:
            raise SystemExit


class Block:
    """A block of threads: its number, and what its warps share."""

    def __init__(self, number: tuple[int, ...], grid: tuple[int, ...]) -> None:
        self.number, self.grid, self.named = number, grid, NamedBarriers()


class Machine:
    """Runs blocks, a few at a time, in the order of their number; what happens next is drawn."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.back = threading.Semaphore(0)
        self.copies: list[Callable[[], None]] = []
        self.warps: list[Warps] = []
        self.stopping, self.error = False, None
        self.running: Any = None

    def run(self, work: Callable[[], None], grid: tuple[int, ...], warps: int) -> None:
        numbers = [(x, y) for y in range((*grid, 1)[1]) for x in range(grid[0])]
        while numbers or self.warps:
            while numbers and len({one.block for one in self.warps}) < RESIDENT:
                self.warps.append(Warps(self, Block(numbers.pop(0), grid), warps, work))
            self._step()
        while self.copies:
            self.copies.pop()()

    def _step(self) -> None:
        ready = [one for one in self.warps if one.ready()]
        if not ready and not self.copies:
            told = [f"{one.block.number}: {one.awaits}" for one in self.warps]
            self._stop(AssertionError("deadlock; blocks wait for\n" + "\n".join(told)))
        if (number := self.chance.randrange(len(ready) + len(self.copies))) >= len(ready):
            self.copies.pop(number - len(ready))()
            return
        self.running = ready[number]
        self.running.turn.release()
        self.back.acquire()
        if self.error:
            self._stop(self.error)
        self.warps = [one for one in self.warps if not one.over]

    def _stop(self, error: BaseException) -> None:
        self.stopping = True
        for one in self.warps:
            one.turn.release()
            one.thread.join()
        raise error


machines: list[Machine] = []  # the one that is running


def running_machine() -> Machine:
    return machines[-1]
