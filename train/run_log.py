"""What a run says of itself: metrics.jsonl, evaluations.jsonl, run.json, W&B and what is printed."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from ringspan.train.files import Lines, keep_until, replace, whole_lines, why, write_json
from ringspan.train.measured import Measured
from ringspan.train.metrics import METRICS, Ranks, Record, plain
from ringspan.train.progress import Progress, in_words
from ringspan.train.source import source, versions
from ringspan.train.wandb_run import place, start_wandb

SUMMARISED = ("train/loss", "eval/loss")  # the lower, the better


class RunLog:
    """The log of one run in ``run_dir``. Rank 0 writes and prints; others print where ``logger.ranks`` is all.

    A disk that is full when the run starts is a ValueError. Later it ends no run: it is told once, lines wait in memory
    until there is room, and W&B, which drops what it cannot write, is told to be without them.

    Args:
        config: the TrainConfig, as it was checked.
        first_step: steps already done. 0 starts a fresh log and a new W&B run; else lines of later steps, which the
            run is about to repeat, are dropped, and W&B goes on in the run that the folder remembers.
    """

    def __init__(
        self, run_dir: str, config: Any, *, rank: int = 0, first_step: int = 0, stream: TextIO | None = None
    ) -> None:
        self.active, everyone = rank == 0, config.logger.ranks is Ranks.all
        speaks = self.active or everyone
        self.progress = Progress(
            config.steps,
            (stream or sys.stdout) if speaks else None,
            prefix=f"rank {rank}: " if everyone else "",
            rewrites=not everyone,
        )
        if not self.active:
            return
        self.folder, self.config = Path(run_dir), plain(asdict(config))
        self.problem: str | None = None  # that the user has been told of
        self.best = Best(SUMMARISED)
        with needing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in ("metrics.jsonl", "evaluations.jsonl"):
                keep_until(self.folder / name, first_step)
                for line in whole_lines(self.folder / name):
                    self.best.see(json.loads(line))
            self.lines = Lines(self.folder / "metrics.jsonl")
            self.evaluations = Lines(self.folder / "evaluations.jsonl")
            self.wandb = start_wandb(self.folder, self.config, config.logger, fresh=first_step == 0)

    def banner(self, facts: Mapping[str, Any]) -> None:
        """Print ``facts`` (what was picked, the mesh, sizes) once, and keep them with the configuration and versions.

        run.json has the keys config, versions, source, started, command and those of ``facts``.
        """
        if not self.active:
            return
        said = plain(dict(facts))
        made_by = {"versions": versions(), "source": source()}
        started = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": sys.argv}
        with needing(self.folder):
            write_json(self.folder / "run.json", {"config": self.config, **made_by, **started, **said})
        self.wandb.config.update({**made_by, "run": said}, allow_val_change=True)
        here = {"source": made_by["source"], "wandb": place(self.wandb), "folder": str(self.folder)}
        for name, value in {**said, **here}.items():
            self.progress.say(f"{name:>12}  {in_words(value)}")

    def step(self, record: Record) -> None:
        """A logged step: ``record`` has exactly the names in METRICS."""
        assert tuple(record) == METRICS, set(record) ^ set(METRICS)
        if self.active:
            self._tell(self.lines.add(json.dumps(finite(record))))
            self._to_wandb(lambda run: run.log({name: value for name, value in record.items() if value is not None}))
            self.best.see(finite(record))
        self.progress.step(record)

    def evaluation(self, step: int, tokens: int, measured: Measured) -> None:
        if self.active:
            line = {"step": step, "tokens": tokens, **measured.record()}
            problem = self.evaluations.add(json.dumps(line))
            self._tell(problem or self._draw(measured.drawings()))
            self._to_wandb(lambda run: run.log({"tokens": tokens, **measured.numbers(), **measured.plots()}))
            self.best.see(line)
        self.progress.say(f"step {step}: {measured.in_words()}")

    def _draw(self, pictures: dict[str, str]) -> str | None:
        for name, picture in pictures.items():
            path = self.folder / name
            try:
                replace(path, picture)
            except OSError as error:
                return why(error, path)
        return None

    def _tell(self, problem: str | None) -> None:
        """Of a problem with the disk, when it comes and when it has gone."""
        if problem and not self.problem:
            wandb = "; W&B may miss them" if self.wandb and not self.wandb.disabled else ""
            self.progress.say(f"log: {problem}; training goes on, and lines wait in memory until there is room{wandb}")
        if self.problem and not problem:
            self.progress.say("log: there is room again, and every line is written")
        self.problem = problem

    def _to_wandb(self, act: Callable[[Any], object]) -> None:
        if self.wandb is None:
            return
        try:
            act(self.wandb)
        except OSError as error:  # its own process has gone
            self.wandb = None
            self.progress.say(f"W&B has stopped ({error}); training goes on, and metrics.jsonl has every step")

    def verdict(self, loss: float, unigram_entropy: float) -> None:
        """The last loss against what a model would reach that knows token frequencies and no context."""
        if self.active:
            self._to_wandb(lambda run: run.summary.update({"unigram_entropy": unigram_entropy}))
        self.progress.end()
        sign, meaning = ("<", "context helps") if loss < unigram_entropy else (">=", "no use of context yet")
        self.progress.say(f"loss {loss:.3f} {sign} unigram entropy {unigram_entropy:.3f} nats a token: {meaning}")

    def say(self, line: str) -> None:
        """One line for the user, below those before it."""
        self.progress.say(line)

    def close(self) -> None:
        self.progress.end()
        if not self.active:
            return
        problems = {lines: lines.flush() for lines in (self.lines, self.evaluations)}
        for lines, problem in problems.items():
            if problem:
                self.progress.say(f"log: {problem}; its last {len(lines.waiting.splitlines())} lines are lost")
        if not any(problems.values()):
            self._tell(None)
        self._to_wandb(lambda run: run.summary.update(self.best.summary()))
        self._to_wandb(lambda run: run.finish())


class Best:
    """The lowest and the last value of some names in the lines of a log."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.lowest: dict[str, tuple[float, int]] = {}  # and its step
        self.last: dict[str, float] = {}

    def see(self, line: Mapping[str, Any]) -> None:
        for name in self.names:
            if (value := line.get(name)) is not None:
                self.last[name] = value
                self.lowest[name] = min(self.lowest.get(name, (math.inf, 0)), (value, line["step"]))

    def summary(self) -> dict[str, float]:
        """best/NAME, best/NAME_step and final/NAME of each name that there was."""
        best = {f"best/{name}": value for name, (value, _) in self.lowest.items()}
        steps = {f"best/{name}_step": step for name, (_, step) in self.lowest.items()}
        return {**best, **steps, **{f"final/{name}": value for name, value in self.last.items()}}


def finite(record: Record) -> Record:
    """NaN and infinity, which JSON has not, are null."""
    return {name: value if value is not None and math.isfinite(value) else None for name, value in record.items()}


@contextmanager
def needing(folder: Path) -> Iterator[None]:
    """ValueError, instead of an OSError: the log of a run cannot be begun."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"run_dir={folder}: {why(error, folder)}; make room, or give another") from error
