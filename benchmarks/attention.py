"""Attention of one device beside its peers, in TFLOP/s: a table, docs/benchmarks/attention.json and a plot of it.

python benchmarks/attention.py                                                # every case: hours with FlexAttention
python benchmarks/attention.py --only '128 32/8 16384' --peers cudnn fa4      # cases that the expression matches
python benchmarks/attention.py --only '128 .* window' --rounds 7              # their rows are put into the report

All contestants of a case run in turn, in another order each of the `--rounds`, and the median of the rounds counts:
clocks drift by percents, and what runs after a power-hungry kernel is slowed. FLOPs are 4 x dim x attended (query, key)
pairs x heads, the backward pass is 2.5 times that; ours and peers' backward passes include rowsum(dout * out). Batch is
16K tokens or one row, whichever is more. A peer that is not installed, or cannot run a case, is left out of it.
"""

import argparse
import importlib
import json
import random
import re
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
from report import begin, cells, head, left_out, put, pyplot, versions, write
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
    """Sizes of one comparison. `mask` is causal, full, packed-N (mean document N tokens) or window-N."""

    mask: str
    length: int
    heads: int
    kv_heads: int
    dim: int

    @property
    def batch(self) -> int:
        return max(1, 16384 // self.length)


@dataclass
class Inputs:
    """(batch, length, heads, dim) bf16 leaves, the gradient of out, and what the mask is."""

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
        shape = (case.batch, case.length, heads, case.dim)
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
        keep = query >= key
        if len(x.documents) > 1:
            keep = keep & (document[query] == document[key])  # in place it would not compile
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
    flops = 4.0 * case.dim * case.heads * case.batch * int(x.spans.pairs().sum())
    running: dict[str, Pair] = {}
    for name in names:
        try:
            running[name] = CONTESTANTS[name](case, x)
            for run in running[name]:
                run()
            torch.cuda.synchronize()
        except (ImportError, RuntimeError, TypeError, ValueError, AssertionError) as reason:
            running.pop(name, None)
            left_out(name, reason)
    check_agreement(running)
    seconds: dict[tuple[str, str], list[float]] = {}
    turns = [(name, what) for name in running for what in ("forward", "backward")]
    for _ in range(rounds):
        for name, what in random.sample(turns, len(turns)):
            run = running[name][what == "backward"]
            took = do_bench(run, warmup=10, rep=50, return_mode="median") * 1e-3
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


def cases() -> Iterator[Case]:
    for dim in (128, 64):
        for heads, kv_heads in ((16, 16), (32, 8)):
            for mask in ("causal", "full"):
                yield from (Case(mask, length, heads, kv_heads, dim) for length in (4096, 16384, 65536, 131072))
            for length, mean in ((32768, 2048), (131072, 8192), (65536, 1024)):
                yield Case(f"packed-{mean}", length, heads, kv_heads, dim)
            yield from (Case(f"window-{window}", 65536, heads, kv_heads, dim) for window in (1024, 4096))


def label(case: Case) -> str:
    return f"{case.dim} {case.heads}/{case.kv_heads} {case.length} {case.mask}"


def line(case: Case, rates: dict[str, dict[str, float]], names: list[str]) -> str:
    left = f"{label(case):<28}"
    fields = (f"{rates[n]['forward']:>5.0f} {rates[n]['backward']:>5.0f}" if n in rates else " " * 11 for n in names)
    return left + "  ".join(fields)


def machine() -> dict[str, Any]:
    used = {"torch": torch.__version__, "triton": triton.__version__, "cudnn": torch.backends.cudnn.version()}
    return {"machine": torch.cuda.get_device_name(), "dtype": "bfloat16", "versions": used}


def render(path: Path) -> None:
    """The table and the plot beside a report, from the report alone."""
    report = json.loads(path.read_text())
    rows = report["cases"]
    peers = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    lines = [
        "# Attention on one device",
        "",
        f"{report['machine']}, {report['dtype']}, {versions(report['versions'])}. TFLOP/s",
        "forward / backward, medians of interleaved",
        "rounds, per attended FLOP: causal counts half, packed and window their own. `packed-N` are log-normal",
        "documents of mean N; in brackets ours over the peer. Batch is 16K tokens or one row. Written by",
        *(f"`python {command}`" for command in report["commands"]),
        "",
        "![TFLOP/s of every case](attention.png)",
        "",
        head([*SIZES, "ours", *peers]),
    ]
    for row in rows:
        rates = [row["ours"], *(row["peers"].get(name) for name in peers)]
        lines.append(cells([*(str(row[name]) for name in SIZES), *(cell(x, row["ours"]) for x in rates)]))
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
    if (plt := pyplot()) is None:
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
    parser.add_argument("--only", default="", help="regular expression over 'DIM HEADS/KV_HEADS LENGTH MASK'")
    parser.add_argument("--peers", nargs="*", default=[name for name in CONTESTANTS if name != "hopper"])
    parser.add_argument("--rounds", type=int, default=5)
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
    print(f"{'dim heads length mask':<28}" + "  ".join(f"{name:^11}" for name in names))
    report = begin(arguments.out, machine())
    for case in cases():
        if not re.search(arguments.only, label(case)):
            continue
        rates = measure(case, names, arguments.rounds)
        print(line(case, rates, names), flush=True)
        valued = {name: {**rate, "unit": "TFLOP/s"} for name, rate in rates.items()}
        put(report, {**asdict(case), "ours": valued.pop("hopper", {}), "peers": valued}, SIZES)
        write(arguments.out, report)
    render(arguments.out)


if __name__ == "__main__":
    main()
