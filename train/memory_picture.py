"""What held a GPU's memory when: the CUDA allocator's history of a step as a picture, by the code that asked for it."""

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ringspan.train.metrics import GIB

ROOT = Path(__file__).resolve().parents[1]
BEFORE = "there before"
BANDS = 8  # of a picture, the last of them for all others
COLUMNS = 540  # of a picture: of all that happens within one, the moment that holds most is drawn


class History(NamedTuple):
    seconds: list[float]  # since the first event, ascending
    held: list[Counter[str]]  # bytes by owner, at each


def draw(snapshot: dict[str, Any], device: int, title: str, file: Path) -> None:
    """``torch.cuda.memory._snapshot()`` as an SVG, unless no time passes in its history. OSError: the disk's."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - takes a second, and few runs are profiled

    found = history(snapshot, device)
    if len(found.seconds) < 2:
        return
    peak = max(found.held, key=Counter.total)
    named = [BEFORE, *[name for name, _ in peak.most_common() if name != BEFORE][: BANDS - 2]]
    bands = {f"{name}, {peak[name] / GIB:.2f}": [held[name] / GIB for held in found.held] for name in named}
    others = [(held.total() - sum(held[name] for name in named)) / GIB for held in found.held]
    if any(others):
        bands[f"others, {others[found.held.index(peak)]:.2f}"] = others
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.stackplot(found.seconds, *bands.values(), labels=bands, linewidth=0)
    axes.set(title=f"{title}: {peak.total() / GIB:.2f} GiB at most", xlabel="seconds", ylabel="GiB", ylim=0)
    axes.margins(x=0)
    figure.legend(*[x[::-1] for x in axes.get_legend_handles_labels()], loc="outside right upper", frameon=False)
    figure.savefig(file, format="svg")


def history(snapshot: dict[str, Any], device: int) -> History:
    """Bytes by owner over the time that ``snapshot`` remembers, at most COLUMNS moments of it."""
    events = [one for one in snapshot["device_traces"][device] if one["action"] in ("alloc", "free_requested")]
    if not events:
        return History([], [])
    held, owner = Counter({BEFORE: _held_at_the_start(snapshot, device, events)}), dict[int, str]()
    start, end = events[0]["time_us"], events[-1]["time_us"]
    columns: dict[int, tuple[float, Counter[str]]] = {0: (0.0, held.copy())}
    for one in events:
        if one["action"] == "alloc":
            owner[one["addr"]] = owner_of(one.get("frames", ()))
            held[owner[one["addr"]]] += one["size"]
        else:
            held[owner.pop(one["addr"], BEFORE)] -= one["size"]
        column = (one["time_us"] - start) * COLUMNS // max(1, end - start)
        if column not in columns or held.total() > columns[column][1].total():
            columns[column] = (one["time_us"] - start) * 1e-6, held.copy()
    moments = sorted(columns.values(), key=lambda moment: moment[0])
    return History([seconds for seconds, _ in moments], [found for _, found in moments])


def _held_at_the_start(snapshot: dict[str, Any], device: int, events: Sequence[dict[str, Any]]) -> int:
    """What is held at the end, less what has come since. History may begin late: it remembers so many events."""
    blocks = (block for one in snapshot["segments"] if one["device"] == device for block in one["blocks"])
    at_the_end = sum(block["requested_size"] for block in blocks if block["state"] == "active_allocated")
    return at_the_end - sum(one["size"] if one["action"] == "alloc" else -one["size"] for one in events)


def owner_of(frames: Sequence[dict[str, Any]]) -> str:
    """The innermost of our files, else the innermost package. ``frames``: innermost first."""
    places = [_place(frame["filename"]) for frame in frames]
    found = (name for names in zip(*places, strict=True) for name in names if name)
    return next(found, "torch")  # what runs without Python, as most of a backward pass does


@functools.cache
def _place(filename: str) -> tuple[str | None, str | None]:
    """(the file if it is ours, its package): a step has millions of frames, of few files."""
    file = Path(filename)
    whole = file.resolve() if file.is_absolute() else file
    own = whole.is_relative_to(ROOT) and "site-packages" not in whole.relative_to(ROOT).parts  # as in ROOT/.venv
    if own:
        return str(whole.relative_to(ROOT)), None
    return None, file.parts[file.parts.index("site-packages") + 1] if "site-packages" in file.parts else None
