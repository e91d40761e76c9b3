"""What sharding a sequence costs on more GPUs than were measured: docs/scaling.md, a table and a plot.

python benchmarks/scaling.py        # from docs/benchmarks/ring.json, on any machine; writes docs/scaling.md and .png

A pass of a causal ring of R ranks is R even steps. Step j + 1's keys are on the wire under step j, and that costs

    a seconds a step (launches, smaller blocks, waiting) + b x the wire's seconds (attention slows down beside it)
    + what the wire takes longer than the step.

The backward pass computes 2.5 times as much and moves 3 times the bytes: keys and values again, and dK and dV in fp32.
The one-GPU rate of each case is taken as measured. a and b are fitted, by least squares of relative errors, on every
other measured causal case in the order of the report; the rest is what the model is checked against.
"""

import argparse
import importlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# bytes/s and seconds of one exchange between two GPUs. Measured on 4 H100 of one host: the copy engine at 64 MiB and
# more. Not measured: InfiniBand NDR of 400 Gbit/s a GPU, four fifths of which NCCL is taken to reach.
NVLINK, NETWORK = 364e9, 40e9
LATENCY = {NVLINK: 10e-6, NETWORK: 20e-6}
HOST = 8  # GPUs that share NVLink
BACKWARD_WORK, BACKWARD_BYTES = 2.5, 3.0
HEADS, KV_HEADS, DIM = 32, 8, 128
GPUS = (8, 32, 128, 512, 1024, 4096)
TOKENS = tuple(2**20 * 4**i for i in range(4))  # 1M to 64M


class Costs(NamedTuple):
    step: float  # a, seconds
    beside: float  # b, seconds a second of wire


def lost_parts(n: float, ranks: int, kv_heads: float, dim: int, rate: float, heads: float, wire: float) -> np.ndarray:
    """Seconds of a forward and backward pass of n tokens a rank: (alone, steps, wire's, exposed beyond a step).

    ``heads`` and ``kv_heads`` are a rank's; ``rate`` is FLOP/s of the local block, per attended FLOP.
    """
    forward = 4 * dim * heads * (n * ranks) ** 2 / 2 / ranks / rate
    sent = LATENCY[wire] + n * kv_heads * dim * 2 * 2 / wire
    parts = np.zeros(4)
    for work, size in ((1.0, 1.0), (BACKWARD_WORK, BACKWARD_BYTES)):
        seconds = forward * work
        exposed = max(0.0, sent * size - seconds / ranks)
        parts += np.array([seconds, ranks - 1, (ranks - 1) * sent * size, (ranks - 1) * exposed])
    return parts


def efficiency(parts: np.ndarray, costs: Costs) -> float:
    """Of the local block's rate."""
    alone, steps, wire, exposed = parts
    return float(alone / (alone + costs.step * steps + costs.beside * wire + exposed))


def measured(report: dict[str, Any]) -> list[tuple[dict[str, Any], np.ndarray, float]]:
    """(case, its parts, its efficiency) of the causal cases with a one-GPU rate beside them."""
    found = []
    for row in report["cases"]:
        if row["mask"] == "causal" and row.get("one_gpu"):
            rate = row["one_gpu"]["value"] * 1e12
            sizes = row["tokens_a_gpu"], row["gpus"], row["kv_heads"], row["dim"], rate, row["heads"]
            found.append((row, lost_parts(*sizes, NVLINK), row["ours"]["value"] / row["one_gpu"]["value"]))
    return found


def fit(points: list[tuple[dict[str, Any], np.ndarray, float]]) -> Costs:
    """Costs, not negative, from 1 / efficiency, which is linear in them."""
    scale = np.array([parts[0] for _, parts, _ in points])
    matrix = np.array([[parts[1], parts[2]] for _, parts, _ in points]) / scale[:, None]
    lost = np.array([1 / got - 1 - parts[3] / parts[0] for _, parts, got in points])
    weights = np.array([got for *_, got in points])  # an error of 1 / e, times e, is e's relative error
    solved = np.linalg.lstsq(matrix * weights[:, None], lost * weights, rcond=None)[0]
    if solved.min() < 0:  # one of them explains nothing: the other alone
        alone = [
            float(np.dot(column * weights, lost * weights) / np.dot(column * weights, column * weights))
            for column in matrix.T
        ]
        solved = np.array([0.0, max(0.0, alone[1])]) if solved[0] < 0 else np.array([max(0.0, alone[0]), 0.0])
    return Costs(*solved.tolist())


def predicted(tokens: int, gpus: int, ulysses: int, rate: float, costs: Costs) -> float:
    """Of one sequence over ``gpus``: Ulysses inside hosts, the ring over what is left. Ulysses' all-to-all of q, k, v
    and out, and of their gradients, is not hidden."""
    ring, rows = gpus // ulysses, tokens / (gpus // ulysses)
    wire = NVLINK if gpus <= HOST else NETWORK
    heads, kv_heads = HEADS / ulysses, max(KV_HEADS, ulysses) / ulysses
    parts = lost_parts(rows, ring, kv_heads, DIM, rate, heads, wire)
    traded = 2 * (2 * HEADS + 2 * max(KV_HEADS, ulysses)) * DIM * 2 * tokens / gpus * (ulysses - 1) / ulysses
    parts[3] += traded / NVLINK + 8 * LATENCY[NVLINK] if ulysses > 1 else 0.0
    return efficiency(parts, costs)


def best(tokens: int, gpus: int, rate: float, costs: Costs) -> tuple[float, int]:
    """(efficiency, ulysses ranks) of the best mesh for one sequence over all GPUs."""
    return max((predicted(tokens, gpus, u, rate, costs), -u) for u in (1, 2, 4, 8) if gpus % u == 0)


def render(path: Path, into: Path) -> None:
    report = json.loads(path.read_text())
    points = measured(report)
    if len(points) < 4:
        raise ValueError(
            f"{path} has {len(points)} causal cases with a one-GPU rate: 2 to fit and 2 to check are needed"
        )
    costs = fit(points[::2])
    errors = [efficiency(parts, costs) / got - 1 for _, parts, got in points]
    rate = max(row["one_gpu"]["value"] for row, *_ in points) * 1e12
    worst = max(map(abs, errors[1::2]))
    lines = [
        "# What sharding a sequence costs",
        "",
        "Efficiency of causal ring attention, forward and backward: its rate a GPU over the local kernel's. The model",
        f"is explained in benchmarks/scaling.py, which writes this page from {path.name}, measured on",
        f"{report['machine']}.",
        "",
        f"Fitted on {len(points[::2])} of the {len(points)} measured causal cases: {costs.step * 1e6:.0f} us a step",
        f"and pass, and {costs.beside:.2f} s of slower attention a second of wire. On the others, which the fit has",
        f"not seen, it is wrong by at most {worst:.1%}. All cases are of one host: the network's",
        f"{NETWORK / 1e9:.0f} GB/s a GPU are an assumption, and nothing across hosts has been checked.",
        "",
        "| GPUs | tokens a GPU | kv heads | measured | model | error | |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, ((row, parts, got), error) in enumerate(zip(points, errors, strict=True)):
        sizes = f"| {row['gpus']} | {row['tokens_a_gpu']:,} | {row['kv_heads']} | {got:.3f} "
        used = "checked" if number % 2 else "fitted"
        lines.append(f"{sizes}| {efficiency(parts, costs):.3f} | {error:+.1%} | {used} |")
    lines += [
        "",
        f"Predicted for {HEADS} query and {KV_HEADS} kv heads of {DIM}, one sequence over all GPUs of hosts of {HOST},",
        f"at a local rate of {rate / 1e12:.0f} TFLOP/s: the best mesh, as ring x ulysses. Of more GPUs, groups that",
        "read different rows each do the same: their efficiency is that of one group.",
        "",
        "![Predicted efficiency by GPUs](scaling.png)",
        "",
        "| tokens | " + " | ".join(f"{gpus:,} GPUs" for gpus in GPUS) + " |",
        "|---|" + "---|" * len(GPUS),
    ]
    table = {tokens: [best(tokens, gpus, rate, costs) for gpus in GPUS] for tokens in TOKENS}
    for tokens, found in table.items():
        shown = [f"{e:.0%} ({gpus // -u} x {-u})" for (e, u), gpus in zip(found, GPUS, strict=True)]
        lines.append(f"| {tokens // 2**20}M | " + " | ".join(shown) + " |")
    into.with_suffix(".md").write_text("\n".join(lines) + "\n")
    plot(into.with_suffix(".png"), table)


def plot(path: Path, table: dict[int, list[tuple[float, int]]]) -> None:
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        print("matplotlib is not installed: no plot")
        return
    matplotlib.use("agg")
    figure, axis = importlib.import_module("matplotlib.pyplot").subplots(figsize=(8, 5))
    for tokens, found in table.items():
        axis.plot(GPUS, [e for e, _ in found], "o-", label=f"{tokens // 2**20}M tokens")
    axis.set_xscale("log", base=2)
    axis.set_xlabel("GPUs that share one sequence")
    axis.set_ylabel("of the local kernel's rate")
    axis.set_ylim(0, 1)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    docs = Path(__file__).resolve().parent.parent / "docs"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=docs / "benchmarks" / "ring.json")
    parser.add_argument("--into", type=Path, default=docs / "scaling")
    arguments = parser.parse_args()
    render(arguments.report, arguments.into)
