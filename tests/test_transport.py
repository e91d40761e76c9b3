"""Wires of the ring on gloo: stalling ranks change nothing, lost ones end the job in time, unlike ones are refused."""

import itertools
import os
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from datetime import timedelta
from multiprocessing.process import BaseProcess
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import START_SECONDS
from torch import Tensor

from ringspan.kernels.spans import Spans
from ringspan.parallel import ring
from ringspan.parallel.layout import Layout
from ringspan.parallel.mesh import Mesh
from ringspan.parallel.ring import ring_attention
from ringspan.parallel.ring_plan import RingPlan, plan_ring
from ringspan.parallel.streams import Streams, side_by_side
from ringspan.parallel.transport import TRANSPORTS, Lane, pick_transport
from ringspan.parallel.watchdog import Watchdog, time_out

LIMIT_SECONDS = 4.0  # the process group's time-out where a rank is lost


def make(length: int, group: dist.ProcessGroup, seed: int, device: str = "cpu") -> tuple[RingPlan, list[Tensor]]:
    """This rank's part of a causal sequence: its plan; q, k, v and the gradient of out."""
    layout = Layout.zigzag(length, group.size())
    generator = torch.Generator().manual_seed(seed + group.rank())
    shapes = [(1, layout.rows, heads, 8) for heads in (4, 2, 2, 4)]
    *leaves, dout = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    ring_plan = plan_ring(Spans.causal(length), layout, group.rank()).to(device)
    return ring_plan, [*(x.requires_grad_() for x in leaves), dout]


def there_and_back(
    ring_plan: RingPlan, tensors: list[Tensor], group: dist.ProcessGroup, transport: str = "auto"
) -> list[Tensor]:
    *leaves, dout = tensors
    out = ring_attention(*leaves, ring_plan, group, transport=transport, backend="torch")  # nothing to compile
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def soak(passes: int) -> int:
    """How many results were not, bit by bit, those of ranks that do not stall."""
    group = dist.group.WORLD
    inputs = [make(length, group, length) for length in (64, 101)]
    expected = [there_and_back(*one, group) for one in inputs]
    chance, stall = random.Random(0), random.Random(1 + group.rank())
    wrong = 0
    for _ in range(passes):
        which = chance.randrange(len(inputs))
        if stall.random() < 0.3:
            time.sleep(stall.random() * 0.03)
        found = there_and_back(*inputs[which], group)
        wrong += sum(not torch.equal(mine, right) for mine, right in zip(found, expected[which], strict=True))
    return wrong


def test_stalling_ranks_change_no_bit(ranks):
    """8 passes forward and backward over 4 ranks: 64 steps."""
    assert ranks(4)(soak, 8) == [0] * 4


def pass_after_errors(where: list[tuple[str, int, int | None]]) -> list[bool]:
    """Whether a pass gives what it has to after one that a block of ``ring.NAME`` has broken off, on a rank or all."""
    group = dist.group.WORLD
    one = make(128, group, 0)
    expected, same = there_and_back(*one, group), []
    for name, block, rank in where:
        real, calls = getattr(ring, name), itertools.count()

        def failing(*args: Any, real: Any = real, calls: Any = calls, block: int = block, **given: Any) -> Any:
            if next(calls) == block:
                raise MemoryError
            return real(*args, **given)

        here = rank in (None, group.rank())
        ring_plan, (q, k, v, dout) = one
        with mock.patch.object(ring, name, failing if here else real), suppress(MemoryError):
            out = ring_attention(q, k, v, ring_plan, group, backend="torch")
            if rank is None:
                torch.autograd.grad(out, (q, k, v), dout)
        found = there_and_back(*one, group)
        same.append(next(calls) > block or not here)  # it did fail
        same += [torch.equal(mine, right) for mine, right in zip(found, expected, strict=True)]
    return same


def test_a_pass_that_an_error_breaks_off_leaves_nothing_to_the_next(ranks):
    """4 ranks: 8 blocks of two shares of the heads. Without it the next one waits for ever."""
    blocks = [(name, block, None) for name in ("attention_forward", "attention_backward") for block in (0, 3, 6, 7)]
    for same in ranks(4)(pass_after_errors, [*blocks, ("attention_forward", 7, 2)]):
        assert all(same), same


def lose_a_rank(rank: int, folder: str, device: str, transport: str, dies: bool, limit: float, tell: Any) -> None:
    """Two ranks, of which rank 1 dies after one pass, or stalls for ever; rank 0 goes on and tells what comes of it."""
    os.dup2(os.open(f"{folder}/stderr.{rank}", os.O_CREAT | os.O_WRONLY), 2)
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    store, time_out = dist.FileStore(f"{folder}/store", 2), timedelta(seconds=limit)
    dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=time_out)
    group = dist.group.WORLD
    one = make(64, group, 0, device)
    there_and_back(*one, group, transport)
    if device == "cuda":
        torch.cuda.synchronize()
    if rank == 1:
        if dies:
            os._exit(0)
        time.sleep(1000)
    try:
        there_and_back(*one, group, transport)
        if device == "cuda":
            torch.cuda.synchronize()
        tell.put("it did not notice")
    except RuntimeError as error:
        tell.put(str(error))


def two_processes(work: Callable[..., None], *args: Any) -> tuple[list[BaseProcess], Any]:
    """Ranks 0 and 1, which call work(rank, *args, tell), and what is told."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed"])
    tell = context.SimpleQueue()
    workers = [context.Process(target=work, args=(rank, *args, tell), daemon=True) for rank in range(2)]
    for worker in workers:
        worker.start()
    return workers, tell


def what_becomes_of_the_other(device: str, transport: str, dies: bool, limit: float) -> tuple[str, float]:
    """What rank 0 says when rank 1 is lost, and the seconds until it has gone."""
    with tempfile.TemporaryDirectory() as folder:
        workers, tell = two_processes(lose_a_rank, folder, device, transport, dies, limit)
        began = time.monotonic()
        workers[0].join(limit + 60)
        seconds, left = time.monotonic() - began, workers[0].exitcode
        for worker in workers:
            worker.kill()
            worker.join()
        assert left is not None, "rank 0 hangs"
        with open(f"{folder}/stderr.0") as file:
            said = file.read()
        return said if tell.empty() else tell.get(), seconds


@pytest.mark.parametrize("dies", [True, False])
def test_a_lost_rank_ends_the_job_in_time(dies):
    said, seconds = what_becomes_of_the_other("cpu", "auto", dies, LIMIT_SECONDS)
    assert "rank 0: step 1 of 1 of the forward pass over p2p failed: rank 1" in said
    assert seconds < LIMIT_SECONDS + 30  # what starting the processes takes on a busy machine


@pytest.mark.gpu
@pytest.mark.parametrize("transport, dies", [("copy_engine", True), ("copy_engine", False), ("p2p", False)])
def test_a_lost_gpu_ends_the_job_in_time(transport, dies):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, and there are {torch.cuda.device_count()}")
    said, seconds = what_becomes_of_the_other("cuda", transport, dies, LIMIT_SECONDS)
    assert f"rank 0: step 1 of 1 of the forward pass over {transport} failed: rank 1" in said
    assert seconds < LIMIT_SECONDS + 30


def time_outs() -> list[float]:
    mesh = Mesh.create(2, 2, 1)
    return [time_out(group, torch.device("cpu")) for group in (mesh.ring_group, mesh.ulysses_group)]


def test_the_groups_of_a_mesh_keep_the_time_out_of_the_job(ranks):
    assert ranks(4)(time_outs) == [[START_SECONDS] * 2] * 4


class Flag:
    """An event that has happened once it is set."""

    def __init__(self, happened: bool) -> None:
        self.happened = happened

    def query(self) -> bool:
        return self.happened


def test_the_watchdog_times_what_has_begun_and_nothing_else():
    heard: list[str] = []
    dog = Watchdog(heard.append)
    queued, slow = Flag(False), Flag(False)
    dog.watch(Flag(True), Flag(True), 0.05, lambda: "over at once")
    dog.watch(queued, slow, 0.05, lambda: "late")
    time.sleep(0.3)
    assert heard == []  # it stands in the queue of a device that is busy: no time runs
    slow.happened = True
    time.sleep(0.1)
    dog.watch(Flag(True), Flag(False), 0.05, lambda: "lost")
    time.sleep(0.3)
    assert heard == ["lost"]


def streams_of_a_pass(length: int) -> list[int]:
    """On how many streams the shares of the heads take turns, forward and backward."""
    group, asked = dist.group.WORLD, []

    def recording(device: torch.device, n: int) -> AbstractContextManager[Streams]:
        asked.append(n)
        return side_by_side(device, n)

    with mock.patch.object(ring, "side_by_side", recording), mock.patch.object(ring, "LONG_ROWS", 32):
        there_and_back(*make(length, group, 0), group)
    return asked


def test_long_blocks_run_one_by_one(ranks):
    assert ranks(2)(streams_of_a_pass, 63) == [[1, 1]] * 2  # padded to 32 rows a rank
    assert ranks(2)(streams_of_a_pass, 60) == [[2, 2]] * 2


def lanes_of_a_pass(length: int) -> set[Lane]:
    """What a forward and a backward pass ask of a transport."""
    group, asked = dist.group.WORLD, set()
    before = TRANSPORTS["p2p"]
    TRANSPORTS["p2p"] = lambda group, device, lane: asked.add(lane) or before(group, device, lane)
    try:
        there_and_back(*make(length, group, 0), group)
    finally:
        TRANSPORTS["p2p"] = before
    return asked


def test_buffers_are_two_ranges_of_keys_and_the_travelling_gradients(ranks):
    """K and V are 2 heads of 8 in fp32; of gradients travel those of one of the heads, and then of the other."""
    for world in (2, 4):
        keys = 64 * 2 * 8 * 4
        expected = {Lane("keys", min(2, world - 1), keys), Lane("gradients", 2, keys // 2)}
        assert ranks(world)(lanes_of_a_pass, 64 * world) == [expected] * world


def unlike(what: str) -> list[str]:
    """Ranks whose tensors differ in that."""
    group, said = dist.group.WORLD, []
    # Of another length at each call: ranks compare what they have not yet agreed on
    ring_plan, (q, k, v, _) = make(1000 + 2 * len(what), group, 0)
    if group.rank() == 1:
        if what == "dtype":
            q, k, v = q.double(), k.double(), v.double()
        elif what == "kv heads":
            k, v = k[:, :, :1], v[:, :, :1]
        else:
            q, k, v = (torch.cat([x, x]) for x in (q, k, v))
    try:
        ring_attention(q, k, v, ring_plan, group)
    except ValueError as error:
        said.append(str(error))
    return said


@pytest.mark.parametrize("what, field", [("dtype", "q"), ("kv heads", "k and v"), ("batch", "q")])
def test_unlike_ranks_are_refused(ranks, what, field):
    for said in ranks(2)(unlike, what):
        assert len(said) == 1
        assert f"{field} differs between the ranks of the ring: rank 0 has" in said[0]


def begin_again(rank: int, folder: str, tell: Any) -> None:
    """Two ranks that have agreed, and in a second process group one of which has another dtype."""
    torch.set_num_threads(1)
    for number in range(2):
        store = dist.FileStore(f"{folder}/store.{number}", 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=LIMIT_SECONDS))
        group = dist.group.WORLD
        ring_plan, (q, k, v, _) = make(64, group, 0)
        dtype = torch.double if rank == number == 1 else torch.float
        try:
            ring_attention(q.to(dtype), k.to(dtype), v.to(dtype), ring_plan, group, backend="torch")
        except (ValueError, RuntimeError) as error:
            tell.put(str(error))
        dist.barrier()
        dist.destroy_process_group()


def test_a_later_process_group_of_the_same_name_has_agreed_on_nothing(tmp_path):
    workers, tell = two_processes(begin_again, str(tmp_path))
    said = [tell.get() for _ in workers]
    for worker in workers:
        worker.join()
    assert all("q differs between the ranks of the ring: rank 0 has" in one for one in said), said


def refusals() -> list[str]:
    mesh, said = Mesh.create(1, 2, 1), []
    for name in ("pigeon", "copy_engine"):
        try:
            pick_transport(name, mesh.ring_group, torch.device("cpu"))
        except ValueError as error:
            said.append(str(error))
    return [*said, pick_transport("auto", mesh.ring_group, torch.device("cpu"))]


def test_a_transport_that_cannot_run_is_refused(ranks):
    for unknown, impossible, picked in ranks(2)(refusals):
        assert "'pigeon': must be one of auto, p2p, copy_engine" in unknown
        assert "transport='copy_engine' cannot run here: no CUDA device (tensors are on cpu)" in impossible
        assert picked == "p2p"
