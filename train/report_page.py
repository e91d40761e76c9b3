"""A report's page: headings, tables and pictures, in one file of HTML without a script."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

from ringspan.train.profile_parts import PARTS
from ringspan.train.report_figures import Picture
from ringspan.train.report_runs import Run, differences, flat
from ringspan.train.report_style import CSS

NOTHING = "&ndash;"
NAME = 72  # characters of a kernel's name


class Number(NamedTuple):
    """A column of the table of runs, and a number on top of the page of one."""

    name: str
    of: Callable[[Run], float | None]
    format: str  # as for `format`; h:mm:ss of seconds
    unit: str = ""
    best: Callable[[list[float]], float] | None = None  # which of several runs' is printed bold


def of_last(name: str) -> Callable[[Run], float | None]:
    return lambda run: next((value for value in reversed(run.column(name)) if math.isfinite(value)), None)


def of_typical(name: str) -> Callable[[Run], float | None]:
    return lambda run: run.typical(name)


def of_lowest(name: str) -> Callable[[Run], float | None]:
    return lambda run: min((value for _, value in run.evaluated(name)), default=None)


def of_most(name: str) -> Callable[[Run], float | None]:
    return lambda run: max((value for value in run.column(name) if math.isfinite(value)), default=None)


def of_share(name: str) -> Callable[[Run], float | None]:
    return lambda run: run.seconds(name) / total if (total := run.seconds()) else None


NUMBERS = (
    Number("steps", of_last("step"), ",.0f"),
    Number("tokens", of_last("tokens"), ",.0f"),
    Number("training loss", of_last("train/loss"), ".4f", "nats a token", min),
    Number("held-out loss", of_lowest("eval/loss"), ".4f", "nats a token, lowest", min),
    Number("bits a byte", of_lowest("eval/bits_per_byte"), ".4f", "lowest", min),
    Number("throughput", of_typical("perf/tokens_per_second_per_gpu"), ",.0f", "tokens/s a GPU", max),
    Number("utilisation", of_typical("perf/mfu"), ".1%", "", max),
    Number("step", of_typical("perf/step_seconds"), ",.3f", "s"),
    Number("waiting for data", of_share("perf/data_seconds"), ".2%", "of a step"),
    Number("exposed communication", of_share("perf/exposed_comm_seconds"), ".2%", "of a step"),
    Number("peak memory", of_most("memory/peak_reserved_gib"), ",.2f", "GiB", min),
    Number("training time", lambda run: run.seconds() if run.metrics else None, "h:mm:ss", "h:mm:ss"),
    Number("skipped steps", lambda run: of_last("train/skipped")(run) or None, ",.0f"),
)


def page(runs: Sequence[Run], drawn: Sequence[Picture]) -> str:
    several = len(runs) > 1
    title = f"{len(runs)} runs" if several else runs[0].label
    said = (introduction(run, f"<b>{escape(run.label)}</b> " if several else "") for run in runs)
    body = [
        f"<header><p>Ringspan report</p><h1>{escape(title)}</h1>{''.join(said)}</header>",
        tiles(runs[0]) if not several else section("Runs", compared(runs)),
        f'<div class="pictures">{"".join(map(figure, (one for one in drawn if one.name != "parts")))}</div>',
        section("Time of a step by part", profiles(runs, drawn)),
        section("What is different", different(runs)) if several else "",
        *(everything(run) for run in runs),
        missing(runs),
        f"<footer>Made {time.strftime('%Y-%m-%d %H:%M')} from files alone.</footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>'
        f'{escape(title)} | Ringspan</title><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><style>{CSS}</style></head>\n<body><main>'
        + "\n".join(one for one in body if one)
        + "</main></body></html>\n"
    )


def section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def introduction(run: Run, name: str) -> str:
    """One line of what it is and how far it has come, after its name."""
    facts, mesh = run.facts, run.facts.get("mesh", {})
    parameters = facts.get("model", {}).get("parameters")
    said = [
        in_short(parameters) + " parameters" if parameters else "",
        " · ".join(f"{name} {n}" for name, n in mesh.items() if n > 1) or ("one process" if mesh else ""),
        facts.get("engine", {}).get("device", ""),
        run.status,
    ]
    return f"<p>{name}{escape(' · '.join(one for one in said if one))}</p>"


def in_short(n: int) -> str:
    return f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.1f}M"


def shown(number: Number, run: Run) -> str:
    value = number.of(run)
    if value is None:
        return NOTHING
    minutes, seconds = divmod(round(value), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if number.format == "h:mm:ss" else f"{value:{number.format}}"
    )


def told(runs: Sequence[Run]) -> list[Number]:
    """The numbers that some run has."""
    return [one for one in NUMBERS if any(one.of(run) is not None for run in runs)]


def tiles(run: Run) -> str:
    each = (
        f"<div><dt>{escape(one.name)}</dt><dd>{shown(one, run)} <small>{escape(one.unit)}</small></dd></div>"
        for one in told([run])
    )
    return f"<dl>{''.join(each)}</dl>" if run.metrics else ""


def compared(runs: Sequence[Run]) -> str:
    """A run a row; the best of a column is bold."""
    numbers = told(runs)
    best = {one.name: bests(one, runs) for one in numbers}
    rows = [
        [escape(run.label), *(marked(shown(one, run), one.of(run) in best[one.name]) for one in numbers)]
        for run in runs
    ]
    heads = ["run", *(f"{escape(one.name)}<small>{escape(one.unit)}</small>" for one in numbers)]
    return table("The runs in numbers; the best is bold", heads, rows)


def bests(number: Number, runs: Sequence[Run]) -> list[float]:
    values = [value for run in runs if (value := number.of(run)) is not None]
    return [number.best(values)] if number.best and len(set(values)) > 1 else []


def marked(text: str, best: bool) -> str:
    return f"<b>{text}</b>" if best else text


def figure(picture: Picture) -> str:
    kind = ' class="wide"' if picture.wide else ""
    caption = f"<figcaption>{escape(picture.title)}</figcaption>" if picture.name != "parts" else ""  # it has a section
    label = escape(f"{picture.title}. {picture.alt}", quote=True)
    return (
        f'<figure{kind} id="{picture.name}">{caption}<div role="img" aria-label="{label}">{picture.svg}</div></figure>'
    )


def profiles(runs: Sequence[Run], drawn: Sequence[Picture]) -> str:
    """The picture, and a table of all profiled steps: a part a row."""
    found = [(f"{run.label}, step {one['step']:,}", one) for run in runs for one in run.profiles]
    if not found:
        return ""
    heads = ["part", *("<small>s, mean</small>", "<small>share</small>", "<small>s, slowest rank</small>") * len(found)]
    groups = [(escape(name), 3) for name, _ in found]
    rows = [
        [label, *cells_of(name, found)] for name, label in PARTS.items() if any(name in x["parts"] for _, x in found)
    ]
    sums = [["<b>step</b>", *(cell for _, one in found for cell in (f"{one['seconds']:.4f}", "", ""))]]
    picture = "".join(figure(one) for one in drawn if one.name == "parts")
    note = (
        "<p>Measured with the profiler, which makes a step take longer; a step without it is in the numbers above.</p>"
    )
    parts = table("Seconds of each part of a step", heads, rows + sums, groups=groups)
    return picture + parts + note + "".join(kernels(label, one) for label, one in found if one.get("kernels"))


def kernels(label: str, profile: dict[str, Any]) -> str:
    """A table of those that took longest. Several run at once, so that they may take more than the step together."""
    kind = "operators" if profile["device"] == "cpu" else "kernels"
    heads = [f"longest {kind}<small>{escape(label)}, rank 0</small>", "part", "<small>s</small>", "calls"]
    rows = [
        [escape(shortened(one["name"])), PARTS[one["part"]], f"{one['seconds']:.4f}", f"{one['calls']:,}"]
        for one in profile["kernels"]
    ]
    return table(f"The {kind} of {label} that took longest", heads, rows)


def shortened(name: str) -> str:
    """A template's name says all of its arguments."""
    return name if len(name) <= NAME else f"{name[: NAME - 3]}..."


def cells_of(part: str, found: Sequence[tuple[str, dict[str, Any]]]) -> Iterable[str]:
    for _, one in found:
        seconds = one["parts"].get(part)
        most = max((rank["parts"].get(part, 0.0) for rank in one.get("ranks", [])), default=0.0)
        if seconds is None:
            yield from (NOTHING, NOTHING, NOTHING)
        else:
            yield from (f"{seconds:.4f}", f"{seconds / one['seconds']:.1%}", f"{most:.4f}")


def different(runs: Sequence[Run]) -> str:
    rows = [
        [escape(name), *(NOTHING if value is None else escape(value) for value in values)]
        for name, values in differences(runs)
    ]
    if not rows:
        return "<p>Nothing: their configurations, versions and machines are the same.</p>"
    return table("What is not the same in all runs", ["", *(escape(run.label) for run in runs)], rows, numbers=False)


def everything(run: Run) -> str:
    rows = [[escape(name.removeprefix("config.")), escape(value)] for name, value in flat(run.facts).items()]
    inside = table(f"All that {run.label} has written down of itself", ["", "value"], rows, numbers=False)
    return f"<details><summary>All settings of {escape(run.label)}</summary>{inside}</details>"


def missing(runs: Sequence[Run]) -> str:
    """What a picture is missing for, and how a run gets it."""
    hints = (
        (lambda run: run.metrics, "no step has been logged yet"),
        (
            lambda run: run.evaluations,
            "not evaluated: data.held_out=0.02 evaluation.every=100 measures text it has not seen",
        ),
        (lambda run: run.profiles, "not profiled: profile=[5,6] tells the time of these steps by part"),
        (lambda run: not run.metrics or run.typical("perf/mfu") is not None, "utilisation is not known on this device"),
    )
    rows = [
        f"<li>{escape(', '.join(run.label for run in without))}: {escape(hint)}</li>"
        for has, hint in hints
        if (without := [run for run in runs if not has(run)])
    ]
    lost = [(run, sum(math.isnan(value) for value in run.column("train/loss"))) for run in runs]
    rows += [
        f"<li>{escape(run.label)}: {n:,} logged losses were not finite and are left out</li>" for run, n in lost if n
    ]
    return section("What is not here", f"<ul>{''.join(rows)}</ul>") if rows else ""


def table(
    caption: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: bool = True,
    groups: Sequence[tuple[str, int]] = (),
) -> str:
    """Cells are HTML; the first of a row names it. Numbers stand right, below each other. ``groups``: (name, columns)
    of the heads but the first."""
    top = "".join(f'<th scope="col">{one}</th>' for one in heads)
    if groups:
        over = "".join(f'<th scope="colgroup" colspan="{n}">{name}</th>' for name, n in groups)
        top = f"<td></td>{over}</tr><tr>{top}"
    body = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>' for name, *cells in rows
    )
    kind = ' class="numbers"' if numbers else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption, quote=True)}"><table{kind}>'
        f"<caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )
