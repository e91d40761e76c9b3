"""Where the workers of a run come from, how they all get one and the same job, and how they end.

Workers are started by torchrun, or by `launch` on this node, or the calling process is the only one. A job travels
through the store that workers meet at, before there is a process group: so nobody has touched a GPU when rank 0
finds a mistake in the configuration, and a sweep under torchrun can send the other ranks home.
"""

import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Result = TypeVar("Result")

SAVE_SECONDS = 300  # from the first SIGTERM or SIGINT to the end; a step over 1M tokens and its checkpoint fit
COLLECTIVE_SECONDS = 7200  # long: ranks compile at their own speed; who hangs later is found by the run's watchdog
COMPOSE_SECONDS = 600  # rank 0 reads the configuration and looks at the data within this
OURS = str(Path(__file__).resolve().parents[1]) + os.sep


class Place(NamedTuple):
    """Where a worker stands: the store that the ranks meet at, and its numbers."""

    store: dist.Store
    rank: int
    world: int
    local_rank: int


class WorkerError(Exception):
    """A worker's end, as a text for the user: one line if the mistake is theirs, else the worker's traceback."""


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ  # not RANK: SLURM and MPI set that too


def torchrun_place() -> Place:
    store, rank, world = next(dist.rendezvous("env://"))
    # torchrun keeps its store when it starts workers again: what those before have told must not be heard
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return Place(store, rank, world, int(os.environ["LOCAL_RANK"]))


def gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def count_workers(nproc: int) -> int:
    """`nproc`, or for 0 one worker on each GPU here; 2 where there is none, so that there is a ring."""
    return nproc or gpus() or 2


def check_devices(local_world: int) -> None:
    """Raises: ValueError if the workers of this node do not each find a GPU, on a node that has some."""
    if 0 < gpus() < local_world:
        raise ValueError(
            f"{local_world} processes on a machine with {gpus()} GPUs: start at most {gpus()}, or set "
            "CUDA_VISIBLE_DEVICES= (empty) to run on the CPU"
        )


def hand_over(store: dist.Store, job: object) -> None:
    """Rank 0 gives every other rank its job."""
    store.set("job", pickle.dumps(job).hex())  # as text: the one type that every torch declares for set()


def receive(store: dist.Store) -> Any:
    """The other ranks wait for it. Unpickles what rank 0 of this same run wrote, and nothing else."""
    store.wait(["job"], timedelta(seconds=COMPOSE_SECONDS))
    return pickle.loads(bytes.fromhex(store.get("job").decode()))


def first_to_tell(store: dist.Store) -> bool:
    """Whether no rank has told of an error yet: what follows on other ranks is only its echo."""
    return store.add("told", 1) == 1


@contextmanager
def process_group(place: Place | None = None) -> Iterator[None]:
    """The default group: CUDA with NCCL beside gloo where there are GPUs, else gloo; without a place, a group of one.

    On an error the group is left alone: tearing it down when peers have died can hang, and delays the report of who
    failed first. A SystemExit is no error: all ranks have agreed to leave.
    """
    place = place or _alone()
    backend = "gloo"
    if gpus():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(place.local_rank)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # NCCL's last collectives, for whoever looks into a hang
    dist.init_process_group(
        backend,
        store=place.store,
        rank=place.rank,
        world_size=place.world,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    leaving: SystemExit | None = None
    try:
        yield
    except SystemExit as agreed:
        leaving = agreed
    dist.destroy_process_group()
    if leaving:
        raise leaving


def _alone() -> Place:
    place = Place(dist.HashStore(), rank=0, world=1, local_rank=0)  # a HashStore needs no port
    _describe(place, port=0)
    return place


def _describe(place: Place, port: int) -> None:
    """torchrun's variables, for a worker that torchrun has not started: DeepSpeed reads them, or looks for MPI."""
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world),
        LOCAL_RANK=str(place.local_rank),
        LOCAL_WORLD_SIZE=str(place.world),  # all of them are on this node
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def tell(error: BaseException) -> str:
    """One line for a user's mistake, a ValueError that our own code raises; for anything else the traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, WorkerError):
        return str(error)
    if isinstance(error, ValueError) and frames and str(Path(frames[-1].filename).resolve()).startswith(OURS):
        return " ".join(str(error).split())
    return "".join(traceback.format_exception(error)).rstrip()


def launch(task: Callable[..., Result], *args: object, nproc: int) -> Result:
    """Run ``task(*args)`` on ``nproc`` fresh workers of this node; rank 0's result.

    The first SIGTERM or SIGINT is passed on, for the workers to save and leave; the second ends them at once.

    Raises:
        WorkerError: with what the worker that failed first had to say; the others are ended.
        SystemExit: when workers were asked to leave: 0 if all did so by themselves, else 128 + the signal's number.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # 0: any free port
    workers, reports = _start(nproc, store.port, task, args)
    with _signals_to(workers) as signals:
        try:
            _wait_for(workers, signals)
            codes = [worker.exitcode for worker in workers]
        finally:
            _end(workers)
    told = [_read(report) for report in reports]
    clean = all(code == 0 for code in codes)
    if signals.received:
        raise SystemExit(0 if clean else 128 + signals.received)
    if not clean:
        raise WorkerError(_first_failure(codes, told))
    if told[0] is None:  # somebody has asked the workers themselves to leave
        raise SystemExit(0)
    return told[0].result


def _start(
    nproc: int, port: int, task: Callable[..., object], args: tuple[object, ...]
) -> tuple[list[SpawnProcess], list[Connection]]:
    context = mp.get_context("spawn")  # not fork: CUDA and torch's threads do not survive one
    workers, reports = [], []
    # Born deaf to Ctrl-C, which the terminal sends to all: until _work leaves its process group they could hear it
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    for rank in range(nproc):
        report, reporter = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(rank, nproc, port, reporter, task, args))
        worker.start()
        reporter.close()  # the worker has it now
        workers.append(worker)
        reports.append(report)
    signal.signal(signal.SIGINT, interrupt)
    return workers, reports


class _Signals:
    """The first signal asks the workers to leave, the second does not ask."""

    def __init__(self, workers: list[SpawnProcess]) -> None:
        self.workers = workers
        self.received = 0
        self.deadline = float("inf")

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            self.deadline = 0
            return
        self.received, self.deadline = number, time.monotonic() + SAVE_SECONDS
        for worker in self.workers:
            worker.terminate()


@contextmanager
def _signals_to(workers: list[SpawnProcess]) -> Iterator[_Signals]:
    signals = _Signals(workers)
    before = {number: signal.signal(number, signals) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_for(workers: list[SpawnProcess], signals: _Signals) -> None:
    """Until all have left, or one has failed, or after a signal the time to save is over."""
    running = list(workers)
    while running and time.monotonic() < signals.deadline and not any(worker.exitcode for worker in workers):
        wait([worker.sentinel for worker in running], timeout=0.2)
        running = [worker for worker in running if worker.exitcode is None]


def _end(workers: list[SpawnProcess]) -> None:
    for worker in workers:
        worker.kill()
        worker.join()


class _Report(NamedTuple):
    """A worker's last word."""

    moment: float  # time.monotonic(), which is one clock for all processes of a machine
    failure: str | None
    result: Any = None


def _read(report: Connection) -> _Report | None:
    try:
        return report.recv()
    except EOFError:  # it left, or was ended, without a word
        return None


def _first_failure(codes: list[int | None], told: list[_Report | None]) -> str:
    """A worker reports before its sockets close, so the oldest failure is the cause and later ones are echoes."""
    failures = [(report.moment, report.failure) for report in told if report and report.failure]
    if failures:
        return min(failures)[1]
    rank, code = next((rank, code) for rank, code in enumerate(codes) if code)  # None: still ran when it was ended
    how = f"was ended by signal {-code}" if code < 0 else f"left with exit code {code}"
    return f"worker {rank} {how}" + (": the machine may have run out of memory" if code == -signal.SIGKILL else "")


def _work(
    rank: int, world: int, port: int, reporter: Connection, task: Callable[..., object], args: tuple[object, ...]
) -> None:
    """A worker's life: join the group, run the task, and report."""
    os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which passes it on: once
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    place = Place(dist.TCPStore("127.0.0.1", port, is_master=False), rank, world, local_rank=rank)
    _describe(place, port)
    try:
        with process_group(place):
            result = task(*args)
        reporter.send(_Report(time.monotonic(), None, result))
    except Exception as error:  # whatever it is, the parent tells the user
        reporter.send(_Report(time.monotonic(), tell(error)[-32_000:]))  # a pipe holds 64 KiB unread
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # at once: the teardown of a group whose peers wait for us can hang


def _leave_with_parent() -> None:
    parent = mp.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
