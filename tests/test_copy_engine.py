"""The copy engine's order of events, on a machine made of threads: streams that run ahead, stall, or share a queue."""

import queue
import random
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from ringspan.parallel.copy_engine import Mailbox, _obstacle
from ringspan.parallel.transport import settled

PATIENCE = 20.0  # seconds until a wait of the machine counts as a deadlock
HEADS, DIM = 2, 3


@dataclass
class Machine:
    """Memory and counters of all ranks, and what went wrong on any of them."""

    ranks: int
    seed: int
    one_queue: bool  # all streams of a rank share one: what is issued runs in the order of issue
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.changed = threading.Condition()
        self.buffers: list[Tensor] = [torch.empty(0)] * self.ranks
        self.counters: list[dict[int, int]] = [{} for _ in range(self.ranks)]
        self.meeting = threading.Barrier(self.ranks)

    def wait_for(self, reached: Callable[[], bool], what: str) -> None:
        with self.changed:
            if not self.changed.wait_for(reached, PATIENCE):
                self.failures.append(f"never came: {what}")


class Stream:
    """Runs what it is given, in order, some after a pause."""

    def __init__(self, seed: int, failures: list[str]) -> None:
        self.random, self.failures = random.Random(seed), failures
        self.tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while (task := self.tasks.get()) is not None:
            if self.random.random() < 0.3:
                time.sleep(self.random.random() * 0.003)
            try:
                task()
            except Exception as error:  # whatever it is, the test shall fail of it
                self.failures.append(repr(error))


class ThreadLink:
    """Two streams compute by turns, ``compute`` is the current one."""

    def __init__(self, machine: Machine, rank: int) -> None:
        self.machine, self.rank, self.ranks = machine, rank, machine.ranks
        one = Stream(machine.seed * 100 + rank, machine.failures)
        self.streams = [one if machine.one_queue else Stream(machine.seed * i + rank, machine.failures) for i in (7, 9)]
        self.compute = self.streams[0]
        self.lane = one

    def allocate(self, nbytes: int) -> None:
        for stream in (*self.streams, self.lane):
            self._reach(stream)()
        self.machine.meeting.wait(PATIENCE)
        self.machine.buffers[self.rank] = torch.full((nbytes,), 255, dtype=torch.uint8)
        self.machine.counters[self.rank] = dict.fromkeys(range(2 * self.ranks), 0)
        self.machine.meeting.wait(PATIENCE)

    def _reach(self, stream: Stream) -> Callable[[], None]:
        """An event, recorded on the stream; what it returns waits for it."""
        reached = threading.Event()
        stream.tasks.put(reached.set)

        def wait() -> None:
            if not reached.wait(PATIENCE):
                self.machine.failures.append(f"rank {self.rank}: an event never came")

        return wait

    def here(self) -> Stream:
        return self.compute

    def follow(self, compute: Stream) -> None:
        self.lane.tasks.put(self._reach(compute))

    def tell(self, peer: int, counter: int, value: int) -> None:
        def write() -> None:
            with self.machine.changed:
                assert self.machine.counters[peer][counter] < value, "counters grow"
                self.machine.counters[peer][counter] = value
                self.machine.changed.notify_all()

        self.lane.tasks.put(write)

    def expect(self, counter: int, value: int) -> None:
        self.lane.tasks.put(lambda: self._expect(counter, value))

    def _expect(self, counter: int, value: int) -> None:
        mine = self.machine.counters[self.rank]
        self.machine.wait_for(lambda: mine[counter] >= value, f"rank {self.rank}: counter {counter} at {value}")

    def push(self, peer: int, offset: int, x: Tensor) -> None:
        def copy() -> None:
            raw = x.view(-1).view(torch.uint8)
            for half in (slice(0, len(raw) // 2), slice(len(raw) // 2, len(raw))):
                self.machine.buffers[peer][offset : offset + len(raw)][half] = raw[half]
                time.sleep(0.0005)

        self.lane.tasks.put(copy)

    def mark(self) -> Callable[[], None]:
        return self._reach(self.lane)

    def join(self, mark: Callable[[], None], counter: int, value: int | None) -> None:
        self.compute.tasks.put(mark)
        if value is not None:
            self.compute.tasks.put(lambda: self._expect(counter, value))

    def box(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        n = torch.Size(shape).numel() * dtype.itemsize
        return self.machine.buffers[self.rank][offset : offset + n].view(dtype).view(shape)

    def waiting(self, what: str, source: int, to: int) -> nullcontext[None]:
        return nullcontext()


def value(rank: int, number: int) -> float:
    return 1000.0 * rank + number


def live(link: ThreadLink, exchanges: int, seed: int, mailbox: Mailbox) -> None:
    """One rank's host: pairs to changing partners, some empty, larger ones later; what arrives is looked at twice."""
    plan, pause = random.Random(seed), random.Random(seed + 1 + link.rank)  # the plan is common, pauses are not
    machine, before = link.machine, None
    for number in range(exchanges):
        hop, biggest = plan.randrange(1, link.ranks), 4 if number < exchanges // 2 else 9
        rows = [plan.choice([0, 1, biggest]) for _ in range(link.ranks)]  # by who sends
        to, source = (link.rank + hop) % link.ranks, (link.rank - hop) % link.ranks
        if biggest * 2 * HEADS * DIM * 4 > mailbox.room // 2 and before is not None:
            before = finish(link, before, pause)
        mailbox.reserve(biggest * HEADS * DIM * 4)
        sent = tuple(torch.empty(1, rows[link.rank], HEADS, DIM) for _ in range(2))
        mine = value(link.rank, number)
        link.compute.tasks.put(lambda sent=sent, mine=mine: [one.fill_(mine) for one in sent])
        if mailbox.boxes == 1 and before is not None:
            before = finish(link, before, pause)
        now = mailbox.exchange(sent, to, rows[source], source, f"exchange {number}"), sent, value(source, number)
        if before is not None:
            finish(link, before, pause)
        before = now
        if pause.random() < 0.2:
            time.sleep(pause.random() * 0.005)
        link.compute = link.streams[number % 2]
    finish(link, before, pause)
    link.allocate(0)  # all streams have run to their end
    assert machine.ranks == link.ranks


def finish(link: ThreadLink, exchange: tuple, pause: random.Random) -> None:
    delivery, sent, expected = exchange
    before, readers = link.compute, link.streams if pause.random() < 0.5 else [link.compute]
    for link.compute in readers:
        arrived = delivery.wait()
        look_at(link, arrived, expected, pause.random() * 0.002)
    link.compute.tasks.put(lambda: [one.fill_(-1.0) for one in sent])  # what was sent may be written again
    delivery.done()
    link.compute = before


def look_at(link: ThreadLink, arrived: tuple[Tensor, ...], expected: float, nap: float) -> None:

    def look() -> None:
        for x in arrived:
            first = x.clone()
            time.sleep(nap)
            if not (first == expected).all() or not torch.equal(first, x):
                link.machine.failures.append(f"rank {link.rank}: {first.flatten()[:3]}, {x.flatten()[:3]}: {expected}")

    link.compute.tasks.put(look)


@pytest.mark.parametrize("one_queue", [False, True])
@pytest.mark.parametrize("ranks, boxes", [(2, 1), (2, 2), (3, 1), (3, 2), (4, 2), (4, 3)])
def test_boxes_are_never_read_early_or_written_late(ranks, boxes, one_queue):
    machine = Machine(ranks, seed=ranks, one_queue=one_queue)
    links = [ThreadLink(machine, rank) for rank in range(ranks)]
    hosts = [threading.Thread(target=live, args=(link, 60, 7, Mailbox(link, boxes)), daemon=True) for link in links]
    for host in hosts:
        host.start()
    for host in hosts:
        host.join(2 * PATIENCE)
    assert not machine.failures, machine.failures[:5]
    assert not any(host.is_alive() for host in hosts)


class Nothing:
    """A link whose machine does nothing."""

    rank, ranks = 0, 2
    allocated = 0

    def allocate(self, nbytes: int) -> None:
        self.allocated += 1

    def box(self, *place: object) -> Tensor:
        return torch.empty(0)

    def __getattr__(self, name: str) -> Callable[..., object]:
        return lambda *arguments: nullcontext()


def test_boxes_grow_and_never_shrink():
    link = Nothing()
    mailbox = Mailbox(link, 2)
    for nbytes in (100, 513, 512, 1024, 1, 1025):
        mailbox.reserve(nbytes)
    assert link.allocated == 3  # 512, 1024, 1536 bytes a tensor
    assert mailbox.room == 2 * 1536


def test_two_exchanges_may_be_open_and_end_in_their_order():
    mailbox = Mailbox(Nothing(), 2)
    mailbox.reserve(1000)
    pair = torch.empty(1, 1, 1, 1), torch.empty(1, 1, 1, 1)
    first, second = (mailbox.exchange(pair, 1, 1, 1, f"exchange {n}") for n in range(2))
    with pytest.raises(AssertionError, match="exchange 2"):
        mailbox.exchange(pair, 1, 1, 1, "exchange 2")
    with pytest.raises(AssertionError, match=r"exchange 1: .* in their order"):
        second.done()
    first.done()
    second.done()
    with pytest.raises(AssertionError, match="in a box of"):
        mailbox.exchange((torch.empty(1, 999, 1, 1),) * 2, 1, 1, 1, "too much")


def test_an_error_leaves_no_exchange_open_and_who_leaves_waits_for_none():
    mailbox, pair = Mailbox(Nothing(), 2), (torch.empty(1, 1, 1, 1), torch.empty(1, 1, 1, 1))
    mailbox.reserve(1000)
    for error, left in ((MemoryError, 0), (SystemExit, 2)):
        with suppress(error), settled(mailbox):
            for n in range(2):
                mailbox.exchange(pair, 1, 1, 1, f"exchange {n}")
            raise error
        assert len(mailbox.open) == left


def test_who_reaches_whom():
    def told(*ranks: tuple[str, str, list[str]]) -> str | None:
        return _obstacle(list(ranks))

    assert told(("a", "0", ["1"]), ("a", "1", ["0", "2"])) is None
    assert told(("a", "0", ["1"])) is None
    assert "hosts a and b" in told(("a", "0", ["1"]), ("b", "1", ["0"]))
    assert "share a GPU" in told(("a", "0", ["1"]), ("a", "0", ["1"]))
    assert "rank 1 of the ring does not reach, or see, that of rank 0" in told(("a", "0", ["1"]), ("a", "1", []))
