"""Whole training steps beside other trainers and beside the budget: docs/benchmarks/training.json, .md and .png.

python benchmarks/training.py                                        # every case for the GPUs that are here
python benchmarks/training.py --only '1b 65536 .* keep$' --peers fsdp2
python benchmarks/training.py --case 1b 65536 keep optim.name=muon --peers
python benchmarks/training.py --together --case 1b 65536 keep --case 1b 65536 recompute    # sooner done: one process
python benchmarks/training.py --render                               # table and plots anew from --out, on any machine
python benchmarks/training.py --budget                               # and what the budget says now, where data is here

Each contestant of a case trains in processes of its own, one case after the other. Ours is launch/train.py itself, on
the standard library's text with data.cross_document=true, ended after --steps steps. With --together it is that loop
for all cases in one process (training_steps.py), and slice=4 makes a case the first 4 layers of the case before it. A
rate is the median of the steps after the first two, memory torch.cuda.max_memory_allocated(). Utilisation counts causal
attention once, and nothing that is computed again. A peer keeps all activations, or recomputes layers where that does
not fit.
"""

import argparse
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from report import begin, cells, head, left_out, put, pyplot, versions, write

from ringspan.train.budget import Budget, Machine, budget, job_of
from ringspan.train.config import TrainConfig, typed
from ringspan.train.data import prepare
from ringspan.train.metrics import flops_per_step, peak_of
from ringspan.train.rows import Text
from ringspan.train.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
KEEP_ATTENTION = "train.activations=recompute_keep_attention"
POLICIES = {
    "keep": [],
    "keep attention": [KEEP_ATTENTION],
    "recompute": ["train.activations=recompute"],
    "keep attention, tiles": [KEEP_ATTENTION, "train.mlp_tile=4096"],
    "keep attention, tiles, offload": [KEEP_ATTENTION, "train.mlp_tile=4096", "train.offload=cpu"],
    "recompute, tiles, offload": ["train.activations=recompute", "train.mlp_tile=4096", "train.offload=cpu"],
    "recompute 4, tiles, offload": [
        "train.activations=recompute",
        "train.recompute_layers=4",
        "train.mlp_tile=4096",
        "train.offload=cpu",
    ],
}
HOST = ["engine.offload_optimizer=true"]
SLICE = "slice="
SKIPPED = 2  # steps: compilations, first allocations


class Case(NamedTuple):
    model: str
    seq_len: int
    gpus: int
    policy: str
    more: tuple[str, ...] = ()  # overrides

    def __str__(self) -> str:
        return " ".join([self.model, str(self.seq_len), str(self.gpus), *self.more, self.policy])

    @property
    def overrides(self) -> list[str]:
        data = ["data.cross_document=true", "evaluation.every=0", "logger.wandb=disabled"]
        sizes = [f"model={self.model}", f"seq_len={self.seq_len}", f"nproc={self.gpus}"]
        return [*sizes, *data, *POLICIES[self.policy], *(x for x in self.more if not x.startswith(SLICE))]

    @property
    def slice(self) -> int:
        """Layers of the case before that its rows go through; 0: it is no slice."""
        return next((int(x.removeprefix(SLICE)) for x in self.more if x.startswith(SLICE)), 0)


def cases(gpus: int) -> Iterator[Case]:
    for n in (65536, 16384, 32768):
        yield Case("1b", n, 1, "keep")
    for policy in ("keep attention", "recompute", "keep attention, tiles, offload", "keep attention, tiles"):
        yield Case("1b", 65536, 1, policy)
    for n, policy in ((131072, "keep attention"), (262144, "keep attention, tiles"), (32768, "keep attention")):
        yield Case("1b", n, 1, policy)
    yield Case("1b", 524288, 1, "recompute 4, tiles, offload")
    if gpus >= 2:
        yield Case("1b", 65536, 2, "keep")
        yield Case("1b", 131072, 2, "keep attention")
        yield Case("llama8b", 131072, 2, "keep attention, tiles, offload", tuple(HOST))


def configured(case: Case) -> TrainConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return typed(compose("train", overrides=[*case.overrides, "name=benchmark", "run_dir=unused"]))


def predicted(case: Case, config: TrainConfig, vocab_size: int) -> Budget:
    job = job_of(config, case.gpus, vocab_size)
    if not config.data.cross_document:  # one length that attends to as many keys as the documents of the first rows
        rows = Text(prepare(config.data), config.data).rows(case.seq_len, config.seed)
        pairs = statistics.mean(sum(n * (n + 1) / 2 for n in rows.lengths(row)) for row in rows.order(0, SKIPPED + 1))
        job = replace(job, document=max(1, round(2 * pairs / case.seq_len - 1)))
    found = budget(job, Machine())
    if not case.slice:
        return found
    short = budget(replace(job, model=replace(config.model, n_layers=case.slice)), Machine())
    states = {name: found.gpu[name] for name in ("parameters", "optimizer")}
    seconds = {**short.seconds, "update": found.seconds["update"]}
    return short._replace(gpu={**short.gpu, **states}, seconds=seconds, utilisation=math.nan)


def ours(case: Case, steps: int, limit: float) -> dict[str, Any]:
    """Rates of launch/train.py, ended once it has logged so many steps."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = [*case.overrides, "steps=100000", f"run_dir={folder}/run", "name=benchmark"]
        command = [sys.executable, str(ROOT / "launch" / "train.py"), *wanted]
        lines, said = follow(command, Path(folder, "run", "metrics.jsonl"), steps, limit)
    return rates(lines, case) if len(lines) == steps else {"failed": said}


def rates(lines: list[dict[str, Any]], case: Case) -> dict[str, Any]:
    """Of metrics.jsonl: of all steps but the first two, or of the last alone where there are no more."""
    lines = lines[min(SKIPPED, len(lines) - 1) :]
    middle = {name: statistics.median(line[name] or 0.0 for line in lines) for name in lines[0]}
    return {
        "value": round(middle["perf/tokens_per_second_per_gpu"], 1),
        "unit": "tokens/s a GPU",
        "step_seconds": round(middle["perf/step_seconds"], 4),
        "utilisation": None if case.slice else round(middle["perf/mfu"], 4),
        "peak_gib": round(lines[-1]["memory/peak_allocated_gib"], 2),
        "reserved_gib": round(lines[-1]["memory/peak_reserved_gib"], 2),
    }


def together(chosen: list[Case], steps: int, limit: float) -> Iterator[dict[str, Any]]:
    """What `ours` gives, of each case. Where a process fails, another goes on with the case after; where it leaves the
    GPU to be emptied for the next, with that one."""
    while chosen:
        runs = [{"slice": [c.seq_len, c.slice]} if c.slice else {"overrides": c.overrides} for c in chosen]
        command = [sys.executable, str(ROOT / "benchmarks" / "training_steps.py"), json.dumps([steps, runs])]
        said = "nothing"
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            clock = threading.Timer(limit, process.kill)
            clock.start()
            for line in process.stdout or ():
                if line.startswith('{"found": '):
                    clock.cancel()
                    clock = threading.Timer(limit, process.kill)
                    clock.start()
                    found = json.loads(line)["found"]
                    yield rates(found["lines"], chosen[0]) if "lines" in found else found
                    chosen = chosen[1:]
                elif line.strip():
                    said = line.strip()[:300]
                    if "torch.compile" in said:  # most of the time of a case of few steps
                        print(f"  {said}", flush=True)
            clock.cancel()
        if chosen and process.returncode:
            yield {"failed": said}
            chosen = chosen[1:]


def follow(command: list[str], log: Path, steps: int, limit: float) -> tuple[list[dict[str, Any]], str]:
    """(what the log has got, the last thing that was said), once it has ``steps`` lines, or the command ends."""
    until, found = time.monotonic() + limit, list[dict[str, Any]]()
    with tempfile.TemporaryFile("w+") as output:
        with subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True) as process:
            while len(found) < steps and process.poll() is None and time.monotonic() < until:
                time.sleep(0.2)
                found = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        output.seek(0)
        said = [line for line in output.read().splitlines() if line.strip()]
    return found, said[-1][:300] if said else "nothing"


def peer(
    name: str, case: Case, config: TrainConfig, vocab_size: int, *, tries: list[str], steps: int, limit: float
) -> dict[str, Any]:
    """Rates with the first of ``tries``, policies of activations, that fits."""
    tried: dict[str, Any] = {}
    for activations in tries:
        asked = {"model": asdict(config.model), "vocab_size": vocab_size, "seq_len": case.seq_len, "steps": steps}
        asked |= {"activations": activations, "cuda": torch.cuda.is_available()}
        start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={case.gpus}", "--standalone"]
        command = [*start, str(ROOT / "benchmarks" / "training_peers.py"), name, json.dumps(asked)]
        try:
            run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            tried = {"failed": f"not done in {limit:.0f} s"}
            continue
        lines = [line for line in run.stdout.splitlines() if line.startswith("{")]
        if run.returncode == 0 and lines:
            found = json.loads(lines[-1])
            seconds = statistics.median(found["seconds"][SKIPPED:])
            return {
                "value": round(case.seq_len / seconds / case.gpus, 1),
                "unit": "tokens/s a GPU",
                "step_seconds": round(seconds, 4),
                "utilisation": round(needed(case, config, vocab_size) / seconds / case.gpus / peak(), 4),
                "peak_gib": None if found["peak_gib"] is None else round(found["peak_gib"], 2),
                "activations": activations,
            }
        errors = [line.strip() for line in run.stderr.splitlines() if "Error" in line]
        tried = {"failed": (errors or run.stderr.splitlines() or ["nothing was said"])[-1][:300]}
    return tried


def needed(case: Case, config: TrainConfig, vocab_size: int) -> float:
    """FLOPs of a step of one row."""
    m, n = config.model, case.seq_len
    sizes = {"n_layers": m.n_layers, "n_heads": m.n_heads, "head_dim": m.head_dim}
    return flops_per_step(m.matmul_parameters(vocab_size), n, **sizes, attended=n * (n + 1) // 2)


def peak() -> float:
    known = peak_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return known or Machine().peak_tflops * 1e12


def measure(case: Case, found: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    config, vocab_size = configured_sizes(case)
    row: dict[str, Any] = {**case._asdict(), "more": list(case.more), "ours": found}
    row["budget"] = told(case, predicted(case, config, vocab_size))
    asked = case.policy == "keep" or arguments.case
    wanted = arguments.peers if asked and not arguments.together else []
    how = {"tries": arguments.peers_try, "steps": arguments.steps, "limit": arguments.limit}
    row["peers"] = {name: peer(name, case, config, vocab_size, **how) for name in wanted}
    return row


def configured_sizes(case: Case) -> tuple[TrainConfig, int]:
    """(its configuration, rows of its vocabulary)."""
    config = configured(case)
    return config, config.model.vocabulary(load_tokenizer(config.data.tokenizer).vocab_size)


def told(case: Case, expected: Budget) -> dict[str, Any]:
    return {
        "step_seconds": round(expected.seconds_a_step, 4),
        "utilisation": None if case.slice else round(expected.utilisation, 4),
        "peak_gib": round(expected.gpu_gib, 2),
        "parts_gib": {name: round(size, 3) for name, size in expected.gpu.items()},
        "parts_seconds": {name: round(seconds, 4) for name, seconds in expected.seconds.items()},
    }


def told_anew(report: dict[str, Any]) -> None:
    """What the budget says now. Where documents are apart it has to see them: a row whose data is not here stays."""
    for row in report["cases"]:
        case = Case(**{name: row[name] for name in Case._fields} | {"more": tuple(row["more"])})
        try:
            row["budget"] = told(case, predicted(case, *configured_sizes(case)))
        except ValueError as reason:
            left_out(str(case), reason)


def machine() -> dict[str, Any]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"machine": name, "versions": {name: version(name) for name in ("torch", "triton", "deepspeed")}}


def render(path: Path) -> None:
    """The table and the plot beside a report, from the report alone."""
    report = json.loads(path.read_text())
    rows = report["cases"]
    peers = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    lines = [
        "# Whole training steps",
        "",
        f"{report['machine']}, bf16, AdamW, {versions(report['versions'])}. Tokens/s",
        "a GPU, utilisation, and the peak of allocated memory; in brackets ours over the peer. The budget's columns",
        "are what launch/budget.py says of an H100 beforehand, and how far off it was. Where two steps or fewer were",
        "run, compiling is in their seconds. Peers recompute layers where keeping all does not fit, or was not tried",
        "(`--peers-try`). Written by",
        *(f"`python {command}`" for command in report["commands"]),
        "",
        "![Memory against length, measured and by the budget](training.png)",
        "",
        head(["case", "tokens", "GPUs", "ours", "budget: GiB", "seconds", *peers]),
    ]
    for row in rows:
        case = [", ".join([row["model"], row["policy"], *row["more"]]), f"{row['seq_len']:,}", str(row["gpus"])]
        beside = [off(row, "peak_gib"), off(row, "step_seconds")]
        lines.append(cells([*case, shown(row["ours"]), *beside, *(over(row, name) for name in peers)]))
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    plot(path.with_suffix(".png"), rows)


def shown(found: dict[str, Any] | None) -> str:
    if not found or "failed" in found:
        return found["failed"].replace("|", "/") if found else "-"
    gib = "" if found["peak_gib"] is None else f", {found['peak_gib']:.1f} GiB"
    rate = "" if found["utilisation"] is None else f", {found['utilisation']:.1%}"
    return f"{found['value']:,.0f}{rate}{gib}"


def off(row: dict[str, Any], name: str) -> str:
    expected, got = row["budget"][name], row["ours"].get(name)
    return f"{expected:.2f}" + (f" ({expected / got - 1:+.0%})" if got else "")


def over(row: dict[str, Any], name: str) -> str:
    found, mine = row["peers"].get(name), row["ours"]
    ratio = f" ({mine['value'] / found['value']:.2f})" if found and "value" in found and "value" in mine else ""
    return shown(found) + ratio


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    if (plt := pyplot()) is None:
        return
    figure, axes = plt.subplots(1, 2, figsize=(12, 6), layout="constrained")
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["seq_len"]):
        lines.setdefault(", ".join([row["model"], f"{row['gpus']} GPUs", row["policy"], *row["more"]]), []).append(row)
    for axis, what, unit in zip(axes, ("peak_gib", "step_seconds"), ("GiB", "seconds a step"), strict=True):
        for number, (label, mine) in enumerate(lines.items()):
            color, lengths = f"C{number}", [r["seq_len"] for r in mine]
            axis.plot(lengths, [r["ours"].get(what) or float("nan") for r in mine], "o", color=color)
            axis.plot(lengths, [r["budget"][what] for r in mine], "_:", color=color, markersize=12, label=label)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=unit)
    axes[0].set_title("dots: measured; dashes: budget")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression over 'MODEL TOKENS GPUS [OVERRIDES] POLICY'")
    parser.add_argument("--peers", nargs="*", default=["fsdp2", "deepspeed"])
    parser.add_argument("--peers-try", nargs="*", default=["keep", "recompute"], help="activations, until one fits")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of one contestant of one case")
    parser.add_argument("--case", nargs="+", action="append", help="another: MODEL TOKENS POLICY OVERRIDE ...")
    parser.add_argument("--together", action="store_true", help="ours alone, all cases in one process")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "training.json")
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--budget", action="store_true", help="write its columns anew too")
    arguments = parser.parse_args()
    if arguments.budget:
        report = json.loads(arguments.out.read_text())
        told_anew(report)
        write(arguments.out, report)
    if arguments.render or arguments.budget:
        return render(arguments.out)
    chosen = [case for case in cases(torch.cuda.device_count()) if re.search(arguments.only, str(case))]
    if arguments.case:
        chosen = [Case(model, int(n), 1, policy, tuple(more)) for model, n, policy, *more in arguments.case]
    elif not torch.cuda.is_available():
        sys.exit("these cases are for GPUs, and there is none; --case tiny 1024 keep runs anywhere")
    report = begin(arguments.out, machine())
    one_by_one = (ours(case, arguments.steps, arguments.limit) for case in chosen)
    results = together(chosen, arguments.steps, arguments.limit) if arguments.together else one_by_one
    for case, found in zip(chosen, results, strict=True):
        row = measure(case, found, arguments)
        beside = {name: shown(found) for name, found in (("ours", row["ours"]), *row["peers"].items())}
        print(f"{case}: {beside}; budget {off(row, 'peak_gib')} GiB, {off(row, 'step_seconds')} s", flush=True)
        put(report, row, Case._fields)
        write(arguments.out, report)
    render(arguments.out)


if __name__ == "__main__":
    main()
