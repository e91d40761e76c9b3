"""A report of runs: one HTML page that needs nothing else, and its pictures as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ringspan.train.files import replace
from ringspan.train.report_figures import pictures
from ringspan.train.report_page import page
from ringspan.train.report_runs import read_runs


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Of the runs in ``folders``, into ``out``: index.html, which is returned, and a PNG for each picture in it.

    ValueError: a folder without a run, or a file of it that is broken. OSError: ``out`` cannot be written.
    """
    runs = read_runs(folders)
    drawn = list(pictures(runs))
    out.mkdir(parents=True, exist_ok=True)
    for picture in drawn:
        (out / f"{picture.name}.png").write_bytes(picture.png)
    replace(out / "index.html", page(runs, drawn))
    return out / "index.html"
