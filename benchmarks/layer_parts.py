"""The loss and a layer's elementwise parts beside their peers: docs/benchmarks/layer_parts.json and .md.

python benchmarks/layer_parts.py                                   # every case
python benchmarks/layer_parts.py --only 'loss .* 128256'           # cases that the expression matches
python benchmarks/layer_parts.py --small --out small.json          # the same at tiny sizes, on any machine
python benchmarks/layer_parts.py --render                          # the table anew from --out, on any machine

Milliseconds of forward and backward together, in bf16, and what is allocated meanwhile beyond the inputs, gradients
included. Contestants run in turn, in another order each of the `--rounds`, and medians count.

loss     vocabulary projection and cross-entropy: train/loss.py, Liger's, Apple's cut-cross-entropy without its filter
         of small gradients, DeepSpeed's tiled logits, and PyTorch with whole logits, compiled
norm     RMSNorm; swiglu, rotary: as train/layer.py has them, compiled and not, beside Liger's. Ours are compiled
         together with the products around them when they train; here each stands alone, with its inputs written out.
         Our swiglu's backward gives its result once more, which the product behind it needs and Liger's has kept
"""

import argparse
import importlib
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from generation_parts import LEFT_OUT, device_for, emptied, seconds_in_turn
from report import begin, cells, head, left_out, machine, put, versions, write
from torch import Tensor, nn
from training_peers import loss_of_rows

from ringspan.train import layer
from ringspan.train.engine import import_deepspeed
from ringspan.train.loss import cross_entropy_sum
from ringspan.train.rotary import Rope

ROOT = Path(__file__).resolve().parents[1]
EPS = 1e-5
TILE = 4096  # tokens that DeepSpeed's tiled logits are of
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "deepspeed")
Run = Callable[[], Any]


class Case(NamedTuple):
    """`sizes`: of a loss dim and vocabulary; of a norm dim; of SwiGLU its width; of rotary heads, kv heads and dim."""

    part: str
    tokens: int
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return " ".join(map(str, (self.part, self.tokens, *self.sizes)))


def cases(small: bool) -> Iterator[Case]:
    if small:
        yield from (Case("loss", 96, (32, 300)), Case("norm", 64, (32,)), Case("swiglu", 64, (48,)))
        yield Case("rotary", 64, (4, 2, 16))
        return
    for tokens, dim, vocabulary in (
        (65536, 2048, 256),
        (16384, 2048, 32768),
        (16384, 4096, 128256),
        (8192, 2560, 262144),
    ):
        yield Case("loss", tokens, (dim, vocabulary))
    yield from (Case("norm", 16384, (4096,)), Case("swiglu", 16384, (14336,)), Case("rotary", 16384, (32, 8, 128)))


def normal(device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, device=device)).bfloat16().requires_grad_()


def both_ways(forward: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor | None = None) -> Run:
    return lambda: torch.autograd.grad(forward(*leaves), leaves, grad)


def losses(case: Case, device: torch.device) -> dict[str, Callable[[], Run]]:
    dim, vocabulary = case.sizes
    leaves = [normal(device, case.tokens, dim), normal(device, vocabulary, dim, scale=dim**-0.5)]
    labels = torch.randint(vocabulary, (case.tokens,), device=device)

    def whole(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")

    def liger() -> Run:
        return both_ways(
            partial(liger_functions().liger_fused_linear_cross_entropy, target=labels, reduction="sum"), leaves
        )

    def cut() -> Run:
        module = importlib.import_module("cut_cross_entropy")
        return both_ways(partial(module.linear_cross_entropy, targets=labels, reduction="sum", filter_eps=None), leaves)

    def deepspeed() -> Run:
        import_deepspeed(device)
        tiled = importlib.import_module("deepspeed.runtime.sequence_parallel.ulysses_sp").TiledFusedLogitsLoss
        linear = nn.Linear(dim, vocabulary, bias=False, device="meta")
        linear.weight = nn.Parameter(leaves[1].detach())

        def run() -> None:
            linear.weight.grad = None
            shards = -(-case.tokens // TILE)
            rows = leaves[0].detach()[None].requires_grad_()
            tiled.apply(loss_of_rows, linear, rows, labels[None], None, shards, [linear.weight], "mean").backward()

        return run

    return {
        "ours": lambda: both_ways(partial(cross_entropy_sum, labels=labels), leaves),
        "liger": liger,
        "cut cross-entropy": cut,
        "deepspeed": deepspeed,
        "whole logits": lambda: both_ways(torch.compile(whole) if device.type == "cuda" else whole, leaves),
    }


def norms(case: Case, device: torch.device) -> dict[str, Callable[[], Run]]:
    leaves = [normal(device, 1, case.tokens, *case.sizes), normal(device, *case.sizes)]
    grad = torch.randn_like(leaves[0])

    def ours(norm: Any, norm_backward: Any) -> Run:
        x, gain = (leaf.detach() for leaf in leaves)
        return lambda: (norm(x, gain, EPS), [d.to(x.dtype) for d in norm_backward(grad, x, gain, EPS)])

    def liger() -> Run:
        return both_ways(partial(liger_functions().liger_rms_norm, eps=EPS, in_place=False), leaves, grad)

    return compiled_or_not(ours, (layer.norm, layer.norm_backward), device) | {"liger": liger}


def swiglus(case: Case, device: torch.device) -> dict[str, Callable[[], Run]]:
    wide = normal(device, 1, case.tokens, 2 * case.sizes[0])
    halves = [half.detach().contiguous().requires_grad_() for half in wide.chunk(2, dim=-1)]
    grad = torch.randn_like(halves[0])

    def ours(swiglu: Any, swiglu_backward: Any) -> Run:
        x = wide.detach()
        return lambda: (swiglu(x), swiglu_backward(grad, x)[1])

    def liger() -> Run:
        return both_ways(liger_functions().liger_swiglu, halves, grad)

    return compiled_or_not(ours, (layer.swiglu, layer.swiglu_backward), device) | {"liger": liger}


def rotaries(case: Case, device: torch.device) -> dict[str, Callable[[], Run]]:
    heads, kv_heads, dim = case.sizes
    q, k = leaves = [normal(device, 1, case.tokens, n, dim) for n in (heads, kv_heads)]
    grads = [torch.randn_like(q), torch.randn_like(k)]
    cos, sin = Rope(dim, 500_000.0)(torch.arange(case.tokens, device=device)[None], torch.bfloat16)

    def ours(rotate: Any) -> Run:
        there = [leaf.detach() for leaf in leaves]
        return lambda: ([rotate(x, cos, sin) for x in there], [rotate(d, cos, -sin) for d in grads])

    def liger() -> Run:
        theirs = cos.squeeze(2), torch.cat([sin.squeeze(2)[..., dim // 2 :]] * 2, dim=-1)  # without our signs
        angles = [x.bfloat16() for x in theirs]
        heads_first = [d.transpose(1, 2) for d in grads]

        def run() -> Any:
            turned = liger_functions().liger_rope(*(x.transpose(1, 2) for x in leaves), *angles)
            return torch.autograd.grad(turned, leaves, heads_first)

        return run

    return compiled_or_not(ours, (layer.rotate,), device) | {"liger": liger}


def liger_functions() -> Any:
    return importlib.import_module("liger_kernel.transformers.functional")


def compiled_or_not(
    make: Callable[..., Run], functions: tuple[Callable[..., Any], ...], device: torch.device
) -> dict[str, Callable[[], Run]]:
    """Ours, of the layer's functions as they train, and as they are."""
    return {
        "ours": lambda: make(*(compiled(function, device) for function in functions)),
        "not compiled": lambda: make(*functions),
    }


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False) if device.type == "cuda" else function


PARTS = {"loss": losses, "norm": norms, "swiglu": swiglus, "rotary": rotaries}


def measure(case: Case, rounds: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Milliseconds and GiB by contestant."""
    running: dict[str, Run] = {}
    gib: dict[str, float | None] = {}
    for name, make in PARTS[case.part](case, device).items():
        try:
            run = make()
            run()
            gib[name] = allocated_by(run, device)
            running[name] = run
        except LEFT_OUT as reason:
            left_out(name, reason)
    seconds = seconds_in_turn(running, rounds, device)
    return {name: {"value": 1e3 * taken, "unit": "ms", "peak_gib": gib[name]} for name, taken in seconds.items()}


def allocated_by(run: Run, device: torch.device) -> float | None:
    """GiB at most beyond what was there, with what it gives."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def render(path: Path) -> None:
    """The table beside a report, from the report alone."""
    report = json.loads(path.read_text())
    lines = [
        "# The loss and a layer's elementwise parts",
        "",
        f"{report['machine']}, {report['dtype']}, {versions(report['versions'])}.",
        "Milliseconds of forward and backward, and GiB allocated meanwhile; in brackets the peer's time over ours.",
        "What is measured how is said in",
        "benchmarks/layer_parts.py. Written by",
        *(f"`python {command}`" for command in report["commands"]),
    ]
    for part in dict.fromkeys(row["part"] for row in report["cases"]):
        rows = [row for row in report["cases"] if row["part"] == part]
        names = list(dict.fromkeys(name for row in rows for name in row["peers"]))
        lines += ["", f"## {part}", "", head(["tokens", "sizes", "ours", *names])]
        for row in rows:
            beside = (shown(row["peers"].get(name), row["ours"]) for name in names)
            sizes = " x ".join(map(str, row["sizes"]))
            lines.append(cells([f"{row['tokens']:,}", sizes, shown(row["ours"], row["ours"]), *beside]))
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def shown(found: dict[str, Any] | None, ours: dict[str, Any]) -> str:
    if found is None:
        return "-"
    gib = "" if found["peak_gib"] is None else f", {found['peak_gib']:.2f} GiB"
    ratio = "" if found is ours else f" ({found['value'] / ours['value']:.2f})"
    return f"{found['value']:.2f}{gib}{ratio}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression over 'PART TOKENS SIZES'")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "layer_parts.json")
    parser.add_argument("--render", action="store_true")
    arguments = parser.parse_args()
    if arguments.render:
        return render(arguments.out)
    device = device_for(arguments.small)
    report = begin(arguments.out, machine(device, PACKAGES))
    torch.manual_seed(0)
    for case in cases(arguments.small):
        if not re.search(arguments.only, str(case)):
            continue
        found = measure(case, arguments.rounds, device)
        row = {**case._asdict(), "sizes": list(case.sizes), "ours": found.pop("ours"), "peers": found}
        beside = {name: shown(rate, row["ours"]) for name, rate in (("ours", row["ours"]), *found.items())}
        print(f"{case}: {beside}", flush=True)
        put(report, row, Case._fields)
        write(arguments.out, report)
        emptied(device)
    render(arguments.out)


if __name__ == "__main__":
    main()
