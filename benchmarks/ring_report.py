"""The table and the plots of benchmarks/ring.py, from its reports alone."""

import json
from pathlib import Path
from typing import Any

from report import cells, head, pyplot, versions

SIZES = ("mask", "tokens a GPU", "GPUs", "heads", "dim")


def render(path: Path) -> None:
    report = json.loads(path.read_text())
    rows = report["cases"]
    peers = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    lines = [
        "# Ring attention beside its peers",
        "",
        f"{report['machine']}, {report['dtype']}, {versions(report['versions'])}. TFLOP/s a GPU, forward + backward,",
        "per attended FLOP; in brackets ours over theirs. One GPU: our own kernel, the heads divided by the GPUs, the",
        "same work with nothing sent. Memory is what a pass takes beside its inputs, in GiB a GPU. Imbalance is of",
        "the ring's lock-step work; a token sent is a key and its value that goes to another rank; host is what it",
        "takes to issue a forward and a backward pass. Written, like the plots, by",
        *(f"`python {command}`" for command in report["commands"]),
        "",
        "![TFLOP/s a GPU of every case](ring.png)",
        "",
        head([*SIZES, "ours (forward, backward)", "one GPU", *peers]),
    ]
    for row in rows:
        ours = row["ours"]["value"]
        rates = [row.get("one_gpu"), *(row["peers"].get(name) for name in peers)]
        mine = f"**{ours:.0f}** ({row['ours']['forward']:.0f}, {row['ours']['backward']:.0f})"
        lines.append(cells([*sizes(row), mine, *(over(rate, ours) for rate in rates)]))
    lines += ["", head([*SIZES, "tokens sent", "imbalance", "host ms", "GiB: ours", *peers])]
    for row in rows:
        gib = [row["ours"], *(row["peers"].get(name) for name in peers)]
        host = row["ours"].get("host_ms")
        facts = [str(row["ours"]["sent_tokens"]), f"{row['ours']['imbalance']:.1%}", f"{host:.1f}" if host else "-"]
        lines.append(cells([*sizes(row), *facts, *(f"{one['extra_gib']:.2f}" if one else "-" for one in gib)]))
    if path.with_name("ring_trace.png").exists():
        lines += ["", "## What runs beside what", "", "![Trace of a forward and a backward pass](ring_trace.png)"]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    plot(path.with_suffix(".png"), rows)


def sizes(row: dict[str, Any]) -> list[str]:
    heads = f"{row['heads']}/{row['kv_heads']}"
    return [row["mask"], f"{row['tokens_a_gpu']:,}", str(row["gpus"]), heads, str(row["dim"])]


def over(rate: dict[str, Any] | None, ours: float) -> str:
    return f"{rate['value']:.0f} ({ours / rate['value']:.2f})" if rate else "-"


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    if (plt := pyplot()) is None:
        return
    figure, axis = plt.subplots(figsize=(max(8, len(rows)), 5))
    names = list(dict.fromkeys(name for row in rows for name in ("ours", "one GPU", *row["peers"])))
    for name in names:
        rates = [{"ours": row["ours"], "one GPU": row.get("one_gpu"), **row["peers"]}.get(name) or {} for row in rows]
        style = {"ours": "o-", "one GPU": "k--"}.get(name, ".:")
        axis.plot([rate.get("value", float("nan")) for rate in rates], style, label=name)
    labels = [f"{row['mask']}\n{row['tokens_a_gpu'] // 1024}K\n{row['heads']}/{row['kv_heads']}" for row in rows]
    axis.set_xticks(range(len(rows)), labels, fontsize=7)
    axis.set_ylabel("TFLOP/s a GPU, forward + backward")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


KINDS = {"attention": "tab:blue", "exchange": "tab:red", "other": "tab:gray"}


def kind(name: str) -> str:
    if any(part in name.lower() for part in ("peer", "ptop", "sendrecv", "nccl")):
        return "exchange"
    return "attention" if "forward_kernel" in name or "backward_kernel" in name else "other"


def where_time_goes(events: list[dict[str, Any]]) -> list[str]:
    """Of the second half of a trace: each kernel's count and time, and when no attention ran, or nothing at all."""
    events = sorted(events, key=lambda one: one["start"])
    events = events[len(events) // 2 :]
    if not events:
        return ["the trace is empty"]
    names: dict[str, list[float]] = {}
    for one in events:
        names.setdefault(one["name"][:60], []).append(one["microseconds"])
    lines = [
        f"{sum(times):9.0f} us  {len(times):3} x  {name}"
        for name, times in sorted(names.items(), key=lambda item: -sum(item[1]))
    ]
    span = max(one["start"] + one["microseconds"] for one in events) - events[0]["start"]
    attention = [one for one in events if kind(one["name"]) == "attention"]
    for what, some in (("attention", attention), ("anything", events)):
        lines.append(f"{span - covered(some):9.0f} us of {span:.0f} without {what}")
    return lines


def covered(events: list[dict[str, Any]]) -> float:
    """Microseconds in which at least one of them, sorted by their start, runs."""
    total, until = 0.0, float("-inf")
    for one in events:
        stop = one["start"] + one["microseconds"]
        total += max(0.0, stop - max(until, one["start"]))
        until = max(until, stop)
    return total


def render_trace(path: Path) -> None:
    """A bar for each kernel and copy of rank 0, a row a stream, in the last pass of the trace."""
    if not path.exists() or (plt := pyplot()) is None:
        return
    report = json.loads(path.read_text())
    events = sorted(report["events"], key=lambda one: one["start"])
    events = events[len(events) // 2 :]
    start = events[0]["start"]
    streams = list(dict.fromkeys(one["stream"] for one in events))
    figure, axis = plt.subplots(figsize=(12, 1 + 0.7 * len(streams)))
    for one in events:
        row = streams.index(one["stream"])
        bar = ((one["start"] - start) / 1000, one["microseconds"] / 1000)
        axis.broken_barh([bar], (row - 0.35, 0.7), facecolors=KINDS[kind(one["name"])])
    axis.set_yticks(range(len(streams)), [f"stream {stream}" for stream in streams])
    axis.invert_yaxis()
    axis.set_xlabel("ms")
    case = report["case"]
    axis.set_title(
        f"{case['mask']}, {case['length'] // report['gpus'] // 1024}K tokens a GPU of {report['gpus']}, "
        f"{case['heads']}/{case['kv_heads']} heads: rank 0, forward and backward"
    )
    axis.legend(handles=[plt.Rectangle((0, 0), 1, 1, color=color, label=name) for name, color in KINDS.items()])
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=120)
