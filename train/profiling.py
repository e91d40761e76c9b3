"""Where the time of a step goes: a profiler's trace of chosen steps, the CUDA allocator's history, and seconds by part.

The parts are ranges that the code names (parallel/parts.py). On a CPU a moment is of the range that has begun last. On
CUDA it is of the kernel that runs, and a kernel is of the range that has launched it, forward or backward; a moment
without a kernel is a wait, for the ring or for the host. So parts add up to the step.
"""

from __future__ import annotations

import bisect
import gzip
import heapq
import json
import os
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ringspan.parallel.parts import PREFIX, part
from ringspan.train.agree import of_every_rank
from ringspan.train.files import why, write_json
from ringspan.train.memory_picture import draw
from ringspan.train.profile_parts import PARTS

HOST_WORKS = {"data", "optimizer"}  # parts in which the host computes itself, where the device waits for it
LATENCY = 10.0  # us from a launch to its start on a device that has nothing else to do
ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}  # categories of a trace, as are the next
LAUNCHES = {"cuda_runtime", "cuda_driver"}
KERNELS = 12  # that take longest, which are kept by name
HISTORY = 200_000  # allocations and frees of a step that are remembered


class Profile(NamedTuple):
    seconds: float  # of the step
    parts: dict[str, float]  # seconds, by PARTS; they add up to it
    kernels: list[dict[str, Any]]  # name, part, seconds and calls of each of KERNELS; see `longest`


class Profiler:
    """Profiles the ``steps`` of a run into ``run_dir``/profile, on all ranks: step-N.json has the seconds by part, and
    step-N-rankR has the trace (.trace.json.gz, for https://ui.perfetto.dev) and, on CUDA, the allocator's history
    (.memory.svg, a picture, and .memory.pickle, for https://pytorch.org/memory_viz). ``say`` is told what was found."""

    def __init__(self, steps: Sequence[int], run_dir: str, device: torch.device, say: Callable[[str], None]) -> None:
        self.steps, self.folder, self.device, self.say = set(steps), Path(run_dir, "profile"), device, say

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Inside is that step. All ranks come here together; a disk that is full is told, and ends no run."""
        if number not in self.steps:
            yield
            return
        name = f"step-{number:08d}"
        path = self.folder / f"{name}-rank{dist.get_rank()}"
        with suppress(OSError):  # who writes the trace says so
            self.folder.mkdir(parents=True, exist_ok=True)
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # above all that it prints, a line or more on each rank
        # acc_events: there is one cycle, and without it torch warns that those before are lost
        with self._allocations(path), torch.profiler.profile(activities=kinds, acc_events=True) as traced:
            self._synchronize()
            with part("step"):
                yield
                self._synchronize()
        every = of_every_rank(self._kept(traced, path))
        if dist.get_rank() == 0:
            self._tell(number, name, every)

    def _kept(self, traced: torch.profiler.profile, path: Path) -> tuple[Profile | None, str | None]:
        """What was found, or why nothing was."""
        try:
            return by_part(keep(traced, path), self.device.type), None
        except OSError as error:
            return None, why(error, path)
        except ValueError as error:
            return None, str(error)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def _allocations(self, path: Path) -> Iterator[None]:
        """Keep what the allocator does inside, also where it runs out of memory."""
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python", max_entries=HISTORY)
        try:
            yield
        finally:
            snapshot = torch.cuda.memory._snapshot()
            torch.cuda.memory._record_memory_history(None)
            with suppress(OSError):
                Path(f"{path}.memory.pickle").write_bytes(pickle.dumps(snapshot))
                draw(
                    snapshot,
                    torch.cuda.current_device(),
                    f"{path.name}, by who asked for it",
                    Path(f"{path}.memory.svg"),
                )

    def _tell(self, number: int, name: str, every: list[tuple[Profile | None, str | None]]) -> None:
        problems = [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(every) if problem]
        ranks = [found for found, _ in every if found is not None]
        if not problems:
            mean = mean_of(ranks)
            facts = {"step": number, "device": self.device.type, **mean._asdict()}
            try:
                write_json(self.folder / f"{name}.json", {**facts, "ranks": [one._asdict() for one in ranks]})
            except OSError as error:
                problems = [why(error, self.folder)]
            else:
                self.say(f"step {number}: {in_words(mean)}; trace in {self.folder}")
        if problems:
            self.say(f"step {number}: no profile: {'; '.join(problems)}; training goes on")


def keep(traced: torch.profiler.profile, path: Path) -> dict[str, Any]:
    """Write PATH.trace.json.gz; the trace as it was read back."""
    plain = Path(f"{path}.trace.json")
    try:
        traced.export_chrome_trace(str(plain))
        text = plain.read_bytes()
        trace = json.loads(text)  # what a full disk has cut is not kept
        Path(f"{plain}.gz").write_bytes(gzip.compress(text, compresslevel=5))
    finally:
        plain.unlink(missing_ok=True)
    return trace


def mean_of(ranks: Sequence[Profile]) -> Profile:
    """Of their seconds; kernels are rank 0's."""
    parts = {name: sum(one.parts.get(name, 0.0) for one in ranks) / len(ranks) for name in ranks[0].parts}
    return Profile(sum(one.seconds for one in ranks) / len(ranks), parts, ranks[0].kernels)


def in_words(profile: Profile) -> str:
    shares = (f"{PARTS[name]} {seconds / profile.seconds:.1%}" for name, seconds in profile.parts.items())
    return f"{profile.seconds:.3f} s with the profiler: {', '.join(shares)}"


class Activity(NamedTuple):
    """A kernel or a copy on the device; times in us, as in all of a trace."""

    start: float
    stop: float
    launched: float
    part: str
    hidden: bool  # whether it counts only where nothing else runs: exchanges and copies
    name: str


def by_part(trace: dict[str, Any], device_type: str) -> Profile:
    """Of a Chrome trace of one step on one rank. ValueError: it was to have kernels and has none."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    host = Host(events)
    activities = sorted(on_device(events, host))
    if device_type == "cuda" and not activities:
        raise ValueError("the trace has no kernels: CUPTI is not there, or another profiler has it")
    seconds = dict.fromkeys((name for name in PARTS if activities or name != "idle"), 0.0)
    shares = device_shares(activities, host) if activities else host.shares(host.start, host.stop)
    for name, us in shares:
        seconds[name] += us / 1e6
    return Profile((host.stop - host.start) / 1e6, seconds, longest(events, host, activities))


def longest(events: Sequence[dict[str, Any]], host: Host, activities: Sequence[Activity]) -> list[dict[str, Any]]:
    """The KERNELS that take longest, by name and part; on a CPU operators, each without those that it calls."""
    took: dict[tuple[str, str], float] = defaultdict(float)
    calls: dict[tuple[str, str], set[float]] = defaultdict(set)  # by when they began
    on_gpu = ((one.name, one.part, one.start, one.stop - one.start) for one in activities)
    for name, where, start, us in on_gpu if activities else on_cpu(events, host):
        took[name, where] += us
        calls[name, where].add(start)
    found = sorted(took.items(), key=lambda one: -one[1])[:KERNELS]
    return [{"name": key[0], "part": key[1], "seconds": us / 1e6, "calls": len(calls[key])} for key, us in found]


def on_cpu(events: Sequence[dict[str, Any]], host: Host) -> Iterator[tuple[str, str, float, float]]:
    """(name, part, start, us) of operators: a moment is of the one that has begun last, as it is with parts."""
    operators = [event for event in events if event.get("cat") == "cpu_op"]
    told = winners([(one["ts"], one["ts"] + one["dur"], (-one["ts"], one["name"])) for one in operators])
    for (a, key), (b, _) in pairwise(told):
        if key is not None:
            yield from ((key[1], where, -key[0], us) for where, us in host.shares(a, b))


class Host:
    """What the host is doing at any moment of the step."""

    def __init__(self, events: Sequence[dict[str, Any]]) -> None:
        ranges = [
            (event["ts"], event["ts"] + event["dur"], event["name"].removeprefix(PREFIX))
            for event in events
            if event.get("cat") == "user_annotation" and event["name"].startswith(PREFIX)
        ]
        self.start, self.stop = next((start, stop) for start, stop, name in ranges if name == "step")
        self.rings = any(name == "ring" for *_, name in ranges)
        # Of the main thread and autograd's, which one of them waits for, the one that has begun last is at work
        self.told = winners([(start, stop, (-start, name)) for start, stop, name in ranges])
        self.times = [time for time, _ in self.told]

    def part(self, time: float) -> str:
        """Of the range that has begun last."""
        at = bisect.bisect_right(self.times, time) - 1
        key = self.told[at][1] if at >= 0 else None
        return key[1] if key is not None and key[1] in PARTS else "other"

    def shares(self, start: float, stop: float) -> Iterator[tuple[str, float]]:
        """(part, us) between the two moments."""
        within = self.times[bisect.bisect_right(self.times, start) : bisect.bisect_left(self.times, stop)]
        for a, b in pairwise([start, *within, stop]):
            yield self.part(a), b - a


def on_device(events: Sequence[dict[str, Any]], host: Host) -> Iterator[Activity]:
    launches = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
    }
    for event in events:
        if event.get("cat") not in ON_DEVICE:
            continue
        start, stop = max(event["ts"], host.start), min(event["ts"] + event["dur"], host.stop)
        launched, copy = launches.get(event.get("args", {}).get("correlation")), event["cat"] == "gpu_memcpy"
        exchange = "nccl" in event["name"].lower()
        if launched is None:  # calls of the driver are traced for kernels alone, and the copy engine's pushes are such
            launched, name = event["ts"], "ring" if copy and host.rings else host.part(event["ts"])
        else:
            name = host.part(launched)
        if exchange and name == "attention":
            name = "ring"
        elif exchange and name not in {"ring", "optimizer"}:
            name = "gradients"
        if start < stop:
            to_host = copy and "DtoD" not in event["name"]
            yield Activity(start, stop, launched, name, exchange or to_host or name == "ring", event["name"])


def device_shares(activities: Sequence[Activity], host: Host) -> Iterator[tuple[str, float]]:
    """(part, us) of all moments of the step. Of what runs at once, that counts which the step needs anyway."""
    order = {name: number for number, name in enumerate(PARTS)}
    spans = [(one.start, one.stop, (one.hidden, order[one.part], one.part)) for one in activities]
    told = winners([*spans, (host.start, host.stop, (True, len(order), ""))])
    computing = [one for one in activities if not one.hidden]
    starts = [one.start for one in computing]
    for (a, key), (b, _) in pairwise(told):
        assert key is not None, "the step is a span that is always there"
        if key[2]:
            yield key[2], b - a
        else:
            after = bisect.bisect_left(starts, b)
            yield from gap_shares(a, b, computing[after] if after < len(computing) else None, host)


def gap_shares(a: float, b: float, after: Activity | None, host: Host) -> Iterator[tuple[str, float]]:
    """(part, us) of a time in which nothing ran: until the kernel that computes ``after`` it was launched, the device
    waited for the host, and from then on for something else, which for a block of attention is another rank."""
    waits = after is not None and host.rings and after.part in {"attention", "ring"}
    launched = min(max(after.launched + LATENCY, a), b) if after is not None and waits else b
    for name, us in host.shares(a, launched):
        yield (name if name in HOST_WORKS else "idle"), us
    yield "ring", b - launched


def winners(spans: Sequence[tuple[float, float, Any]]) -> list[tuple[float, Any]]:
    """(from when on, the smallest key of the spans (start, stop, key) that are there then; None: there is none)."""
    coming, here = sorted(spans, reverse=True), list[tuple[Any, float]]()
    told = []
    for time in sorted({edge for start, stop, _ in spans for edge in (start, stop)}):
        while coming and coming[-1][0] <= time:
            _, stop, key = coming.pop()
            heapq.heappush(here, (key, stop))
        while here and here[0][1] <= time:
            heapq.heappop(here)
        told.append((time, here[0][0] if here else None))
    return told
