"""What becomes of a sweep: a word of each job in its own folder, and one table of all, made from local files.

A job's folder has job.json: its number, its overrides, a status (waiting, running, done, failed, or stopped, which has
left before its last step) and of what failed the reason. Whatever launches jobs, here or on other hosts of one file
system, the table can be made at any time. A job that was killed outright cannot note its end: it stays "running", and
the table says when it was last heard of.
"""

import csv
import io
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ringspan.parallel.workers import WorkerError, tell
from ringspan.train.files import replace, whole_lines, write_json
from ringspan.train.progress import short_time

JOB, TABLE = "job.json", "results.csv"
COLUMNS = ("job", "overrides", "loss", "best_held_out", "tokens_per_second_per_gpu", "status", "reason")

Row = dict[str, Any]


def note(run_dir: str, status: str, reason: str = "", **facts: Any) -> None:
    """A job's word of itself: ``facts`` are its number, as job, and its overrides, once."""
    path = Path(run_dir, JOB)
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, {**before, **facts, "status": status, "reason": reason})


def noted(run_dir: str, number: int, overrides: Sequence[str], work: Callable[[], Any], *, later: bool = False) -> Any:
    """``work()``, with a word of it before and after. ``later``: it only makes a job, which runs when there is room."""
    note(run_dir, "waiting" if later else "running", job=number, overrides=list(overrides))
    try:
        done = work()
    except Exception as error:
        note(run_dir, "failed", tell(error))
        raise
    except SystemExit:
        note(run_dir, "stopped")
        raise
    if isinstance(done, float):
        note(run_dir, "done")
    return done


def last_loss(run_dir: str) -> float | WorkerError:
    """The last one that a job has logged, or what to say of one that has logged none."""
    loss = measured(Path(run_dir))["loss"]
    return WorkerError("it has left before it had logged a finite loss") if loss is None else loss


def results(folder: Path) -> list[Row]:
    """Of each job, by number: a row with the names in COLUMNS. Overrides that all jobs share are left out."""
    told = {path.parent: json.loads(path.read_text(encoding="utf-8")) for path in folder.rglob(JOB)}
    everywhere = set.intersection(*(set(one["overrides"]) for one in told.values())) if len(told) > 1 else set()
    rows = []
    for run_dir, one in told.items():
        own = " ".join(override for override in one["overrides"] if override not in everywhere)
        reason = (one["reason"].splitlines() or [""])[-1]  # of a traceback, what was raised
        if one["status"] == "running":
            reason = f"last heard of {short_time(time.time() - last_word(run_dir))} ago"
        job = {"job": one["job"], "overrides": own}
        rows.append({**job, **measured(run_dir), "status": one["status"], "reason": reason})
    return sorted(rows, key=lambda row: row["job"])


def last_word(run_dir: Path) -> float:
    """When a job has last logged a step, or noted that it runs: seconds since 1970."""
    return max(path.stat().st_mtime for name in (JOB, "metrics.jsonl") if (path := run_dir / name).exists())


def measured(run_dir: Path) -> Row:
    """The last loss (nats a label token), the best on held-out text, and tokens/s a GPU, the median of logged steps."""
    logs = (whole_lines(run_dir / name) for name in ("metrics.jsonl", "evaluations.jsonl"))
    steps, evaluations = ([json.loads(line) for line in log] for log in logs)
    held_out = [line["eval/loss"] for line in evaluations if line.get("eval/loss") is not None]
    rates = [line["perf/tokens_per_second_per_gpu"] for line in steps]
    return {
        "loss": steps[-1]["train/loss"] if steps else None,
        "best_held_out": min(held_out, default=None),
        "tokens_per_second_per_gpu": statistics.median(rates) if rates else None,
    }


def finish(folder: Path) -> str:
    """Write the table of a sweep into its folder. The same for a terminal, with a line that sums it up."""
    rows = results(folder)
    if not rows:
        return ""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    replace(folder / TABLE, text.getvalue())
    statuses = [row["status"] for row in rows]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
    return f"{in_columns(rows)}\n{len(rows)} jobs: {counts}; {folder / TABLE}"


def in_columns(rows: Sequence[Row]) -> str:
    names = [name for name in COLUMNS if any(row[name] not in (None, "") for row in rows)]
    cells = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.4f}"
    return "-" if value is None else str(value)
