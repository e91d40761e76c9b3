"""The pictures of a report: each once as a PNG and once as an SVG whose colours are the page's, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, Formatter, PercentFormatter

from ringspan.train.profile_parts import PARTS
from ringspan.train.report_runs import Run

INK, MUTED, LINE, PAPER, HEAT = "#1f2328", "#59636e", "#d8dee4", "#fefefe", "#2f81f7"
SERIES = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#9a6700", "#0a7d8c", "#6e4a2e")
COLOURS = {  # in a page's style sheet each is a variable
    INK: "ink",
    MUTED: "muted",
    LINE: "line",
    PAPER: "paper",
    HEAT: "heat",
    **{colour: f"series-{i}" for i, colour in enumerate(SERIES)},
}
STYLE: dict[str, Any] = {
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a run may be called $x$
    "axes.labelcolor": MUTED,
    "axes.titlecolor": MUTED,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",  # text stays text: it is read aloud, found and drawn in the page's font
}
WIDE, NARROW = (10.4, 3.6), (5.1, 3.0)  # inches
POINTS = 1200  # of a line: more than a screen has dots
SMOOTHED = 60  # logged steps from which on a line is drawn smoothly too


class Picture(NamedTuple):
    name: str
    title: str
    alt: str
    png: bytes
    svg: str
    wide: bool


def pictures(runs: Sequence[Run]) -> Iterator[Picture]:
    """Of all that there is something to show of."""
    for name, title, draw, size in (
        ("loss", "Loss", loss, WIDE),
        ("throughput", "Throughput", throughput, NARROW),
        ("utilisation", "Utilisation", utilisation, NARROW),
        ("memory", "Memory", memory, NARROW),
        ("memory_parts", "Memory by part", memory_by_part, NARROW),
        ("parts", "Time of a step by part", by_part, WIDE),
        ("position", "Loss by position in the document", by_position, NARROW),
        ("length", "Perplexity by tokens seen at once", by_length, NARROW),
        ("needles", "Needles found", needles, NARROW),
    ):
        with style.context(STYLE, after_reset=True):
            figure = Figure(figsize=size)
            if alt := draw(figure, runs):
                yield Picture(name, title, alt, *written(figure, name), wide=figure.get_figwidth() > NARROW[0])


def written(figure: Figure, name: str) -> tuple[bytes, str]:
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, dpi=160, facecolor="white")
    figure.set_layout_engine("none")  # it stays as it has been laid out
    with style.context({"svg.hashsalt": name}):  # names inside are then the picture's own, and the same each time
        figure.savefig(
            svg, format="svg", facecolor="none", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    return png.getvalue(), for_a_page(svg.getvalue())


def for_a_page(svg: str) -> str:
    """Without a head and a size of its own, and with the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every picture, and an id is one element's
    svg = re.sub(r"font: ([^;\"]*?px) [^;\"]*", r"font: \1 var(--font)", svg)
    svg = svg.replace("xlink:href", "href")
    return re.sub("|".join(COLOURS), lambda found: f"var(--{COLOURS[found[0]]})", svg)


def loss(figure: Figure, runs: Sequence[Run]) -> str:
    axes, said, curves = axes_of(figure, "nats a token"), [], []
    for i, run in enumerate(runs):
        x, y = finite(run.column("tokens"), run.column("train/loss"))
        if not len(x):
            continue
        smooth = len(x) >= SMOOTHED
        if smooth:
            axes.plot(*thinned(x, y), color=colour(i), linewidth=0.7, alpha=0.35)
        curves.append(smoothed(y) if smooth else y)
        axes.plot(*thinned(x, curves[-1]), color=colour(i), linestyle=dashes(i), label=run.label)
        said.append(f"{run.label}: from {y[0]:.3f} to {y[-1]:.3f}")
        held = run.evaluated("eval/loss")
        if held:
            line = {"marker": "o", "markersize": 4, "markerfacecolor": PAPER, "linewidth": 1.0, "linestyle": ":"}
            axes.plot(*zip(*held, strict=True), color=colour(i), label=f"{run.label}, held out", **line)
            said.append(f"held out: from {held[0][1]:.3f} to {held[-1][1]:.3f}")
    crop(axes, curves)
    known = {run.facts.get("unigram_entropy") for run in runs} - {None}
    if said and len(known) == 1:
        axes.axhline(known.pop(), color=MUTED, linewidth=0.8, linestyle=(0, (1, 3)), label="token frequencies alone")
    return finished(figure, said, "Training loss in nats a token, against tokens. ")


def crop(axes: Any, curves: Sequence[np.ndarray]) -> None:
    """Leave the first twentieth of long runs above the picture: it would make the rest flat."""
    if not curves or min(map(len, curves)) < SMOOTHED:
        return
    low, high = min(y.min() for y in curves), max(y[len(y) // 20 :].max() for y in curves)
    top = high + 0.1 * (high - low)
    if top < max(y.max() for y in curves):
        axes.set_ylim(low - 0.1 * (high - low), top)
        axes.set_title("nats a token; the first steps are above")


def throughput(figure: Figure, runs: Sequence[Run]) -> str:
    return over_tokens(figure, runs, "perf/tokens_per_second_per_gpu", "tokens/s a GPU", EngFormatter(sep=""))


def utilisation(figure: Figure, runs: Sequence[Run]) -> str:
    return over_tokens(figure, runs, "perf/mfu", "of the chip's dense bf16 peak", PercentFormatter(1.0))


def over_tokens(figure: Figure, runs: Sequence[Run], name: str, unit: str, ticks: Formatter) -> str:
    axes, said = axes_of(figure, unit), []
    axes.yaxis.set_major_formatter(ticks)
    for i, run in enumerate(runs):
        x, y = finite(run.column("tokens"), run.column(name))
        if len(x):
            axes.plot(*thinned(x, y), color=colour(i), linestyle=dashes(i), label=run.label)
            said.append(f"{run.label}: median {ticks(float(np.median(y)))}")
    axes.set_ylim(bottom=0)
    return finished(figure, said, f"{unit}, against tokens. ", legend=len(runs) > 1)


def memory(figure: Figure, runs: Sequence[Run]) -> str:
    axes, said = axes_of(figure, "GiB at most so far, on one rank"), []
    reserved = False
    for i, run in enumerate(runs):
        kinds = {"allocated": dashes(i), "reserved": (0, (2, 2))}
        found = {kind: finite(run.column("tokens"), run.column(f"memory/peak_{kind}_gib")) for kind in kinds}
        same = np.array_equal(found["allocated"][1], found["reserved"][1])  # so it is on a CPU
        for kind, (x, y) in found.items():
            if len(x) and not (same and kind == "reserved"):
                label = run.label if kind == "allocated" else ""
                axes.plot(*thinned(x, y), color=colour(i), linestyle=kinds[kind], label=label)
                said.append(f"{run.label}{'' if same else ', ' + kind}: {y[-1]:.2f} GiB")
                reserved |= kind == "reserved"
    if reserved:
        axes.set_title("GiB at most so far, on one rank; dashed: reserved by the allocator")
    axes.set_ylim(bottom=0)
    return finished(figure, said, "Peak memory in GiB, against tokens. ", legend=len(runs) > 1)


def memory_by_part(figure: Figure, runs: Sequence[Run]) -> str:
    """A picture a run, all to one scale; not stacked, as the parts are at their most at different moments."""
    logged = dict.fromkeys(name for run in runs for line in run.metrics[-1:] for name in line)
    names = [name for name in logged if name.startswith("memory/") and "peak" not in name]
    points = {(i, name): finite(run.column("tokens"), run.column(name)) for i, run in enumerate(runs) for name in names}
    names = [name for name in names if any(points[i, name][1].any() for i in range(len(runs)))]
    if not names:
        return ""
    columns, rows, said = min(2, len(runs)), -(-len(runs) // 2), []
    figure.set_size_inches(NARROW[0] * columns, NARROW[1] * rows)
    for i, run in enumerate(runs):
        title = f"{run.label}: " * (len(runs) > 1) + "GiB on rank 0"
        axes = axes_of(figure, title, place=(rows, columns, i + 1))
        axes.set_ylim(0, 1.05 * max(points[key][1].max(initial=0) for key in points))
        for number, name in enumerate(names):
            (x, y), part = points[i, name], name.removeprefix("memory/").removesuffix("_gib")
            axes.plot(*thinned(x, y), color=colour(number), label=part)
            said += [f"{run.label}, {part}: {y[-1]:.2f} GiB"] if len(y) else []
    return finished(figure, said, "Memory in GiB by part, against tokens. ")


def by_part(figure: Figure, runs: Sequence[Run]) -> str:
    bars = [(f"{run.label}, step {one['step']:,}", one) for run in runs for one in run.profiles]
    if not bars:
        return ""
    figure.set_size_inches(WIDE[0], 1.0 + 0.42 * len(bars))
    axes, said = axes_of(figure, "seconds", x="", grid="x"), []
    names = [name for name in PARTS if any(one["parts"].get(name) for _, one in bars)]
    for row, (label, one) in enumerate(bars):
        left = 0.0
        for name in names:
            seconds = one["parts"].get(name, 0.0)
            axes.barh(
                row, seconds, left=left, height=0.62, color=part_colour(name), label=PARTS[name] if not row else ""
            )
            if seconds > 0.055 * max(other["seconds"] for _, other in bars):
                text = f"{seconds / one['seconds']:.0%}"
                axes.text(
                    left + seconds / 2,
                    row,
                    text,
                    ha="center",
                    va="center",
                    color=INK if name == "other" else PAPER,
                    fontsize=8.5,
                )
            left += seconds
        shares = ", ".join(f"{PARTS[name]} {one['parts'].get(name, 0.0) / one['seconds']:.1%}" for name in names)
        said.append(f"{label}: {one['seconds']:.3f} s, of which {shares}")
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], color=INK)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    return finished(figure, said, "", columns=len(names))


def by_position(figure: Figure, runs: Sequence[Run]) -> str:
    curves = [(run, [(start + 1, loss) for start, loss in run.last("loss_by_position") or []]) for run in runs]
    return on_a_logarithm(figure, curves, "nats a token", "position in the document, from 1 on")


def by_length(figure: Figure, runs: Sequence[Run]) -> str:
    found = [(run, run.last("loss_by_length") or {}) for run in runs]
    curves = [(run, [(int(length), np.exp(loss)) for length, loss in one.items()]) for run, one in found]
    return on_a_logarithm(figure, curves, "perplexity of the same text", "tokens seen at once")


def on_a_logarithm(
    figure: Figure, curves: Sequence[tuple[Run, list[tuple[int, float]]]], unit: str, x_name: str
) -> str:
    """The newest evaluation of each run that has more than one point."""
    axes, said = axes_of(figure, unit, x=x_name), []
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(EngFormatter(sep="", places=0))
    for i, (run, points) in enumerate(curves):
        if len(points) > 1:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=colour(i), linestyle=dashes(i), marker="o", markersize=3, label=run.label)
            said.append(f"{run.label}: from {y[0]:.3f} at {x[0]:,} to {y[-1]:.3f} at {x[-1]:,}")
    return finished(figure, said, f"{unit}, by {x_name}. ", legend=len(curves) > 1)


def needles(figure: Figure, runs: Sequence[Run]) -> str:
    maps = [(run, found) for run in runs if (found := run.last("needles_by_depth"))]
    if not maps:
        return ""
    columns = min(2, len(maps))
    rows, most = -(-len(maps) // columns), max(len(found) for _, found in maps)
    figure.set_size_inches(NARROW[0] * columns, (0.9 + 0.36 * most) * rows)
    said = []
    for place, (run, found) in enumerate(maps, start=1):
        axes = figure.add_subplot(rows, columns, place)
        needle_map(axes, list(found), list(found.values()))
        axes.set_title(f"{run.label}: " * (len(maps) > 1) + "length of the document, tokens")
        shares = ", ".join(f"{np.mean(found[length]):.0%} at {int(length):,}" for length in found)
        said.append(f"{run.label}: {shares} tokens")
    return "Share of needles found, over all depths. " + "; ".join(said) + "."


def needle_map(axes: Any, lengths: Sequence[str], table: Sequence[Sequence[float]]) -> None:
    """A row a length, a column a depth; a share is written, and is the strength of the colour behind it."""
    n = len(table[0])
    for y, shares in enumerate(table):
        for x, share in enumerate(shares):
            axes.add_patch(
                Rectangle((x - 0.48, y - 0.47), 0.96, 0.94, color=HEAT, alpha=0.06 + 0.64 * share, linewidth=0)
            )
            axes.text(x, y, f"{share:.0%}", ha="center", va="center", fontsize=8.5, color=INK)
    axes.set_xlim(-0.5, n - 0.5)
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.set_yticks(range(len(lengths)), [f"{int(length):,}" for length in lengths])
    axes.set_xticks(range(n), [f"{(depth + 0.5) / n:.0%}" for depth in range(n)])
    axes.set_xlabel("depth of the needle, from the front")
    axes.grid(False)
    axes.spines[:].set_visible(False)


def axes_of(
    figure: Figure, unit: str, x: str = "tokens", grid: str = "y", place: tuple[int, int, int] = (1, 1, 1)
) -> Any:
    axes: Any = figure.add_subplot(*place)
    axes.grid(axis=grid)
    if x == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if grid == "x":
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(unit)
    else:
        axes.set_title(unit)
        axes.set_xlabel(x)
    axes.margins(x=0.01)
    return axes


def finished(figure: Figure, said: Sequence[str], what: str, *, legend: bool = True, columns: int = 4) -> str:
    """The picture in words; "" where there is nothing to see in it."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if legend and handles:
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, fontsize=8.5, handlelength=1.4)
    return what[:1].upper() + what[1:] + "; ".join(said) + "." if said else ""


def colour(i: int) -> str:
    return SERIES[i % len(SERIES)]


def dashes(i: int) -> Any:
    return ("-", (0, (5, 2)), (0, (1, 1)))[i // len(SERIES) % 3]


def part_colour(name: str) -> str:
    return {"idle": MUTED, "other": LINE}.get(name) or SERIES[list(PARTS).index(name)]


def finite(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The points that have both."""
    xs, ys = np.array(x, dtype=float), np.array(y, dtype=float)
    there = np.isfinite(xs) & np.isfinite(ys)
    return xs[there], ys[there]


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS of them: means of as many as it takes."""
    size = -(-len(x) // POINTS)
    if size <= 1:
        return x, y
    starts = np.arange(0, len(x), size)
    counts = np.diff([*starts, len(x)])
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def smoothed(y: np.ndarray) -> np.ndarray:
    """Of each point the mean of it and of those before, a thirtieth of all."""
    size = max(1, len(y) // 30)
    sums = np.concatenate([[0.0], np.cumsum(y)])
    after = np.arange(1, len(y) + 1)
    before = np.maximum(0, after - size)
    return (sums[after] - sums[before]) / (after - before)
