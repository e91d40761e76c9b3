"""How a run is asked to stop, and how to go on with it."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ringspan.parallel.workers import under_torchrun

if TYPE_CHECKING:
    from ringspan.train.config import TrainConfig  # which needs the loop


@contextmanager
def signals() -> Iterator[Callable[[], bool]]:
    """The first SIGTERM or SIGINT makes the function it gives return True, the second raises SystemExit."""
    received: list[int] = []

    def hear(number: int, _: object) -> None:
        received.append(number)
        if len(received) > 1:
            raise SystemExit(128 + number)

    before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resume_command(config: TrainConfig) -> str:
    """The command that this process was started by, in the same folder again, whatever the run's name was made of.

    Where ranks of several hosts met is not told to them: the user has to give that again, on each host.
    """
    ours = {"name": config.name, "run_dir": config.run_dir}
    if {"-m", "--multirun"} & set(sys.argv):
        return f"the job's own values, without -m, and run_dir={shlex.quote(config.run_dir)}"
    kept = [argument for argument in sys.argv[1:] if argument.partition("=")[0] not in (*ours, "resume")]
    where, start = "", ["python"]
    if under_torchrun():
        start = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"]
        if (hosts := int(os.environ["GROUP_WORLD_SIZE"])) > 1:
            start.append(f"--nnodes={hosts}")
            where = f"on each of the {hosts} hosts, with the --rdzv options that it had: "
    return where + shlex.join([*start, sys.argv[0], *kept, *(f"{name}={value}" for name, value in ours.items())])
