"""Seconds that a logged step spends on its log, part by part, and what share of a step that is.

python benchmarks/logging_cost.py                    # W&B offline, as without a key; beside a step of 1.3 s
python benchmarks/logging_cost.py --step-seconds 0.5

The waits that exposed communication is measured by are those of a 1B model on a ring of two: host clocks on a CPU,
events of streams on a GPU. Each call is timed by itself, with a pause after it, as between steps.
"""

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ringspan.parallel.waiting import recorded, turn, waiting
from ringspan.train.files import Lines
from ringspan.train.measured import Measured
from ringspan.train.meter import Meter
from ringspan.train.metrics import LoggerConfig, WandbMode, record
from ringspan.train.progress import Progress
from ringspan.train.run_log import RunLog

LAYERS, WAITS = 16, 11  # of a layer, forward and backward: two shares' keys, their gradients, streams for each other
REPEATS, PAUSE = 100, 0.01  # seconds


@dataclass
class Config:
    """What RunLog looks at."""

    name: str = "benchmark"
    steps: int = 10**6
    logger: LoggerConfig = field(default_factory=lambda: LoggerConfig(wandb=WandbMode.offline))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def seconds(act: Callable[[int], object], repeats: int = REPEATS) -> float:
    """Median of a call."""
    taken = []
    for i in range(1, repeats + 1):
        started = time.perf_counter()
        act(i)
        taken.append(time.perf_counter() - started)
        time.sleep(PAUSE)  # W&B's process takes what it was given
    return statistics.median(taken)


def a_record(step: int, device: torch.device) -> dict[str, float | None]:
    memory = dict.fromkeys(("weights", "optimizer", "activations", "gradients", "transport"), 1.0)
    numbers = {"loss": 2.5, "grad_norm": 0.7, "lr": 1e-3, "step_flops": 8e12, "step_seconds": 1.3, "data_seconds": 0.01}
    numbers |= {"save_seconds": 0.0, "exposed_comm_seconds": 0.01, "ring_imbalance": 0.02}
    counts = {"step_tokens": 65536, "skipped": 0, "world": 2}
    return record(step=step, tokens=65536 * step, memory=memory, device=device, **numbers, **counts)


def one_layer(device: torch.device) -> None:
    """The waits of a layer's ring, of which there are none to wait for."""
    stream: Any = torch.cuda.current_stream(device) if device.type == "cuda" else None
    for _ in range(WAITS):
        with waiting(device):
            pass
    if stream is not None:
        for _ in range(2):
            with turn(stream):
                pass


def measuring(device: torch.device) -> Callable[[int], object]:
    """What the loop adds to a step that is logged: waits, moments of memory, the state's sizes, reading them."""
    parameters = {str(i): torch.empty(8, 8, device=device) for i in range(9 * LAYERS)}
    flats = [torch.empty(8, device=device) for _ in range(4)]
    states = {flat: {"exp_avg": flat, "exp_avg_sq": flat, "step": torch.zeros(())} for flat in flats}
    state: Any = SimpleNamespace(frozen=[], parameters=parameters, optimizer=SimpleNamespace(state=states))
    meter = Meter(device, state)

    def act(_: int) -> None:
        with meter.step(logged=True):
            for _ in range(LAYERS):
                one_layer(device)
            meter.see("forward")
            meter.see("backward")
        meter.exposed_seconds()
        meter.memory()
        meter.take()

    return act


def watching(device: torch.device) -> Callable[[int], object]:
    """The same waits in a step that is not logged."""

    def act(_: int) -> None:
        for _ in range(LAYERS):
            one_layer(device)

    return act


def parts(folder: Path, device: torch.device) -> dict[str, float]:
    os.environ.setdefault("TERM", "xterm-256color")
    with recorded(device):  # the first one loads what it needs
        pass
    log = RunLog(str(folder / "run"), Config(), stream=Terminal())
    lines, progress = Lines(folder / "lines.jsonl"), Progress(10**6, Terminal())
    one = a_record(1, device)
    measured = Measured(2.5, 1.0, [(2**i, 2.0) for i in range(16)], needles={4096: [0.5] * 8})
    found = {
        "measuring: waits, memory": seconds(measuring(device)),
        "making the record": seconds(lambda i: a_record(i, device)),
        "metrics.jsonl": seconds(lambda i: lines.add(str(one))),
        "terminal's line": seconds(lambda i: progress.step(one)),
        "W&B, offline": seconds(lambda i: log.wandb.log({**one, "tokens": i})),
        "all that RunLog does": seconds(lambda i: log.step(a_record(i, device))),
        "(a step that is not logged)": seconds(watching(device)),
        "(an evaluation)": seconds(lambda i: log.evaluation(i, i, measured), 20),
    }
    log.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step-seconds", type=float, default=1.3, help="of a step: 1B, 64K tokens, 2 GPUs")
    step_seconds = parser.parse_args().step_seconds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        found = parts(Path(folder), device)
    found["a logged step, in all"] = found["measuring: waits, memory"] + found["all that RunLog does"]
    for name, taken in found.items():
        print(f"{name:28} {1e3 * taken:8.3f} ms {taken / step_seconds:8.3%} of a step of {step_seconds} s")


if __name__ == "__main__":
    main()
