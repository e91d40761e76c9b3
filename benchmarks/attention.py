"""Attention of one device beside its peers, in TFLOP/s: a table, docs/benchmarks/attention.json and a plot of it.

python benchmarks/attention.py                                              # every case: an hour with FlexAttention
python benchmarks/attention.py --lengths 4096 16384 --heads 16/16 --peers cudnn triton
python benchmarks/attention.py --masks packed window --dims 128 --rounds 5

All contestants of a case run in turn, `--rounds` times, and the median of the rounds counts: clocks drift by percents.
FLOPs are 4 x dim x attended (query, key) pairs x heads, the backward pass is 2.5 times that; ours and peers' backward
passes include rowsum(dout * out). A peer that is not installed, or cannot run a case, is left out of it.
"""

import argparse
import importlib
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from triton.testing import do_bench

from ringspan.kernels.attention import attention
from ringspan.kernels.plan import plan
from ringspan.kernels.spans import Spans

SIZES = ("mask", "length", "heads", "kv_heads", "dim")
Run = Callable[[], Any]
Pair = tuple[Run, Run]  # forward, backward


@dataclass(frozen=True)
class Case:
    """Sizes of one comparison; batch is 1. `mask` is causal, full, packed-N (mean document N tokens) or window-N."""

    mask: str
    length: int
    heads: int
    kv_heads: int
    dim: int


@dataclass
class Inputs:
    """(1, length, heads, dim) bf16 leaves, the gradient of out, and what the mask is."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    spans: Spans
    documents: list[int]
    window: int | None

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v


def make(case: Case) -> Inputs:
    torch.manual_seed(0)
    kind, _, size = case.mask.partition("-")
    documents, window = [case.length], None
    if kind == "packed":
        documents = log_normal_lengths(case.length, int(size))
        spans = Spans.packed(documents)
    elif kind == "window":
        window = int(size)
        spans = Spans.causal(case.length, window=window)
    else:
        spans = Spans.causal(case.length) if kind == "causal" else Spans.full(case.length, case.length)

    def normal(heads: int) -> Tensor:
        shape = (1, case.length, heads, case.dim)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    q, k, v = normal(case.heads), normal(case.kv_heads), normal(case.kv_heads)
    return Inputs(q, k, v, torch.randn_like(q), spans.to("cuda"), documents, window)


def log_normal_lengths(total: int, mean: int) -> list[int]:
    """Document lengths, log-normal with sigma 1 and about that mean, that sum to `total`; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        draw = mean * (torch.randn(1, generator=generator) - 0.5).exp().item()
        lengths.append(min(left, max(1, round(draw))))
    return lengths


def ours(case: Case, x: Inputs, backend: str) -> Pair:
    mask = plan(x.spans, case.length)  # a Plan serves all layers of a step: made outside, as a trainer does
    return by_autograd(x, partial(attention, *x.leaves, mask, backend=backend))


def by_autograd(x: Inputs, forward: Callable[[], Tensor]) -> Pair:
    out = forward()
    return forward, lambda: torch.autograd.grad(out, x.leaves, x.dout, retain_graph=True)


def cudnn(case: Case, x: Inputs) -> Pair:
    if case.mask not in ("causal", "full"):
        raise ValueError(f"scaled_dot_product_attention has no {case.mask} mask")

    def forward() -> Tensor:
        heads_first = (leaf.transpose(1, 2) for leaf in x.leaves)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            causal, grouped = case.mask == "causal", case.heads != case.kv_heads
            out = F.scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=grouped)
        return out.transpose(1, 2)

    return by_autograd(x, forward)


def flex(case: Case, x: Inputs) -> Pair:
    torch.compiler.reset()  # or from the ninth case on it would not be compiled again, and run unfused
    document = torch.arange(len(x.documents)).repeat_interleave(torch.tensor(x.documents)).cuda()

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        keep = (document[query] == document[key]) & (query >= key)
        return keep if x.window is None else keep & (query - key < x.window)

    n = case.length
    block_mask = None if case.mask == "full" else create_block_mask(seen, None, None, n, n, "cuda", _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)

    def forward() -> Tensor:
        heads_first = (leaf.transpose(1, 2) for leaf in x.leaves)
        return compiled(*heads_first, block_mask=block_mask, enable_gqa=case.heads != case.kv_heads).transpose(1, 2)

    return by_autograd(x, forward)


def flash_attention(case: Case, x: Inputs, package: str) -> Pair:
    module = importlib.import_module(package)
    ends = torch.tensor([0, *x.documents], device="cuda").cumsum(0).int()
    window = {} if x.window is None else {"window_size": (x.window - 1, 0)}

    def forward() -> Tensor:
        if len(x.documents) == 1:
            out = module.flash_attn_func(*x.leaves, causal=case.mask != "full", **window)
        else:
            rows = (leaf.squeeze(0) for leaf in x.leaves)
            lengths = {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
            longest = {"max_seqlen_q": max(x.documents), "max_seqlen_k": max(x.documents)}
            out = module.flash_attn_varlen_func(*rows, **lengths, **longest, causal=True)
        out = out[0] if isinstance(out, tuple) else out
        return out.view(x.q.shape)

    return by_autograd(x, forward)


CONTESTANTS: dict[str, Callable[[Case, Inputs], Pair]] = {
    "hopper": partial(ours, backend="hopper"),
    "cudnn": cudnn,
    "fa3": partial(flash_attention, package="flash_attn_interface"),
    "fa4": partial(flash_attention, package="flash_attn.cute"),
    "flex": flex,
    "triton": partial(ours, backend="triton"),
}


def measure(case: Case, names: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """TFLOP/s by contestant and pass; prints what could not run."""
    x = make(case)
    flops = 4.0 * case.dim * case.heads * int(x.spans.pairs().sum())
    running: dict[str, Pair] = {}
    for name in names:
        try:
            running[name] = CONTESTANTS[name](case, x)
            for run in running[name]:
                run()
            torch.cuda.synchronize()
        except (ImportError, RuntimeError, TypeError, ValueError, AssertionError) as reason:
            running.pop(name, None)
            print(f"  {name} left out: {type(reason).__name__}: {str(reason).splitlines()[0][:100]}", flush=True)
    check_agreement(running)
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for name, pair in running.items():
            for what, run in zip(("forward", "backward"), pair, strict=True):
                took = do_bench(run, warmup=10, rep=80, return_mode="median") * 1e-3
                seconds.setdefault((name, what), []).append(took)
    weight = {"forward": 1.0, "backward": 2.5}
    return {
        name: {what: weight[what] * flops / statistics.median(seconds[name, what]) * 1e-12 for what in weight}
        for name in running
    }


def check_agreement(running: dict[str, Pair]) -> None:
    """Prints how far the outputs are from the first contestant's: a fast wrong answer is none."""
    outs = {name: pair[0]() for name, pair in running.items()}
    outs = {name: out.detach().float() for name, out in outs.items()}
    first = next(iter(outs.values()), None)
    for name, out in outs.items():
        off = ((out - first).norm() / first.norm()).item() if first is not None else 0.0
        if not off < 0.01:  # NaN too
            print(f"  {name} differs from {next(iter(outs))} by {off:.1e} of its size", flush=True)


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    for dim in arguments.dims:
        for heads in arguments.heads:
            n_heads, kv_heads = map(int, heads.split("/"))
            for length in arguments.lengths:
                for mask in arguments.masks:
                    if mask == "packed":
                        yield Case(f"packed-{length // 16}", length, n_heads, kv_heads, dim)
                        yield Case("packed-1024", length, n_heads, kv_heads, dim)
                    elif mask == "window":
                        yield from (Case(f"window-{n}", length, n_heads, kv_heads, dim) for n in (1024, 4096))
                    else:
                        yield Case(mask, length, n_heads, kv_heads, dim)


def line(case: Case, rates: dict[str, dict[str, float]], names: list[str]) -> str:
    left = f"{case.dim:>4} {case.heads:>3}/{case.kv_heads:<3} {case.length:>7} {case.mask:<12}"
    fields = (f"{rates[n]['forward']:>5.0f} {rates[n]['backward']:>5.0f}" if n in rates else " " * 11 for n in names)
    return left + "  ".join(fields)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cudnn": torch.backends.cudnn.version()}
    machine = {"machine": torch.cuda.get_device_name(), "dtype": "bfloat16", "versions": versions}
    path.write_text(json.dumps({**machine, "command": shlex.join(sys.argv), "cases": rows}, indent=1) + "\n")


def render(path: Path) -> None:
    """The table and the plot beside a report, from the report alone."""
    report = json.loads(path.read_text())
    rows = list({str([row[name] for name in SIZES]): row for row in report["cases"]}.values())
    peers = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        "# Attention on one device",
        "",
        f"{report['machine']}, {report['dtype']}, batch 1, {versions}. TFLOP/s forward / backward, medians of",
        "interleaved rounds, per attended FLOP: causal counts half, packed and window their own. `packed-N` are",
        "log-normal documents of mean N; in brackets ours over the peer. Written, like the plot, by",
        f"`python {report['command']}`.",
        "",
        "![TFLOP/s of every case](attention.png)",
        "",
        f"| {' | '.join(SIZES)} | ours | {' | '.join(peers)} |",
        "|" + "---|" * (len(SIZES) + 1 + len(peers)),
    ]
    for row in rows:
        rates = [row["ours"], *(row["peers"].get(name) for name in peers)]
        lines.append(
            "| " + " | ".join([*(str(row[name]) for name in SIZES), *(cell(x, row["ours"]) for x in rates)]) + " |"
        )
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    plot(path.with_suffix(".png"), rows)


def cell(rate: dict[str, float] | None, ours: dict[str, float]) -> str:
    if rate is None:
        return "-"
    shown = f"{rate['forward']:.0f} / {rate['backward']:.0f}"
    return (
        shown
        if rate is ours
        else f"{shown} ({ours['forward'] / rate['forward']:.2f}, {ours['backward'] / rate['backward']:.2f})"
    )


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    try:
        plt = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        print("matplotlib is not installed: no plot")
        return
    figure, axes = plt.subplots(2, 1, figsize=(max(8, len(rows)), 8), sharex=True)
    for axis, what in zip(axes, ("forward", "backward"), strict=True):
        names = list(dict.fromkeys(name for row in rows for name in ("hopper", *row["peers"])))
        for name in names:
            rates = [row["ours"] if name == "hopper" else row["peers"].get(name, {}) for row in rows]
            axis.plot([rate.get(what, float("nan")) for rate in rates], marker="o", label=name)
        axis.set_ylabel(f"{what}, TFLOP/s")
        axis.legend()
    labels = [f"{r['mask']}\n{r['length']}\n{r['heads']}/{r['kv_heads']} D{r['dim']}" for r in rows]
    axes[1].set_xticks(range(len(rows)), labels, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--heads", nargs="+", default=["16/16", "32/8"], help="query heads / kv heads")
    parser.add_argument("--masks", nargs="+", default=["causal", "full", "packed", "window"])
    parser.add_argument("--peers", nargs="*", default=[name for name in CONTESTANTS if name != "hopper"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1] / "docs" / "benchmarks" / "attention.json"
    )
    parser.add_argument(
        "--render", action="store_true", help="write the table and the plot of --out anew, on any machine"
    )
    arguments = parser.parse_args()
    if arguments.render:
        return render(arguments.out)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        sys.exit("this compares kernels for compute capability 9.0, and there is no such device")
    names = ["hopper", *arguments.peers]
    print(f"{'dim':>4} {'heads':<7} {'length':>7} {'mask':<12}" + "  ".join(f"{name:^11}" for name in names))
    rows: list[dict[str, Any]] = []
    for case in dict.fromkeys(cases(arguments)):
        rates = measure(case, names, arguments.rounds)
        print(line(case, rates, names), flush=True)
        valued = {name: {**rate, "unit": "TFLOP/s"} for name, rate in rates.items()}
        rows.append({**asdict(case), "ours": valued.pop("hopper", {}), "peers": valued})
        write(arguments.out, rows)  # after each case: a run that is cut short keeps what it has
    render(arguments.out)


if __name__ == "__main__":
    main()
