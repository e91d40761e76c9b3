"""Seconds that attention waits for other ranks: by intervals, on a GPU that is not there, and on real ranks."""

import random
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from test_transport import make, there_and_back

from ringspan.kernels.spans import Spans
from ringspan.parallel import waiting as module
from ringspan.parallel.attention import SequenceAttention
from ringspan.parallel.mesh import Mesh
from ringspan.parallel.ring import ring_attention
from ringspan.parallel.streams import Streams
from ringspan.parallel.waiting import idle, recorded, turn, waiting


def spans_of(chance: random.Random, n: int) -> list[tuple[int, int]]:
    """Apart from each other, between 0 and 60."""
    edges = sorted(chance.sample(range(61), 2 * n))
    return list(zip(edges[::2], edges[1::2], strict=True))


def test_idle_time_is_that_in_which_neither_stream_computes():
    chance = random.Random(0)
    for _ in range(200):
        waits, turns, beside = (spans_of(chance, chance.randint(0, 5)) for _ in range(3))

        def at(spans, moment):
            return any(start <= moment < stop for start, stop in spans)

        by_hand = sum(at(waits, t) and not (at(turns, t) and not at(beside, t)) for t in range(60))
        assert idle(waits, turns, beside) == by_hand


class Gpu:
    """Streams whose clocks stand where the last work that they were given ends, in ms."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = self.stream()
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: SimpleNamespace) -> None:
                self.at = stream.now

            def elapsed_time(self, other: "Event") -> float:
                return other.at - self.at

        monkeypatch.setattr(module.torch.cuda, "Event", Event)
        monkeypatch.setattr(module.torch.cuda, "current_stream", lambda device: gpu.current)

    def stream(self) -> SimpleNamespace:
        one = SimpleNamespace(now=0.0, device=torch.device("cuda"), synchronize=lambda: None)
        one.wait_stream = lambda other: self.reach(one, other.now)
        return one

    def reach(self, stream: SimpleNamespace, time: float) -> None:
        stream.now = max(stream.now, time)

    def wait(self, until: float) -> None:
        """The current stream waits for other ranks."""
        with waiting(torch.device("cuda")):
            self.reach(self.current, until)


def test_a_wait_beside_a_block_is_not_exposed(monkeypatch):
    gpu = Gpu(monkeypatch)
    here, beside = gpu.current, gpu.stream()
    here.now = 1000.0
    with recorded(torch.device("cuda")) as found:
        gpu.wait(1005)  # an exchange of Ulysses: nothing runs beside it, 5 ms
        streams = Streams([here, beside])
        streams.after(1, 0)
        with turn(beside):
            here.now += 10  # own keys of the first share, until 1015
            gpu.current = beside
            gpu.wait(1012)  # the other share waits beside that: hidden
            beside.now += 8  # and computes until 1020
            gpu.current = here
            gpu.wait(1018)  # beside what the other one computes: hidden
            here.now += 1  # until 1019
            gpu.wait(1030)  # from 1020 on both wait: 10 ms
            gpu.current = beside
            gpu.wait(1028)
            beside.now += 5  # until 1033, and of these 10 ms it has computed 2
            gpu.current = here
            gpu.wait(1040)  # of which the other computes 3
            streams.after(1, 0)  # until 1040
            gpu.current = beside
            gpu.wait(1050)
            gpu.current = here
        streams.after(0, 1)  # until 1050: 10 ms in which the other one waits as well
    assert found.seconds() == pytest.approx((5 + 10 - 2 + 10 - 3 + 10) / 1000)
    before = len(found.waits)
    gpu.wait(2000)
    assert len(found.waits) == before, "nothing is recorded outside"


def test_what_fails_while_it_waits_fails():
    with recorded(torch.device("cpu")), pytest.raises(ZeroDivisionError), waiting(torch.device("cpu")):
        raise ZeroDivisionError
    with recorded(torch.device("cpu")) as again:
        pass
    assert again.seconds() == 0.0


DELAY = 0.3


def waited(what: str) -> tuple[float, float]:
    """(seconds that were recorded, of the whole pass), where rank 0 comes late to a pass forward and backward."""
    group = dist.group.WORLD
    if what == "ring":
        inputs = make(64, group, 0)

        def run() -> None:
            there_and_back(*inputs, group)
    else:
        mesh = Mesh.create(1, 1, 2) if what == "ulysses" else Mesh.create(1, 2, 1)
        attend = SequenceAttention(mesh, "contiguous", backend="torch", strategy="ring" if what == "ulysses" else what)
        plan = attend.plan(Spans.causal(64), "cpu")
        q, k, v = (torch.randn(1, 32, 4, 8, requires_grad=True) for _ in range(3))

        def run() -> None:
            attend(q, k, v, plan).sum().backward()

    run()
    dist.barrier()
    if group.rank() == 0:
        time.sleep(DELAY)
    started = time.perf_counter()
    with recorded(torch.device("cpu")) as found:
        run()
    return found.seconds(), time.perf_counter() - started


@pytest.mark.parametrize("what", ["ring", "allgather", "ulysses"])
def test_those_who_wait_for_a_late_rank_are_told_for_how_long(ranks, what):
    (late, its_pass), (waiting_, other_pass) = ranks(2)(waited, what)
    assert DELAY * 0.9 <= waiting_ <= other_pass
    assert 0 <= late <= min(its_pass, waiting_ - DELAY / 2)


def on_gpus(transport: str) -> tuple[float, float]:
    """(seconds without and with a peer that comes DELAY late) of a ring pass on 2 GPUs.

    Of kernels: plain PyTorch reads the plan on the host, which then waits itself, and gives one stream nothing to wait
    for until the other has come through.
    """
    group, found = dist.group.WORLD, []
    ring_plan, tensors = make(4096, group, 0, "cuda")
    *leaves, dout = (torch.cat([x.detach()] * 8, dim=-1).bfloat16() for x in tensors)  # head dim 64
    leaves = [x.requires_grad_() for x in leaves]
    for late in (None, False, True):  # the first pass compiles
        torch.cuda.synchronize()
        dist.barrier()
        with recorded(torch.device("cuda", torch.cuda.current_device())) as one:
            if late and group.rank() == 0:
                torch.cuda._sleep(int(DELAY * 1.5e9))  # cycles, at 1 to 2 GHz
            torch.autograd.grad(ring_attention(*leaves, ring_plan, group, transport=transport), leaves, dout)
        found.append(one.seconds())
    return found[1], found[2]


@pytest.mark.gpu
@pytest.mark.parametrize("transport", ["copy_engine", "p2p"])
def test_a_gpu_s_waits_for_a_late_rank_are_measured(ranks, transport):
    (_, late), (usual, waits) = ranks(2, cuda=True)(on_gpus, transport, timeout=200)
    assert waits >= DELAY / 2
    assert usual < DELAY / 4
    assert late < DELAY / 4
