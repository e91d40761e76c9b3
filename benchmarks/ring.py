"""Ring attention beside its peers, forward + backward, in TFLOP/s a GPU: docs/benchmarks/ring.json, a table, a plot.

python benchmarks/ring.py                                     # every case, on all GPUs here: an hour on two
python benchmarks/ring.py --tokens 16384 32768 --kv-heads 8 --masks causal --peers "context_parallel alltoall" Ulysses
torchrun --nproc-per-node=4 benchmarks/ring.py --masks packed window
python benchmarks/ring.py --profile                           # docs/benchmarks/ring_trace.png: what runs beside what
python benchmarks/ring.py --device cpu                        # a rehearsal on gloo: tiny, and no figures worth keeping
python benchmarks/ring.py --render                            # table and plots of the reports anew, on any machine

All contestants of a case run in an order drawn anew for each of `--rounds` rounds, and the median counts: clocks drift
by percents. A GPU is kept busy for 2 ms before the first pass of a round: in training, too, the host is ahead of it;
what the host takes to issue a pass is in the report. A round's time is that of the slowest rank. FLOPs are 4 x dim x
attended (query, key) pairs x heads, and 2.5 times that backward. "one GPU" is our local kernel with heads divided by
the GPUs: the same work, and nothing sent. Memory is what a pass takes beside its inputs. A peer that is
not installed, or cannot run a case, is left out of it.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from report import begin, put, write
from ring_peers import CONTESTANTS, Case, Contestant, ours
from ring_report import render, render_trace, where_time_goes
from scaling import suggestions

from ringspan.parallel import copy_engine
from ringspan.parallel.transport import Lane, open_lane, pick_transport

SIZES = ("mask", "length", "heads", "kv_heads", "dim", "gpus")
LEAST_SECONDS = 0.05  # of one timing: as many passes in a row as that takes
PASS_FACTOR = 3.5  # forward and backward, in forward passes
HEAD_START = 4_000_000  # cycles that a GPU is given to spin, before what is timed
WIRE_ROWS = 16384  # of 8 heads of 128, keys and values: what the wire alone is timed with


def cases(arguments: argparse.Namespace, ranks: int) -> Iterator[Case]:
    """Causal by tokens a GPU; packed documents and a window by tokens in all."""
    for kv_heads in arguments.kv_heads:
        if "causal" in arguments.masks:
            for tokens in arguments.tokens:
                yield Case("causal", tokens * ranks, arguments.heads, kv_heads, arguments.dim)
        if "packed" in arguments.masks:
            for length in arguments.packed:
                yield Case(f"packed-{length // 16}", length, arguments.heads, kv_heads, arguments.dim)
        if "window" in arguments.masks:
            yield Case("window-4096", arguments.window, arguments.heads, kv_heads, arguments.dim)


class Clock:
    """Seconds between marks in the order of the device's work."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        if self.cuda:
            self.marks[-1].synchronize()
            return [a.elapsed_time(b) * 1e-3 for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]


class Seconds(NamedTuple):
    """Of a pass, on the slowest rank; ``host``: until both are issued."""

    forward: float
    backward: float
    host: float


def timed(contestant: Contestant, passes: int, device: torch.device) -> Seconds:
    with contestant.context():
        settle(device)
        if device.type == "cuda":
            torch.cuda._sleep(HEAD_START)
        clock, began = Clock(device), time.perf_counter()
        clock.mark()
        for _ in range(passes):
            out = contestant.forward()
            clock.mark()
            contestant.backward(out)
            clock.mark()
        issued = time.perf_counter() - began
        took = clock.seconds()
    sums = [sum(took[0::2]), sum(took[1::2]), issued]
    slowest = torch.tensor(sums, dtype=torch.float64, device=device) / passes
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return Seconds(*slowest.tolist())


def settle(device: torch.device) -> None:
    """All ranks stand here, with nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.all_reduce(torch.zeros(1, device=device))
    if device.type == "cuda":
        torch.cuda.synchronize()


def first_round(contestant: Contestant, device: torch.device) -> tuple[Seconds, float]:
    """Of one pass; and its memory beside q, k, v and dout, GiB: results, buffers, and what the ring holds for good."""
    if device.type != "cuda":
        return timed(contestant, 1, device), 0.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    took = timed(contestant, 1, device)
    peak = torch.cuda.max_memory_allocated() - before
    if contestant.facts.get("transport") == "copy_engine":
        peak += copy_engine.reserved_bytes()
    most = torch.tensor(float(peak), device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return took, round(most.item() / 2**30, 3)


def agreed(worked: bool, device: torch.device) -> bool:
    flag = torch.tensor(float(worked), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def ready(names: list[str], case: Case, device: torch.device) -> dict[str, Contestant]:
    """The contestants that can run the case, after their first pass."""
    running: dict[str, Contestant] = {}
    for name in names:
        reason = ""
        try:
            torch.manual_seed(dist.get_rank())
            running[name] = CONTESTANTS[name](case, device)
            with running[name].context():
                running[name].backward(running[name].forward())
            settle(device)
        except (ImportError, RuntimeError, TypeError, ValueError, AssertionError) as error:
            if name == "ours":
                raise
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
        if not agreed(not reason, device):
            running.pop(name, None)
            say(f"  {name} left out: {reason or 'another rank could not'}")
    return running


def measure(case: Case, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The report's row of a case."""
    running = ready(["ours", "one GPU", *arguments.peers], case, device)
    passes, seconds, gib = {}, dict[str, list[Seconds]](), {}
    began = time.monotonic()
    for name, contestant in running.items():
        took, gib[name] = first_round(contestant, device)
        passes[name] = max(1, min(20, round(LEAST_SECONDS / (took.forward + took.backward))))
        seconds[name] = [took] if passes[name] == 1 else []
    for number in range(arguments.rounds):
        # Enough is enough, on all ranks alike; at least one round
        if all(seconds.values()) and not agreed(time.monotonic() - began < arguments.seconds, device):
            break
        for name in random.Random(number).sample(list(running), len(running)):
            seconds[name].append(timed(running[name], passes[name], device))
    flops = 4.0 * case.dim * case.heads * int(case.spans().pairs().sum()) / dist.get_world_size()
    rates = {
        name: {**rate(flops, seconds[name]), "extra_gib": gib[name], **contestant.facts}
        for name, contestant in running.items()
    }
    mine, alone = rates.pop("ours", {}), rates.pop("one GPU", None)
    gpus = dist.get_world_size()
    row: dict[str, Any] = {**asdict(case), "gpus": gpus, "tokens_a_gpu": case.length // gpus, "ours": mine}
    return row | ({"one_gpu": alone} if alone else {}) | {"peers": rates}


def rate(flops: float, seconds: list[Seconds]) -> dict[str, Any]:
    forward, backward, host = (statistics.median(times) for times in zip(*seconds, strict=True))
    both = statistics.median(one.forward + one.backward for one in seconds)
    return {
        "value": digits(PASS_FACTOR * flops / both * 1e-12),
        "unit": "TFLOP/s a GPU",
        "forward": digits(flops / forward * 1e-12),
        "backward": digits(2.5 * flops / backward * 1e-12),
        "host_ms": digits(host * 1e3),
        "rounds": len(seconds),
    }


def digits(x: float) -> float:
    return float(f"{x:.4g}")


def line(row: dict[str, Any]) -> str:
    ours = row["ours"].get("value", 0.0)
    others = {"one GPU": row.get("one_gpu"), **row["peers"]}
    shown = "  ".join(f"{name} {x['value']:.0f} ({ours / x['value']:.3f})" for name, x in others.items() if x)
    size = f"{row['mask']:<13} {row['tokens_a_gpu']:>7} a GPU {row['heads']}/{row['kv_heads']}"
    mine = row["ours"]
    rates = f"{ours:.0f} ({mine.get('forward', 0):.0f}, {mine.get('backward', 0):.0f})"
    alone = row.get("one_gpu") or {}
    return (
        f"{size}: ours {rates}, one GPU ({alone.get('forward', 0):.0f}, {alone.get('backward', 0):.0f}), host "
        f"{mine.get('host_ms', 0):.1f} ms, {mine.get('extra_gib', 0):.2f} GiB  {shown}"
    )


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def wire_rate(device: torch.device, rounds: int = 8) -> float:
    """Bytes/s that a rank receives of its neighbour's keys and values, with nothing beside it."""
    group, dtype = dist.group.WORLD, torch.bfloat16
    assert group is not None
    shape = (1, WIRE_ROWS if device.type == "cuda" else 16, 8, 128)
    pair = torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
    nbytes, ranks = pair[0].numel() * dtype.itemsize, group.size()
    lane = open_lane(pick_transport("auto", group, device), group, device, Lane("keys", min(2, ranks - 1), nbytes))
    seconds = []
    for _ in range(rounds):
        settle(device)
        clock = Clock(device)
        clock.mark()
        exchange = lane.exchange(
            pair, (group.rank() + 1) % ranks, shape[1], (group.rank() - 1) % ranks, "the wire's timing"
        )
        exchange.wait()
        exchange.done()
        clock.mark()
        seconds += clock.seconds()
    slowest = torch.tensor(statistics.median(seconds), dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return 2 * nbytes / slowest.item()


def machine() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "machine": f"{dist.get_world_size()} x {torch.cuda.get_device_name()}" if cuda else "CPU",
        "versions": {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        },
        "dtype": "bfloat16" if cuda else "float32",
    }


def place(row: dict[str, Any]) -> tuple[int, int, int, int]:
    """In the table."""
    order = {"causal": 0, "packed": 1, "window": 2}
    return row["gpus"], order[row["mask"].split("-")[0]], -row["kv_heads"], row["length"]


def profile(arguments: argparse.Namespace, device: torch.device) -> None:
    """What runs when, on rank 0, in one forward and backward pass after others: ring_trace.json."""
    ranks = dist.get_world_size()
    case = Case("causal", arguments.tokens[0] * ranks, arguments.heads, arguments.kv_heads[0], arguments.dim)
    contestant = ours(case, device)
    for _ in range(3):
        contestant.backward(contestant.forward())
    settle(device)
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kind.CPU, kind.CUDA]) as trace:
        for _ in range(2):  # of which the second is shown: the host is ahead by then
            contestant.backward(contestant.forward())
        settle(device)
    if dist.get_rank() == 0:
        with tempfile.TemporaryDirectory() as folder:
            trace.export_chrome_trace(f"{folder}/trace.json")
            events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
        wanted = ("kernel", "gpu_memcpy", "gpu_memset") if device.type == "cuda" else ("cpu_op",)
        shown = [
            {"stream": one["tid"], "name": one["name"][:120], "start": one["ts"], "microseconds": one["dur"]}
            for one in events
            if one.get("cat") in wanted
        ]
        path = arguments.out.with_name("ring_trace.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"case": asdict(case), "gpus": ranks, "events": shown}) + "\n")
        say("\n".join(where_time_goes(shown)))
        render_trace(path)


def work(rank: int, world: int, store: str | None, arguments: argparse.Namespace) -> None:
    """A worker's life."""
    if arguments.device == "cuda":
        torch.cuda.set_device(rank)
        device = torch.device("cuda", rank)
    else:
        torch.set_num_threads(1)
        device = torch.device("cpu")
    backend = "cpu:gloo,cuda:nccl" if arguments.device == "cuda" else "gloo"
    if store is None:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.FileStore(store, world), rank=rank, world_size=world)
    settle(device)  # every communicator starts with all of its ranks
    if arguments.profile:
        profile(arguments, device)
    else:
        compare(arguments, device)
    dist.barrier()
    dist.destroy_process_group()


def compare(arguments: argparse.Namespace, device: torch.device) -> None:
    wire = wire_rate(device)
    say(f"wire: {wire * 1e-9:.0f} GB/s from a neighbour")
    report = begin(arguments.out, machine())
    report["wire_gbytes"] = digits(wire * 1e-9)
    # Few bytes first: boxes never shrink, and count as memory
    for case in sorted(cases(arguments, dist.get_world_size()), key=lambda one: one.length * one.kv_heads):
        began = time.monotonic()
        row = measure(case, arguments, device)
        say(f"{line(row)}  [{time.monotonic() - began:.0f} s]")
        put(report, row, SIZES)
        report["cases"].sort(key=place)
        if dist.get_rank() == 0:
            write(arguments.out, report)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if dist.get_rank() == 0:
        render(arguments.out)
        say("\n".join(suggestions(report)))


def tiny(arguments: argparse.Namespace) -> None:
    """Sizes for a rehearsal on the CPU."""
    arguments.tokens, arguments.packed, arguments.window = [64], [320], 320
    arguments.heads, arguments.kv_heads, arguments.dim = 4, [4, 2], 16


def start(task: Callable[..., None], arguments: argparse.Namespace) -> None:
    """On the workers that torchrun has started, or on as many of our own as there are GPUs."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        task(int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"]), None, arguments)
        return
    world = arguments.gpus or (torch.cuda.device_count() if arguments.device == "cuda" else 2)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(task, args=(world, f"{folder}/store", arguments), nprocs=world)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", nargs="+", default=["causal", "packed", "window"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2**n for n in (13, 14, 15, 16, 18)], help="a GPU")
    parser.add_argument("--packed", type=int, nargs="+", default=[2**17, 2**19], help="tokens of packed sequences")
    parser.add_argument("--window", type=int, default=2**19, help="tokens of the sequence with a window of 4096")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[32, 8])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--peers", nargs="*", default=[name for name in CONTESTANTS if name not in ("ours", "one GPU")])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=60, help="after which a case begins no further round")
    parser.add_argument("--gpus", type=int, default=0, help="workers to start; 0: one a GPU")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--profile", action="store_true", help="a trace of the first --tokens and --kv-heads, no table")
    parser.add_argument("--render", action="store_true", help="write the table and the plots anew")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "benchmarks" / "ring.json")
    arguments = parser.parse_args()
    if arguments.render:
        render(arguments.out)
        render_trace(arguments.out.with_name("ring_trace.json"))
        return
    if arguments.device == "cpu":
        tiny(arguments)
    elif not torch.cuda.is_available():
        sys.exit("this compares rings of GPUs, and there is none here; --device cpu rehearses")
    start(work, arguments)


if __name__ == "__main__":
    main()
