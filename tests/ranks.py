"""Real processes, real gloo, no ports: `ranks(4)(fn, *args)` runs fn(*args) on 4 ranks and returns the 4 results.

Arguments and results are pickled whole: no rank shares a tensor's memory with another or with the test. A function
comes by name, so it stands at the top of its test file (no lambda, no closure). Each call starts from the same seed.
"""

import os
import pickle
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

CROWDED = 30  # threads of a rank. Each gloo group that a test leaves behind has three, which wake 100 times a second
START_SECONDS = 120  # a rank imports torch and joins the group within this, also on a busy machine

TRAINING = [
    "ringspan.train.config",
    "torch._dynamo",
    "wandb",
    "setuptools",
    "pytest",
]  # what a rank that trains imports


def forkserver() -> ForkServerContext:
    """Starts ranks as forks of one process that has imported, for 7 s of a core, what each of them needs.

    DeepSpeed picks its accelerator when it is imported, and a process that has looked at a GPU cannot fork: where there
    are GPUs each rank imports that itself.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([*TRAINING, *([] if torch.cuda.is_available() else ["deepspeed"])])
    return context


def _serve(rank: int, world: int, cuda: bool, store: str, inbox: Any, outbox: Any) -> None:
    """A rank's life: join the group, then answer each task with (rank, worked, pickled result or traceback)."""
    become_rank(rank, world, cuda)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=START_SECONDS),
    )
    while (task := inbox.get()) is not None:
        try:
            torch.manual_seed(0)
            fn, args = pickle.loads(task)
            answer = rank, True, pickle.dumps(fn(*args))
        except BaseException:  # SystemExit too: a rank that leaves must not look like one that hangs
            answer = rank, False, traceback.format_exc()
        outbox.put(answer)
    dist.destroy_process_group()


def become_rank(rank: int, world: int, cuda: bool) -> None:
    """What torchrun would have set (DeepSpeed reads it), and which device this rank may see."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    if cuda:
        torch.cuda.set_device(rank)
    else:  # on a machine with GPUs, too, these ranks are CPU ranks
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")


class Ranks:
    """A pool of ranks that outlives a test. A failed task closes the pool: its peers may be stuck in a collective."""

    def __init__(self, world: int, cuda: bool = False) -> None:
        ctx = forkserver()
        self.folder = tempfile.TemporaryDirectory()
        self.inboxes = [ctx.SimpleQueue() for _ in range(world)]
        self.outbox = ctx.Queue()
        store = f"{self.folder.name}/store"
        self.workers: list[BaseProcess] = [
            ctx.Process(target=_serve, args=(rank, world, cuda, store, inbox, self.outbox), daemon=True)
            for rank, inbox in enumerate(self.inboxes)
        ]
        for worker in self.workers:
            worker.start()
        self.open = True
        self(_ready, timeout=START_SECONDS)  # so that a test's own time-out does not pay for the start

    def __call__(self, fn: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
        """Each rank's fn(*args), by rank.

        Raises:
            AssertionError: naming the rank that failed first, with its traceback, or the ranks that never answered.
        """
        task = pickle.dumps((fn, args))
        for inbox in self.inboxes:
            inbox.put(task)
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(results) < len(self.workers):
            rank, worked, value = self._answer(deadline, results)
            if not worked:
                self._fail(f"rank {rank} failed:\n{value}")
            results[rank] = pickle.loads(value)
        return [results[rank] for rank in range(len(self.workers))]

    @property
    def crowded(self) -> bool:
        """Whether this pool takes more time of the cores, idle, than a new one takes to start: 0.1 to 0.4 s."""
        tasks = Path(f"/proc/{self.workers[0].pid}/task")  # on Linux
        return tasks.is_dir() and len(list(tasks.iterdir())) > CROWDED

    def _answer(self, deadline: float, results: dict[int, Any]) -> Any:
        while True:
            try:
                return self.outbox.get(timeout=0.5)
            except queue.Empty:
                missing = [rank for rank in range(len(self.workers)) if rank not in results]
            for rank in missing:
                if (code := self.workers[rank].exitcode) is not None:
                    self._fail(f"rank {rank} died with exit code {code}")
            if time.monotonic() > deadline:
                self._fail(f"no answer from ranks {missing}: do all ranks call the same collectives?")

    def _fail(self, message: str) -> None:
        self.close(kill=True)
        raise AssertionError(message)

    def close(self, kill: bool = False) -> None:
        self.open = False
        for worker, inbox in zip(self.workers, self.inboxes, strict=True):
            if kill or not worker.is_alive():
                worker.kill()
            else:
                inbox.put(None)
        for worker in self.workers:
            worker.join(timeout=10)
            worker.kill()  # a rank that did not leave by itself
        self.folder.cleanup()


def _ready() -> None:
    dist.barrier()
