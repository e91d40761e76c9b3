"""A long run of tiny steps, with checkpoints: its memory and its open files must not grow.

    python tests/soak.py --steps 20000 --seconds 3600    # what `make soak` runs; it ends at whichever comes first

Two gloo ranks, a ring. Each is looked at from outside; one that has reached half of what it is to run may grow no more.
"""

import argparse
import math
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from attempts import SETTINGS, Run
from test_parity import write_texts

MIB = 2**20
GROWTH = 0.01  # of the memory, from the middle of the run to its end: what one more arena of the allocator is


class Sample(NamedTuple):
    step: int
    resident: int  # bytes
    handles: int
    threads: int

    def __str__(self) -> str:
        return f"{self.step:,}: {self.resident / MIB:.1f} MiB, {self.handles} handles, {self.threads} threads"


def look(pid: int, step: int) -> Sample:
    process = Path("/proc", str(pid))
    told = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    resident = int(told["VmRSS"].split()[0]) * 1024
    return Sample(step, resident, len(list((process / "fd").iterdir())), int(told["Threads"]))


def watch(run: Run, seconds: float) -> list[list[Sample]]:
    """By rank, a sample a second until the run ends or, ``seconds`` after its first steps, is asked to."""
    until, asked, stored = math.inf, False, tempfile.TemporaryDirectory()
    ranks = run.start(stored.name)
    samples: list[list[Sample]] = [[] for _ in ranks]
    try:
        while all(rank.is_alive() for rank in ranks):
            if (step := run.steps_done() * run.config.train.log_every) > 0:
                until = min(until, time.monotonic() + seconds)
                for rank, seen in zip(ranks, samples, strict=True):
                    seen.append(look(rank.pid or 0, step))
            if time.monotonic() > until and not asked:
                os.kill(ranks[0].pid or 0, signal.SIGTERM)
                asked = True
            time.sleep(1)
    except (OSError, KeyError):  # a rank has left while it was looked at
        pass
    for rank in ranks:
        rank.join(60)
        rank.kill()
    assert all(rank.exitcode == 0 for rank in ranks), run.said()
    stored.cleanup()
    return samples


def grown(seen: list[Sample]) -> str | None:
    """What has grown since the middle of the run, if anything has: peaks of its two halves are compared."""
    steps = seen[-1].step
    parts = [[one for one in seen if low <= one.step / steps < high] for low, high in ((0.3, 0.6), (0.7, 1.0))]
    before, after = ([max(one[i] for one in part) for i in (1, 2, 3)] for part in parts)
    if after[0] > before[0] * (1 + GROWTH):
        return f"memory, from {before[0] / MIB:.1f} to {after[0] / MIB:.1f} MiB"
    if after[1] > before[1] or after[2] > before[2]:
        return f"handles and threads, from {before[1:]} to {after[1:]}"
    return None


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    asked = parser.parse_args(arguments)
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    with tempfile.TemporaryDirectory() as folder:
        text = write_texts(Path(folder, "text"), 5, 90)
        more = {"steps": asked.steps, "save_every": 100, "keep": 2, "log_every": 10, "n_layers": 1}
        run = Run(Path(folder), "soak", text, SETTINGS[1], cuda=False, **more)
        samples = watch(run, asked.seconds)
    for rank, seen in enumerate(samples):
        for at in range(0, len(seen), max(1, len(seen) // 10)):
            print(f"rank {rank}, step {seen[at]}")
        print(f"rank {rank}, step {seen[-1]}; grown since the middle: {grown(seen) or 'nothing'}", flush=True)
    return int(any(map(grown, samples)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
