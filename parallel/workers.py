"""Where the workers of a run come from, how they all get one and the same job, and how they end.

Workers are started by torchrun, or by `launch` on this node, or the calling process is the only one. A job travels
through the store that workers meet at, before there is a process group: so nobody has touched a GPU when rank 0
finds a mistake in the configuration, and a sweep under torchrun can send the other ranks home. `launch_all` runs the
jobs of a sweep side by side, each on workers and GPUs of its own.
"""

import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ringspan.parallel.signals import Signals, deaf, heard

Result = TypeVar("Result")

COLLECTIVE_SECONDS = 7200  # long: ranks compile at their own speed; who hangs later is found by the run's watchdog
COMPOSE_SECONDS = 600  # rank 0 reads the configuration and looks at the data within this
VISIBLE = "CUDA_VISIBLE_DEVICES"
OURS = str(Path(__file__).resolve().parents[1]) + os.sep


class Place(NamedTuple):
    """Where a worker stands: the store that the ranks meet at, and its numbers."""

    store: dist.Store
    rank: int
    world: int
    local_rank: int


class Job(NamedTuple):
    """``task(*args)``, on ``nproc`` fresh workers of this node."""

    task: Callable[..., Any]
    args: tuple[Any, ...]
    nproc: int
    output: str | None = None  # a file that takes what they print; None: where this process prints


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


def visible_gpus() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get(VISIBLE)
    return named.split(",")[: gpus()] if named else [str(number) for number in range(gpus())]


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

    Raises:
        WorkerError: with what the worker that failed first had to say; the others are ended.
        SystemExit: when workers were asked to leave, as `launch_all` has it, or have themselves agreed to: 0.
    """
    (outcome,) = launch_all([Job(task, args, nproc)])
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def run_on(nproc: int, task: Callable[..., Result], *args: object) -> Result:
    """``task(*args)`` in this process, as a group of one, if one will do; else on fresh workers, as of `launch`."""
    if nproc > 1:
        return launch(task, *args, nproc=nproc)
    with process_group():
        return task(*args)


def launch_all(
    jobs: Sequence[Job],
    at_once: int = 1,
    devices: Sequence[str] = (),
    told: Callable[..., None] = lambda number, *outcome: None,
) -> list[Any]:
    """Each job on fresh workers, in order, at most ``at_once`` side by side; what became of each.

    That is rank 0's result, a WorkerError as of `launch`, or SystemExit(0) where workers have left by themselves.
    ``devices`` are shared out: each worker has one to itself; none: all workers see what this process sees. No job may
    need more than there are. ``told(number)`` is called when a job starts and ``told(number, outcome)`` at its end.

    The first signal is passed on (`heard` says which), for workers to save and leave, and no job is started any more;
    the second ends them at once. Raises SystemExit then: 0 if all left by themselves, else 128 + the signal's number.
    """
    outcomes: list[Any] = [None] * len(jobs)
    waiting, free = deque(enumerate(jobs)), list(devices)
    crews: dict[int, Crew] = {}
    all_saved = True  # who has left after a signal

    def next_fits() -> bool:
        return bool(waiting) and len(crews) < at_once and (not devices or waiting[0][1].nproc <= len(free))

    with heard() as signals:
        try:
            while crews or (waiting and not signals.received):
                while next_fits() and not signals.received:
                    number, job = waiting.popleft()
                    needed = job.nproc if devices else 0
                    mine, free = free[:needed], free[needed:]
                    told(number)
                    crews[number] = Crew(job, mine, at_once)
                _wait_for(crews, signals)
                for number in [number for number, crew in crews.items() if crew.over or signals.too_late]:
                    crew = crews.pop(number)
                    outcomes[number] = crew.end()
                    free += crew.devices
                    all_saved &= not (signals.received and isinstance(outcomes[number], WorkerError))
                    told(number, outcomes[number])
        finally:
            for crew in crews.values():
                crew.end()
    if signals.received:
        raise SystemExit(0 if all_saved else 128 + signals.received)
    return outcomes


class Crew:
    """The fresh workers of one job."""

    def __init__(self, job: Job, devices: list[str], crews: int) -> None:
        """``devices``: the GPUs they see, one each; none: those of this process. ``crews`` share the CPU's cores."""
        self.devices, self.asked = devices, False
        # 0: any free port
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.workers: list[SpawnProcess] = []
        self.reports: list[Connection] = []
        self.told: dict[int, _Report | None] = {}  # by rank, of those that have had their last word
        cores = max(1, (os.cpu_count() or 1) // (job.nproc * crews))
        with deaf(), _seeing(devices):
            for rank in range(job.nproc):
                self._start(rank, job, cores)

    def _start(self, rank: int, job: Job, cores: int) -> None:
        context = mp.get_context("spawn")  # not fork: CUDA and torch's threads do not survive one
        report, reporter = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(rank, job, self.store.port, reporter, cores))
        worker.start()
        reporter.close()  # the worker has it now
        self.workers.append(worker)
        self.reports.append(report)

    @property
    def running(self) -> list[SpawnProcess]:
        return [worker for worker in self.workers if worker.exitcode is None]

    @property
    def over(self) -> bool:
        """All have left, or one has failed."""
        return not self.running or any(worker.exitcode for worker in self.workers)

    def ask_to_leave(self) -> None:
        """Once: the second time they would not save."""
        for worker in [] if self.asked else self.running:
            worker.terminate()
        self.asked = True

    @property
    def news(self) -> list[Connection | int]:
        """What is ready when a worker has left, or has something to say."""
        silent = [report for rank, report in enumerate(self.reports) if rank not in self.told]
        return [*silent, *(worker.sentinel for worker in self.running)]

    def listen(self) -> None:
        """Take in what workers have to say: a pipe holds 64 KiB of it, and who says more waits for us to read."""
        for rank, report in enumerate(self.reports):
            if rank not in self.told and report.poll():
                self.told[rank] = _read(report)

    def end(self) -> Any:
        """End who still runs. What became of the job: rank 0's result, a WorkerError or SystemExit(0)."""
        codes = [worker.exitcode for worker in self.workers]
        for worker in self.workers:
            worker.kill()
            worker.join()
        self.listen()
        if any(codes):
            return WorkerError(_first_failure(codes, self.told.values()))
        if None in codes:
            return WorkerError("it did not leave when it was asked to, and was ended")
        last_word = self.told[0]
        return SystemExit(0) if last_word is None else last_word.result  # None: they were asked to leave


@contextmanager
def _seeing(devices: Sequence[str]) -> Iterator[None]:
    """Processes that are started inside see these GPUs alone: whatever they import, they are born with it."""
    before = os.environ.get(VISIBLE)
    if devices:
        os.environ[VISIBLE] = ",".join(devices)
    try:
        yield
    finally:
        if devices:
            os.environ.pop(VISIBLE)
        if before is not None:
            os.environ[VISIBLE] = before


def _wait_for(crews: dict[int, Crew], signals: Signals) -> None:
    """Until a worker has left or has something to say, or for a moment."""
    if signals.received:
        for crew in crews.values():
            crew.ask_to_leave()
    wait([one for crew in crews.values() for one in crew.news], timeout=0.2)
    for crew in crews.values():
        crew.listen()


class _Report(NamedTuple):
    """A worker's last word."""

    moment: float  # time.monotonic(), which is one clock for all processes of a machine
    failure: str | None
    result: Any = None


def _read(report: Connection) -> _Report | None:
    try:
        return report.recv()
    except (EOFError, OSError):  # it left, or was ended, without a word or in the middle of it
        return None


def _first_failure(codes: list[int | None], told: Iterable[_Report | None]) -> str:
    """A worker reports before its sockets close, so the oldest failure is the cause and later ones are echoes."""
    failures = [(report.moment, report.failure) for report in told if report and report.failure]
    if failures:
        return min(failures)[1]
    rank, code = next((rank, code) for rank, code in enumerate(codes) if code)  # None: still ran when it was ended
    how = f"was ended by signal {-code}" if code < 0 else f"left with exit code {code}"
    return f"worker {rank} {how}" + (": the machine may have run out of memory" if code == -signal.SIGKILL else "")


def _work(rank: int, job: Job, port: int, reporter: Connection, cores: int) -> None:
    """A worker's life: join the group, run the task, and report."""
    os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which passes it on: once
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    if job.output is not None:
        _print_to(job.output)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores)
    place = Place(dist.TCPStore("127.0.0.1", port, is_master=False), rank, job.nproc, local_rank=rank)
    _describe(place, port)
    try:
        with process_group(place):
            result = job.task(*job.args)
        reporter.send(_Report(time.monotonic(), None, result if rank == 0 else None))
    except Exception as error:  # whatever it is, the parent tells the user
        reporter.send(_Report(time.monotonic(), tell(error)))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # at once: the teardown of a group whose peers wait for us can hang


def _print_to(file: str) -> None:
    """All that this process prints, its libraries in C with it."""
    opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(opened, stream)
    os.close(opened)


def _leave_with_parent() -> None:
    parent = mp.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
