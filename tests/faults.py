"""Runs that are killed, find the disk full and lose checkpoints: each must end to the bit as if nothing had happened.

    python tests/faults.py --kills 100 --full-disks 20 --damaged 20    # what `make faults` runs
    python tests/faults.py --kills 10 --device cuda                    # on two GPUs

A fault is drawn from the seed: which rank, which moment, which byte. After a kill all ranks are ended, as torchrun ends
them, and started again with resume=auto. ``--workers`` runs are disturbed side by side, by default one for two cores;
after ``--seconds`` none is begun.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from attempts import SETTINGS, WORLD, FullDisk, Ranks, Run
from test_parity import write_texts

from ringspan.train.manifest import checkpoints_in, find

STEPS, SAVE_EVERY, KILLS_IN_A_RUN = 12, 2, 3


class Case(NamedTuple):
    kind: str
    number: int
    faults: int

    def __str__(self) -> str:
        return f"{self.kind} {self.number}"


def cases(kills: int, full_disks: int, damaged: int) -> list[Case]:
    """Runs to disturb; several kills come to one run."""
    groups = [min(KILLS_IN_A_RUN, kills - done) for done in range(0, kills, KILLS_IN_A_RUN)]
    found = [Case("killed", number, count) for number, count in enumerate(groups)]
    found += [Case("full disk", number, 1) for number in range(full_disks)]
    return found + [Case("damaged", number, 1) for number in range(damaged)]


class Faults:
    """Disturbs runs, and holds what undisturbed ones come to."""

    def __init__(self, folder: Path, seed: int = 0, *, cuda: bool = False, workers: int = 1) -> None:
        self.folder, self.seed, self.cuda, self.workers = folder, seed, cuda, workers
        self.text = write_texts(folder / "text", 5, 90)
        self.acts = {"killed": self.kill_runs, "full disk": self.fill_a_disk, "damaged": self.damage_a_checkpoint}
        whole = [self.run(which, "whole") for which in range(len(SETTINGS))]
        whole[0].attempt()  # alone: it prepares the data for all
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(Run.attempt, whole[1:]))
        self.expected, self.seconds = [run.end() for run in whole], [run.seconds for run in whole]

    def run(self, which: int, name: str) -> Run:
        more = {"steps": STEPS, "save_every": SAVE_EVERY, "keep": 0}
        return Run(self.folder, f"{name}-{which}".replace(" ", "-"), self.text, SETTINGS[which], cuda=self.cuda, **more)

    def disturb(self, asked: list[Case], seconds: float, say: Callable[[str], None]) -> list[Case]:
        """Cases that have ended as they should. None is begun after ``seconds``. AssertionError: one has not."""
        until, done = time.monotonic() + seconds, []
        with ThreadPoolExecutor(self.workers) as pool:
            begun = {pool.submit(self._disturb_one, case, until): case for case in asked}
            try:
                for one in as_completed(begun):
                    if took := one.result():
                        done.append(begun[one])
                        say(f"{begun[one]}: {begun[one].faults} faults, the same end, {took:.1f} s")
            finally:
                pool.shutdown(cancel_futures=True)
        return done

    def _disturb_one(self, case: Case, until: float) -> float:
        """Seconds it took; 0 where there is no time left."""
        started = time.monotonic()
        if started > until:
            return 0.0
        self.acts[case.kind](random.Random(f"{self.seed}/{case}"), case)
        return time.monotonic() - started

    def kill_runs(self, draw: random.Random, case: Case) -> None:
        """Half of them at any moment, half while a checkpoint is being written."""
        left, number = case.faults, 0
        while left:
            which, number = draw.randrange(len(SETTINGS)), number + 1
            run = self.run(which, f"{case}-{number}")
            while left:
                at_a_save = draw.random() < 0.5
                if run.attempt(self.kill_at_a_save(draw, run) if at_a_save else self.kill_at_any_time(draw, which)):
                    break  # it was over before
                left -= 1
                self.require_little_lost(run)
            self.require_same_end(run, which)

    def kill_at_any_time(self, draw: random.Random, which: int) -> Callable[[Ranks, float], bool]:
        moment, victim = draw.uniform(0, 0.95) * self.seconds[which], draw.randrange(WORLD)
        return lambda ranks, seconds: seconds > moment and kill(ranks[victim])

    def kill_at_a_save(self, draw: random.Random, run: Run) -> Callable[[Ranks, float], bool]:
        """The n-th that this attempt begins, a moment after its folder has appeared."""
        number, delay, victim = draw.randint(1, 3), draw.uniform(0, 0.02), draw.randrange(WORLD)
        seen: set[str] = set()

        def fault(ranks: Ranks, _: float) -> bool:
            seen.update(path.name for path in (run.folder / "checkpoints").glob("*.half"))
            if len(seen) < number:
                return False
            time.sleep(delay)
            return kill(ranks[victim])

        return fault

    def require_little_lost(self, run: Run) -> None:
        """One checkpoint may have been on its way, and the steps since it was begun."""
        lost = run.steps_done() - run.newest_whole()
        assert lost < 2 * SAVE_EVERY + 1, f"{run.folder}: {lost} steps lost"

    def require_same_end(self, run: Run, which: int) -> None:
        newest = run.newest_whole()
        run.attempt()
        assert newest == STEPS or run.resumed_at() == newest, (newest, run.resumed_at())
        assert run.end() == self.expected[which], f"{run.folder} ended otherwise"
        shutil.rmtree(run.folder)

    def fill_a_disk(self, draw: random.Random, case: Case) -> None:
        """Too small for a shard, and half of the time for the log too."""
        which, rank = draw.randrange(len(SETTINGS)), draw.randrange(WORLD)
        number, size = draw.randint(1, STEPS // SAVE_EVERY - 1), int(10 ** draw.uniform(2.3, 5))  # bytes
        run = self.run(which, str(case))
        run.attempt(full=FullDisk(rank, number, size))
        assert f"rank {rank}: [Errno 27] File too large; training goes on" in run.said()
        lines_waited = rank == 0 and size < log_size(run, SAVE_EVERY * (number + 1))
        assert ("there is room again, and every line is written" in run.said()) == lines_waited, run.said()
        missing = f"step-{number * SAVE_EVERY:08d}"
        assert missing not in [path.name for path in checkpoints_in(str(run.folder))]
        self.require_same_end(run, which)

    def damage_a_checkpoint(self, draw: random.Random, case: Case) -> None:
        which = draw.randrange(len(SETTINGS))
        run, least = self.run(which, str(case)), draw.randint(2, STEPS // SAVE_EVERY - 1)
        folder = str(run.folder)
        run.attempt(lambda ranks, _: len(checkpoints_in(folder)) >= least and kill(ranks[0]))
        newest = find(folder, "auto")[0][0]
        damage_a_file(draw, newest)
        whole = run.newest_whole()
        assert whole < int(newest.name[-8:])
        run.attempt()
        assert run.resumed_at() == whole
        assert f"refused  {newest.name} " in run.said()
        assert run.end() == self.expected[which], f"{run.folder} ended otherwise"
        shutil.rmtree(run.folder)


def log_size(run: Run, steps: int) -> int:
    """Bytes of the first ``steps`` lines of the log."""
    return sum(map(len, (run.folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:steps]))


def kill(process: BaseProcess) -> bool:
    process.kill()
    return True


def damage_a_file(draw: random.Random, checkpoint: Path) -> None:
    path = draw.choice(sorted(checkpoint.iterdir()))
    content = bytearray(path.read_bytes())
    how = draw.choice(["flip", "cut", "delete"])
    if how == "delete":
        path.unlink()
        return
    at = draw.randrange(len(content) - 1)
    if how == "flip":
        content[at] ^= 1 << draw.randrange(8)
    path.write_bytes(content if how == "flip" else content[:at])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0))
    for name, default in {
        "kills": 0,
        "full-disks": 0,
        "damaged": 0,
        "seed": 0,
        "workers": max(1, cores // WORLD),
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    asked = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    if asked.device == "cpu":  # of ranks, which have not been started yet
        os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(Path(folder), asked.seed, cuda=asked.device == "cuda", workers=asked.workers)
        took = time.monotonic() - started
        print(f"undisturbed: {', '.join(f'{x:.1f}' for x in faults.seconds)} s a run, {took:.0f} s in all", flush=True)
        wanted = cases(asked.kills, asked.full_disks, asked.damaged)
        done = faults.disturb(wanted, asked.seconds - took, lambda line: print(line, flush=True))
    for kind in faults.acts:
        ended, all_ = (sum(case.faults for case in which if case.kind == kind) for which in (done, wanted))
        print(f"{kind}: {ended} of {all_} faults, and every run ended the same", flush=True)
    print(f"{time.monotonic() - started:.0f} s", flush=True)
    return int(len(done) < len(wanted))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
