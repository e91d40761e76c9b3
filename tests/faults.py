"""Runs that are killed, find the disk full and lose checkpoints: each must end to the bit as if nothing had happened.

    python tests/faults.py --kills 100 --full-disks 20 --damaged 20 --seed 0    # what `make faults` runs

A fault is drawn from the seed: which rank, which moment, which byte. After a kill all ranks are ended, as torchrun ends
them, and started again with resume=auto.
"""

import argparse
import json
import multiprocessing as mp
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

import torch
import torch.distributed as dist
from test_parity import job, write_texts

from ringspan.train.checkpoint import Checkpointer
from ringspan.train.config import TrainConfig
from ringspan.train.loop import train
from ringspan.train.manifest import checkpoints_in, damage, find, read_manifest

WORLD, STEPS, SAVE_EVERY, DEADLINE = 2, 12, 2, 120.0
SETTINGS = [{"mesh": (2, 1, 1), "zero": 2}, {"mesh": (1, 2, 1), "zero": 1}, {"mesh": (1, 1, 2), "zero": 3}]
FULL_BYTES = 20_000, 150_000  # a file of this size is where the disk ends; metrics.jsonl is smaller, a shard larger

# A rank that is forked with these starts in a second; with nothing it takes ten
PRELOAD = ["faults", "deepspeed.runtime.zero.muon.muon_optimizer", "torch._inductor.compile_fx", "wandb", "setuptools"]


def serve(rank: int, store: str, config: TrainConfig, full: tuple[int, int, int] | None) -> None:
    """A rank's life. ``full``: (rank, number of the save, bytes) of a disk that takes no more."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_WORLD_SIZE=str(WORLD))
    torch.set_num_threads(1)
    sys.stdout = open(Path(config.run_dir, f"said-{rank}"), "a")  # noqa: SIM115 - until the process ends
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, WORLD), rank=rank, world_size=WORLD, timeout=timedelta(seconds=DEADLINE)
    )
    if full and full[0] == rank:
        fill_the_disk(*full[1:])
    train(config, config.run_dir)
    dist.destroy_process_group()


def fill_the_disk(number: int, size: int) -> None:
    """From the ``number``-th save to the one after it no file may grow beyond ``size``."""
    begin, saves = Checkpointer.begin, []

    def limited(self: Checkpointer, *given: Any) -> None:
        saves.append(0)
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size if len(saves) == number else most, most))
        begin(self, *given)

    Checkpointer.begin = limited  # type: ignore[method-assign]


class Run:
    """One run and all the attempts it takes."""

    def __init__(self, folder: Path, name: str, text: str, setting: dict[str, Any]) -> None:
        config = job(folder, name, text, steps=STEPS, save_every=SAVE_EVERY, keep=0, **setting)
        config.deterministic = True
        self.config, self.folder = config, Path(config.run_dir)

    def attempt(
        self, fault: Callable[[list[BaseProcess], float], bool] | None = None, full: tuple[int, int, int] | None = None
    ) -> bool:
        """Start all ranks and wait; whether the run has come to its end. ``fault`` looks every millisecond."""
        context, started = mp.get_context("forkserver"), time.monotonic()
        with tempfile.TemporaryDirectory() as store:
            ranks: list[BaseProcess] = [
                context.Process(target=serve, args=(rank, f"{store}/s", self.config, full)) for rank in range(WORLD)
            ]
            for rank in ranks:
                rank.start()
            while any(rank.is_alive() for rank in ranks):
                seconds = time.monotonic() - started
                assert seconds < DEADLINE, f"{self.folder} hangs"
                if (fault and fault(ranks, seconds)) or any(rank.exitcode for rank in ranks):
                    break
                time.sleep(0.001)
            for rank in ranks:
                rank.kill()
                rank.join()
        return all(rank.exitcode == 0 for rank in ranks)

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
        return "".join(path.read_text() for path in sorted(self.folder.glob("said-*")))


class Faults:
    """Draws faults and holds what undisturbed runs come to."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.draw, self.folder, self.number = random.Random(seed), folder, 0
        self.text = write_texts(folder / "text", 5, 90)
        self.expected, self.seconds = [], []
        for setting in SETTINGS:
            whole, started = self.run(setting), time.monotonic()
            assert whole.attempt(), whole.said()
            self.seconds.append(time.monotonic() - started)
            self.expected.append(whole.end())

    def run(self, setting: dict[str, Any]) -> Run:
        self.number += 1
        return Run(self.folder, f"run-{self.number}", self.text, setting)

    def kills(self, count: int, in_a_run: int = 3) -> None:
        """Half of them at any moment, half while a checkpoint is being written."""
        while count > 0:
            which = self.draw.randrange(len(SETTINGS))
            run = self.run(SETTINGS[which])
            for _ in range(min(count, in_a_run)):
                fault = self.kill_at_a_save(run) if self.draw.random() < 0.5 else self.kill_at_any_time(which)
                if run.attempt(fault):
                    break  # it was over before
                count -= 1
                self.require_little_lost(run)
            self.require_same_end(run, which)

    def kill_at_any_time(self, which: int) -> Callable[[list[BaseProcess], float], bool]:
        moment, victim = self.draw.uniform(0.1, 0.95) * self.seconds[which], self.draw.randrange(WORLD)
        return lambda ranks, seconds: seconds > moment and self.kill(ranks[victim])

    def kill_at_a_save(self, run: Run) -> Callable[[list[BaseProcess], float], bool]:
        """The n-th that this attempt begins, a moment after its folder has appeared."""
        number, delay, victim = self.draw.randint(1, 3), self.draw.uniform(0, 0.02), self.draw.randrange(WORLD)
        seen: set[str] = set()

        def fault(ranks: list[BaseProcess], _: float) -> bool:
            seen.update(path.name for path in (run.folder / "checkpoints").glob("*.half"))
            if len(seen) < number:
                return False
            time.sleep(delay)
            return self.kill(ranks[victim])

        return fault

    @staticmethod
    def kill(process: BaseProcess) -> bool:
        process.kill()
        return True

    def require_little_lost(self, run: Run) -> None:
        """One checkpoint may have been on its way, and the steps since it was begun."""
        lost = run.steps_done() - run.newest_whole()
        assert lost < 2 * SAVE_EVERY + 1, f"{run.folder}: {lost} steps lost"

    def require_same_end(self, run: Run, which: int) -> None:
        newest = run.newest_whole()
        assert run.attempt(), run.said()
        assert newest == STEPS or run.resumed_at() == newest, (newest, run.resumed_at())
        assert run.end() == self.expected[which], run.folder
        shutil.rmtree(run.folder)

    def full_disks(self, count: int) -> None:
        for _ in range(count):
            which, rank = self.draw.randrange(len(SETTINGS)), self.draw.randrange(WORLD)
            run, number = self.run(SETTINGS[which]), self.draw.randint(1, STEPS // SAVE_EVERY - 1)
            assert run.attempt(full=(rank, number, self.draw.randint(*FULL_BYTES))), run.said()
            assert f"rank {rank}: [Errno 27] File too large; training goes on" in run.said()
            missing = f"step-{number * SAVE_EVERY:08d}"
            assert missing not in [path.name for path in checkpoints_in(str(run.folder))]
            self.require_same_end(run, which)

    def damaged(self, count: int) -> None:
        for _ in range(count):
            which = self.draw.randrange(len(SETTINGS))
            run = self.run(SETTINGS[which])
            least = self.draw.randint(2, STEPS // SAVE_EVERY - 1)
            folder = str(run.folder)
            run.attempt(lambda ranks, _, n=least, at=folder: len(checkpoints_in(at)) >= n and self.kill(ranks[0]))
            newest = find(folder, "auto")[0][0]
            self.damage(newest)
            assert run.newest_whole() < int(newest.name[-8:])
            self.require_same_end_after(run, which, newest.name)

    def require_same_end_after(self, run: Run, which: int, refused: str) -> None:
        newest = run.newest_whole()
        assert run.attempt(), run.said()
        assert run.resumed_at() == newest
        assert f"refused  {refused} " in run.said()
        assert run.end() == self.expected[which], run.folder
        shutil.rmtree(run.folder)

    def damage(self, checkpoint: Path) -> None:
        path = self.draw.choice(sorted(checkpoint.iterdir()))
        content = bytearray(path.read_bytes())
        how = self.draw.choice(["flip", "cut", "delete"])
        if how == "delete":
            path.unlink()
            return
        at = self.draw.randrange(len(content) - 1)
        if how == "flip":
            content[at] ^= 1 << self.draw.randrange(8)
        path.write_bytes(content if how == "flip" else content[:at])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("kills", "full-disks", "damaged", "seed"):
        parser.add_argument(f"--{name}", type=int, default=0)
    asked = parser.parse_args()
    # The fork server looks for modules where this variable says
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    mp.get_context("forkserver").set_forkserver_preload(PRELOAD)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(Path(folder), asked.seed)
        for act, count in ((faults.kills, asked.kills), (faults.full_disks, asked.full_disks)):
            act(count)
            print(f"{act.__name__} {count}: all ended the same, {time.monotonic() - started:.0f} s", flush=True)
        faults.damaged(asked.damaged)
        print(f"damaged {asked.damaged}: all ended the same, {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
