"""What runs have left in their folders, as a report needs it: nothing is needed but the files."""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ringspan.train.files import whole_lines

NOT_COMPARED = (
    "config.name",
    "config.run_dir",
    "started",
    "command",
    "memory",
    "expected",
    "resumed",
    "changed",
    "refused",
)


@dataclass(frozen=True, kw_only=True)
class Run:
    folder: Path
    label: str  # its name, or its folder where several have one name
    facts: dict[str, Any]  # run.json
    metrics: list[dict[str, Any]]  # of the logged steps, ascending, as are the next two
    evaluations: list[dict[str, Any]]
    profiles: list[dict[str, Any]]
    logged: str  # when the last step was logged; "" where none was

    @property
    def steps(self) -> int:
        return int(self.facts["config"].get("steps", 0))

    @property
    def status(self) -> str:
        """How far it has come; nobody but the one who started it knows whether it still runs."""
        done = self.metrics[-1]["step"] if self.metrics else 0
        resumed = str(self.facts.get("resumed", "no"))
        since = "" if resumed == "no" else f", resumed from {Path(resumed).name}"
        if not done:
            return f"started, no step of {self.steps:,} logged yet{since}"
        if done >= self.steps:
            return f"finished, {done:,} steps{since}"
        return f"at step {done:,} of {self.steps:,}, last logged {self.logged}{since}"

    def column(self, name: str) -> list[float]:
        """Of the logged steps; NaN where there is no value."""
        return [number(line.get(name)) for line in self.metrics]

    def evaluated(self, name: str) -> list[tuple[float, float]]:
        """(tokens, value) of the evaluations that have it."""
        return [(line["tokens"], number(line[name])) for line in self.evaluations if line.get(name) is not None]

    def last(self, name: str) -> Any:
        """Of the newest evaluation that has it; None where none has."""
        return next((line[name] for line in reversed(self.evaluations) if line.get(name)), None)

    def typical(self, name: str) -> float | None:
        """The median of the logged steps but the first, which has compiled and started things."""
        values = [value for value in self.column(name)[1:] or self.column(name) if math.isfinite(value)]
        return statistics.median(values) if values else None

    def seconds(self, name: str = "perf/step_seconds") -> float:
        """Over all steps so far; a line tells the mean of the steps since the one before."""
        starts = [0, *(line["step"] for line in self.metrics)]
        spans = (after - before for before, after in pairwise(starts))
        return sum(n * value for n, value in zip(spans, self.column(name), strict=True) if math.isfinite(value))


def number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders; of a sweep's folder, all of its jobs. ValueError: no run, or a file that is broken."""
    runs = [read_run(one) for folder in folders for one in expand(folder)]
    names = Counter(run.label for run in runs)
    return [replace(run, label=str(run.folder)) if names[run.label] > 1 else run for run in runs]


def expand(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give that of a run, as runs/NAME, or of a sweep")
    if (folder / "run.json").exists():
        return [folder]
    jobs = [path.parent for path in folder.glob("*/run.json")]
    if not jobs:
        raise ValueError(f"{folder}: there is no run.json, which a run writes when it starts; give the folder of a run")
    return sorted(jobs, key=lambda path: [(len(part), part) for part in re.split(r"(\d+)", path.name)])  # 2 before 10


def read_run(folder: Path) -> Run:
    facts = read_json(folder / "run.json")
    if not isinstance(facts.get("config"), dict):
        raise ValueError(f"{folder / 'run.json'}: it has no config; give the folder of a run of ours")
    log = folder / "metrics.jsonl"
    metrics = read_lines(log)
    logged = time.strftime("%Y-%m-%d %H:%M", time.localtime(log.stat().st_mtime)) if metrics else ""
    return Run(
        folder=folder,
        label=str(facts["config"].get("name", folder.name)),
        facts=facts,
        metrics=metrics,
        evaluations=read_lines(folder / "evaluations.jsonl"),
        profiles=[read_json(path) for path in sorted(folder.glob("profile/step-????????.json"))],
        logged=logged,
    )


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); it is written by a run, and has been cut or changed") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a JSON object, as a run writes")
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects by ascending step, the last of each; see `whole_lines`. ValueError: a line of them is broken."""
    found: dict[int, dict[str, Any]] = {}
    for place, line in enumerate(whole_lines(path), start=1):
        try:
            one = json.loads(line)
            found[one["step"]] = {"tokens": math.nan, **one}
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"{path}: line {place} is no JSON object with a step; delete that line") from None
    return [found[step] for step in sorted(found)]


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Every value, in words, by its whole name."""
    found: dict[str, str] = {}
    for name, part in value.items():
        if isinstance(part, Mapping) and part:
            found.update(flat(part, f"{prefix}{name}."))
        else:
            found[prefix + name] = part if isinstance(part, str) else json.dumps(part)
    return found


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str | None]]]:
    """(name, its value in each run; None: it has none) of all in run.json that is not the same in every run."""
    each = [flat(run.facts) for run in runs]
    names = dict.fromkeys(name for one in each for name in one)
    compared = [name for name in names if not name.startswith(NOT_COMPARED)]
    rows = [(name.removeprefix("config."), [one.get(name) for one in each]) for name in compared]
    return [(name, values) for name, values in rows if len(set(values)) > 1]
