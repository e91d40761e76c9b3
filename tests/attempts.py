"""A small run of two real ranks, and as many attempts as it takes: started, killed and started again."""

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from ranks import become_rank, forkserver
from test_parity import job

from ringspan.train.checkpoint import Checkpointer
from ringspan.train.config import TrainConfig
from ringspan.train.engine import import_deepspeed
from ringspan.train.loop import train
from ringspan.train.manifest import checkpoints_in, damage, find, read_manifest
from ringspan.train.model import ModelConfig

WORLD, DEADLINE = 2, 240.0  # seconds, after which an attempt hangs
SETTINGS = [{"mesh": (2, 1, 1), "zero": 2}, {"mesh": (1, 2, 1), "zero": 1}, {"mesh": (1, 1, 2), "zero": 3}]
LARGE_HEADS = ModelConfig(dim=256, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=64, mlp_dim=256)  # for GPUs' kernels
Ranks = list[BaseProcess]
POLLING = Lock()  # starting a process asks after all others too, and of two threads that ask one loses the exit code


class FullDisk(NamedTuple):
    """From a rank's ``number``-th save to the one after it no file of it may grow beyond ``size`` bytes."""

    rank: int
    number: int
    size: int

    def fill(self) -> None:
        begin, saves = Checkpointer.begin, []

        def limited(checkpoints: Checkpointer, *given: Any) -> None:
            saves.append(0)
            most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size if len(saves) == self.number else most, most))
            begin(checkpoints, *given)

        Checkpointer.begin = limited  # type: ignore[method-assign]


def serve(rank: int, store: str, config: TrainConfig, cuda: bool, full: FullDisk | None) -> None:
    """A rank's life."""
    become_rank(rank, WORLD, cuda)
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    import_deepspeed(device)
    sys.stdout = sys.stderr = open(Path(config.run_dir, f"said-{rank}"), "w")  # noqa: SIM115 - until the process ends
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.FileStore(store, WORLD),
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=DEADLINE),
    )
    if full and full.rank == rank:
        full.fill()
    train(config, config.run_dir)
    dist.destroy_process_group()


def running(ranks: Ranks) -> bool:
    """Whether some are, and none has failed."""
    with POLLING:
        return any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks)


def end(ranks: Ranks) -> list[int | None]:
    """Their exit codes. Those that have not left by themselves are killed."""
    with POLLING:
        for rank in ranks:
            rank.kill()
            rank.join()
        return [rank.exitcode for rank in ranks]


class Run:
    """A run of ``steps`` in a folder of its own. On ``cuda`` each rank has a GPU, which other runs may share."""

    def __init__(self, folder: Path, name: str, text: str, setting: dict[str, Any], *, cuda: bool, **more: Any) -> None:
        config = job(folder, name, text, **setting, **more)
        if cuda:
            config = replace(config, seq_len=512, model=LARGE_HEADS)
        config.deterministic = True
        self.config, self.folder, self.cuda = config, Path(config.run_dir), cuda
        self.seconds = 0.0  # of the last attempt, from when its ranks had loaded what they need

    def start(self, store: str, full: FullDisk | None = None) -> Ranks:
        for said in self.folder.glob("said-*"):
            said.unlink()
        arguments = [(rank, f"{store}/s", self.config, self.cuda, full) for rank in range(WORLD)]
        ranks: Ranks = [forkserver().Process(target=serve, args=given, daemon=True) for given in arguments]
        with POLLING:
            for rank in ranks:
                rank.start()
        return ranks

    def attempt(self, fault: Callable[[Ranks, float], bool] | None = None, full: FullDisk | None = None) -> bool:
        """Whether the run has come to its end before ``fault``, which looks every two milliseconds, has struck."""
        begun, loaded, struck = time.monotonic(), 0.0, False
        with tempfile.TemporaryDirectory() as store:
            ranks = self.start(store, full)
            try:
                while running(ranks) and not struck:
                    assert time.monotonic() - begun < DEADLINE, f"{self.folder} hangs:\n{self.said()}"
                    if not loaded and len(list(self.folder.glob("said-*"))) == WORLD:
                        loaded = time.monotonic()
                    struck = bool(fault and loaded and fault(ranks, time.monotonic() - loaded))
                    time.sleep(0.002)
            finally:
                codes = end(ranks)
        self.seconds = time.monotonic() - loaded
        whole = codes == [0] * WORLD
        assert struck or whole, f"{self.folder}: {codes}\n{self.said()}"
        return whole

    def curve(self) -> list[tuple[Any, ...]]:
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line["tokens"], line["train/loss"], line["train/grad_norm"]) for line in lines]

    def end(self) -> tuple[Any, ...]:
        """All that must be the same: the curve, and every bit of the last checkpoint."""
        last = read_manifest(checkpoints_in(str(self.folder))[-1])
        return self.curve(), {name: file.sha256 for name, file in last.files.items()}, last.saved.step

    def newest_whole(self) -> int:
        """The step of the checkpoint to go on from; 0 if there is none."""
        for path in find(str(self.folder), "auto")[0]:
            if damage(path, manifest := read_manifest(path)) is None:
                return manifest.saved.step
        return 0

    def steps_done(self) -> int:
        path = self.folder / "metrics.jsonl"
        return sum(line.endswith("}\n") for line in path.open()) if path.exists() else 0

    def resumed_at(self) -> int:
        told = json.loads((self.folder / "run.json").read_text())["resumed"]
        return 0 if told == "no" else int(told[-8:])

    def said(self) -> str:
        """By the last attempt."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("said-*")))
