"""What sharding a sequence costs on more GPUs than were measured: docs/scaling.md, a table and a plot.

python benchmarks/scaling.py        # from docs/benchmarks/ring.json, on any machine; writes docs/scaling.md and .png

A pass of a causal ring of R ranks is R even steps. Step j + 1's keys are on the wire under step j, and that costs,
beside the local kernel's own time,

    a seconds for each step after the first, and b for each pass (launches, smaller blocks, waiting)
    + c x the wire's seconds (attention slows down beside it)
    + d x the seconds of the memory for what a ring writes and reads in fp32: partial results, gradients on their way
    + what the wire takes longer than a step.

The backward pass computes 2.5 times as much and moves 3 times the bytes: keys and values again, and dK and dV in fp32.
The one-GPU rates of each case are taken as measured. a to d are fitted, by least squares of relative errors of forward
and backward passes, none of them negative, on every other measured causal case in the order of the report; the rest is
what the model is checked against. On rings of one size a and b cannot be told apart: then b is left out.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from report import cells, head, pyplot

# bytes/s and seconds of one exchange between two GPUs. Measured on 4 H100 of one host: the copy engine at 64 MiB and
# more. Not measured: InfiniBand NDR of 400 Gbit/s a GPU, four fifths of which NCCL is taken to reach.
NVLINK, NETWORK = 364e9, 40e9
LATENCY = {NVLINK: 10e-6, NETWORK: 20e-6}
MEMORY = 3.0e12  # bytes/s of an H100's, read and written: a copy, measured
HOST = 8  # GPUs that share NVLink
PASSES = ((1.0, 1.0), (2.5, 3.0))  # forward, backward: FLOPs and bytes sent, in those of the forward pass
HEADS, KV_HEADS, DIM = 32, 8, 128
GPUS = (8, 32, 128, 512, 1024, 4096)
TOKENS = tuple(2**20 * 4**i for i in range(4))  # 1M to 64M
LEAST_TOKENS = 8192  # a GPU, of the cases that the model is about: below, there is all-gather attention
TILE = 128


class Costs(NamedTuple):
    step: float  # a, seconds
    call: float  # b, seconds
    wire: float  # c, seconds a second of wire
    traffic: float  # d, seconds a second of memory


Point = tuple[dict[str, Any], np.ndarray, np.ndarray]  # case, parts and efficiency of each pass


def lost_parts(
    n: float, ranks: int, kv_heads: float, dim: int, rates: tuple[float, float], heads: float, wire: float
) -> np.ndarray:
    """(2 passes, 6): seconds alone; steps, calls, seconds of wire and of memory; seconds exposed beyond steps.

    Of n tokens a rank; ``heads`` and ``kv_heads`` are a rank's; ``rates`` are FLOP/s of the local block, forward and
    backward, per attended FLOP.
    """
    forward = 4 * dim * heads * (n * ranks) ** 2 / 2 / ranks
    sent = LATENCY[wire] + n * kv_heads * dim * 2 * 2 / wire
    hops = ranks - 1
    # Partial results are written and read between steps; gradients are written, sent, received and read, those of the
    # rank's own keys are written and read, all in fp32.
    partial, gradients = n * heads * dim * 4, 2 * n * kv_heads * dim * 4
    memory = (2 * hops * partial / MEMORY, (4 * hops + 2 * min(1, hops)) * gradients / MEMORY)
    parts = []
    for (work, size), rate, traffic in zip(PASSES, rates, memory, strict=True):
        seconds = forward * work / rate
        exposed = max(0.0, sent * size - seconds / ranks)
        parts.append([seconds, hops, min(1, hops), hops * sent * size, traffic, hops * exposed])
    return np.array(parts)


def efficiency(parts: np.ndarray, costs: Costs) -> float:
    """Of the local block's rate, over the passes in ``parts``."""
    alone, *terms, exposed = np.atleast_2d(parts).sum(axis=0)
    return float(alone / (alone + np.dot(terms, costs) + exposed))


def measured(report: dict[str, Any]) -> list[Point]:
    """The causal cases with a one-GPU rate beside them."""
    found = []
    for row in report["cases"]:
        if row["mask"] == "causal" and row.get("one_gpu") and row["tokens_a_gpu"] >= LEAST_TOKENS:
            ours, alone = (np.array([one["forward"], one["backward"]]) for one in (row["ours"], row["one_gpu"]))
            sizes = row["tokens_a_gpu"], row["gpus"], row["kv_heads"], row["dim"], tuple(alone * 1e12), row["heads"]
            found.append((row, lost_parts(*sizes, NVLINK), ours / alone))
    return found


def fit(points: list[Point]) -> Costs:
    """Costs, not negative, from 1 / efficiency, which is linear in them: the fewest that explain it as well."""
    parts, got = np.concatenate([parts for _, parts, _ in points]), np.concatenate([got for *_, got in points])
    matrix = parts[:, 1:5] / parts[:, :1] * got[:, None]  # an error of 1 / e, times e, is e's relative error
    lost = (1 / got - 1 - parts[:, 5] / parts[:, 0]) * got
    best, least = np.zeros(4), float(lost @ lost)
    for size in range(1, 1 + min(4, len(got) // 2)):
        for some in itertools.combinations(range(4), size):
            solved, _, rank, _ = np.linalg.lstsq(matrix[:, some], lost, rcond=1e-9)
            error = float(((matrix[:, some] @ solved - lost) ** 2).sum())
            if rank == size and solved.min() >= 0 and error < 0.99 * least - 1e-15:
                best, least = np.zeros(4), error
                best[list(some)] = solved
    return Costs(*best.tolist())


def suggestions(report: dict[str, Any]) -> list[str]:
    """What a report makes of the constants that the product picks layouts and strategies by."""
    points = measured(report)
    if len(points) < 2:
        return [f"{len(points)} causal cases of {LEAST_TOKENS} tokens a GPU and more: too few for constants"]
    costs = fit(points)
    rate = 3.5 / sum(work / rate for (work, _), rate in zip(PASSES, best_rates(points), strict=True))
    tile_seconds = 3.5 * 4 * TILE**2 * DIM * HEADS / rate
    keys_seconds = sum(size for _, size in PASSES) * TILE * KV_HEADS * DIM * 2 * 2 / NVLINK
    lines = [
        f"HOP_SECONDS of parallel/attention.py: {costs.step + costs.call:.1e} s a hop and pass",
        f"WIRE of parallel/balance.py: {costs.wire * keys_seconds / tile_seconds:.2f} tiles a tile of keys on the wire "
        f"({KV_HEADS} of {HEADS} heads)",
    ]
    for row in report["cases"]:
        if other := row["peers"].get("ours, all-gather"):
            mib = row["tokens_a_gpu"] * row["kv_heads"] * row["dim"] * 4 / 2**20
            faster = "ring" if row["ours"]["value"] > other["value"] else "all-gather"
            rates = f"ring {row['ours']['value']:.0f}, all-gather {other['value']:.0f} TFLOP/s"
            lines.append(f"shards of {mib:.0f} MiB of keys and values on {row['gpus']} GPUs: {rates}: {faster}")
    return lines


def best_rates(points: list[Point]) -> tuple[float, float]:
    """FLOP/s of the local kernel, forward and backward, in the case where it is fastest."""
    alone = max((row["one_gpu"] for row, *_ in points), key=lambda one: one["value"])
    return alone["forward"] * 1e12, alone["backward"] * 1e12


def predicted(tokens: int, gpus: int, ulysses: int, rates: tuple[float, float], costs: Costs) -> float:
    """Of one sequence over ``gpus``: Ulysses inside hosts, the ring over what is left. Ulysses' all-to-all of q, k, v
    and out, and of their gradients, is not hidden."""
    ring, rows = gpus // ulysses, tokens / (gpus // ulysses)
    wire = NVLINK if gpus <= HOST else NETWORK
    heads, kv_heads = HEADS / ulysses, max(KV_HEADS, ulysses) / ulysses
    parts = lost_parts(rows, ring, kv_heads, DIM, rates, heads, wire)
    traded = 2 * (2 * HEADS + 2 * max(KV_HEADS, ulysses)) * DIM * 2 * tokens / gpus * (ulysses - 1) / ulysses
    parts[:, 5] += (traded / NVLINK + 8 * LATENCY[NVLINK]) / 2 if ulysses > 1 else 0.0  # half in each pass
    return efficiency(parts, costs)


def best(tokens: int, gpus: int, rates: tuple[float, float], costs: Costs) -> tuple[float, int]:
    """(efficiency, ulysses ranks) of the best mesh for one sequence over all GPUs."""
    return max((predicted(tokens, gpus, u, rates, costs), -u) for u in (1, 2, 4, 8) if gpus % u == 0)


def render(path: Path, into: Path) -> None:
    report = json.loads(path.read_text())
    points = measured(report)
    if len(points) < 4:
        raise ValueError(
            f"{path} has {len(points)} causal cases with a one-GPU rate: 2 to fit and 2 to check are needed"
        )
    costs = fit(points[::2])
    found = [combined(row) for row, *_ in points]
    errors = [efficiency(parts, costs) / got - 1 for (_, parts, _), got in zip(points, found, strict=True)]
    rates = best_rates(points)
    worst = max(map(abs, errors[1::2]))
    lines = [
        "# What sharding a sequence costs",
        "",
        "Efficiency of causal ring attention, forward and backward: its rate a GPU over the local kernel's. The model",
        f"is explained in benchmarks/scaling.py, which writes this page from {path.name}, measured on",
        f"{report['machine']}.",
        "",
        f"Fitted on {len(points[::2])} of the {len(points)} measured causal cases: {costs.step * 1e6:.0f} us a step",
        f"after the first, {costs.call * 1e6:.0f} us a pass, {costs.wire:.2f} s of slower attention a second of wire,",
        f"and {costs.traffic:.2f} of the memory's time for fp32 partial results and gradients. On the others, which",
        f"the fit has not seen, it is wrong by at most {worst:.1%}. All cases are of one host: the network's",
        f"{NETWORK / 1e9:.0f} GB/s a GPU are an assumption, and nothing across hosts has been checked.",
        "",
        head(["GPUs", "tokens a GPU", "kv heads", "measured", "model", "error", ""]),
    ]
    for number, ((row, parts, _), got, error) in enumerate(zip(points, found, errors, strict=True)):
        sizes = [str(row["gpus"]), f"{row['tokens_a_gpu']:,}", str(row["kv_heads"])]
        used = "checked" if number % 2 else "fitted"
        lines.append(cells([*sizes, f"{got:.3f}", f"{efficiency(parts, costs):.3f}", f"{error:+.1%}", used]))
    lines += ["", *(f"- {line}" for line in suggestions(report))]
    lines += [
        "",
        f"Predicted for {HEADS} query and {KV_HEADS} kv heads of {DIM}, one sequence over all GPUs of hosts of {HOST},",
        f"at local rates of {rates[0] / 1e12:.0f} and {rates[1] / 1e12:.0f} TFLOP/s: the best mesh, as ring x ulysses.",
        "Of more GPUs, groups that read different rows each do the same: their efficiency is that of one group.",
        "",
        "![Predicted efficiency by GPUs](scaling.png)",
        "",
        head(["tokens", *(f"{gpus:,} GPUs" for gpus in GPUS)]),
    ]
    table = {tokens: [best(tokens, gpus, rates, costs) for gpus in GPUS] for tokens in TOKENS}
    for tokens, found in table.items():
        shown = [f"{e:.0%} ({gpus // -u} x {-u})" for (e, u), gpus in zip(found, GPUS, strict=True)]
        lines.append(cells([f"{tokens // 2**20}M", *shown]))
    into.with_suffix(".md").write_text("\n".join(lines) + "\n")
    plot(into.with_suffix(".png"), table)


def combined(row: dict[str, Any]) -> float:
    """Efficiency of both passes together, as measured."""
    return float(row["ours"]["value"] / row["one_gpu"]["value"])


def plot(path: Path, table: dict[int, list[tuple[float, int]]]) -> None:
    if (plt := pyplot()) is None:
        return
    figure, axis = plt.subplots(figsize=(8, 5))
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
