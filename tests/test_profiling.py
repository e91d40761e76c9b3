"""The time of a step by part: on traces made by hand, by brute force, and of real runs."""

import gzip
import json
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_parity import job, write_texts

from ringspan.kernels import torch_backend
from ringspan.parallel.parts import PREFIX, part, within
from ringspan.train.config import TrainConfig
from ringspan.train.loop import train
from ringspan.train.profile_parts import PARTS
from ringspan.train.profiling import KERNELS, Profile, Profiler, by_part, in_words, mean_of, winners

SLOW = 0.05  # seconds


def event(category, name, start, stop, **args):
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": stop - start, "args": args}


def ranges(*named):
    return [event("user_annotation", PREFIX + name, start, stop) for name, start, stop in named]


def kernel(number, launched, start, stop, name="block", category="kernel"):
    launch = event("cuda_driver", "cuLaunchKernelEx", launched, launched + 1, correlation=number)
    return [launch, event(category, name, start, stop, correlation=number)]


def microseconds(trace):
    profile = by_part({"traceEvents": trace}, "cuda" if any(one.get("cat") == "kernel" for one in trace) else "cpu")
    assert sum(profile.parts.values()) == pytest.approx(profile.seconds, abs=1e-12)
    return profile.seconds * 1e6, {name: round(s * 1e6, 3) for name, s in profile.parts.items() if s}


def test_on_a_cpu_a_moment_is_of_the_innermost_range():
    trace = ranges(
        ("step", 100, 1100),
        ("data", 110, 150),
        ("mlp", 200, 300),
        ("attention", 300, 500),
        ("ring", 350, 400),
        ("ring", 460, 500),
        ("gradients", 600, 900),
        ("mlp", 650, 700),
        ("optimizer", 900, 1000),
    )
    trace += [event("user_annotation", "somebody else's", 0, 2000), {"ph": "i", "name": "no span", "ts": 0}]
    other = 1000 - 40 - 100 - 200 - 300 - 100
    expected = {"attention": 110, "ring": 90, "mlp": 150, "gradients": 250, "optimizer": 100, "data": 40}
    assert microseconds(trace) == (1000, {**expected, "other": other})


def gpu_trace():
    """The host runs ahead: main thread, and autograd's from 100 on, while the main one waits in `gradients`."""
    host = ranges(
        ("step", 0, 1000),
        ("data", 0, 50),
        ("attention", 60, 80),
        ("ring", 75, 79),
        ("mlp", 85, 95),
        ("gradients", 100, 900),
        ("loss", 110, 120),
        ("attention", 135, 150),
        ("optimizer", 900, 980),
    )
    device = [
        kernel(1, 70, 100, 300),
        kernel(2, 72, 90, 350, "ncclDevKernel_SendRecv"),  # its last 50 us are beside nothing
        kernel(3, 90, 360, 560),
        kernel(4, 77, 400, 420, "Memcpy DtoD (Device -> Device)", "gpu_memcpy"),  # a push, beside the MLP
        kernel(9, 0, 650, 670, "Memcpy DtoD (Device -> Device)", "gpu_memcpy")[1:],  # one whose launch is not traced
        kernel(5, 115, 560, 600),
        kernel(6, 130, 600, 640, "ncclDevKernel_ReduceScatter"),
        kernel(7, 140, 700, 800),  # long since launched: it waits for another rank
        kernel(8, 905, 910, 950),
    ]
    return [*host, *(one for both in device for one in both)]


def test_on_a_gpu_kernels_are_of_the_range_that_launched_them_and_gaps_of_what_was_waited_for():
    expected = {
        "attention": 200 + 100,
        "ring": 10 + 10 + 50 + 60,  # waiting from launch + 10 us on; NCCL before and after the block; the gap
        "mlp": 200,
        "loss": 40,
        "gradients": 40,
        "optimizer": 10 + 40 + 30,  # as long as the host is in it, the device waits for its work
        "data": 50,
        "idle": 30 + 10 + 100 + 20,
    }
    assert microseconds(gpu_trace()) == (1000, expected)


def named(trace, device):
    """(name, part): (us, calls), the longest first."""
    kernels = by_part({"traceEvents": trace}, device).kernels
    return {(one["name"], one["part"]): (round(one["seconds"] * 1e6, 3), one["calls"]) for one in kernels}


def test_kernels_are_told_by_name_and_part_the_longest_first():
    assert named(gpu_trace(), "cuda") == {
        ("block", "attention"): (200 + 100, 2),
        ("ncclDevKernel_SendRecv", "ring"): (260, 1),
        ("block", "mlp"): (200, 1),
        ("block", "loss"): (40, 1),
        ("ncclDevKernel_ReduceScatter", "gradients"): (40, 1),
        ("block", "optimizer"): (40, 1),
        ("Memcpy DtoD (Device -> Device)", "ring"): (40, 2),
    }


def test_an_operator_of_a_cpu_takes_what_those_that_it_calls_do_not():
    trace = ranges(("step", 0, 100), ("mlp", 10, 60), ("loss", 60, 100))
    operators = [("linear", 5, 50), ("mm", 20, 45), ("mm", 62, 70), ("mm", 72, 75), ("copy_", 46, 48)]
    trace += [event("cpu_op", *one) for one in operators]
    trace += [event("python_function", "step", 0, 100)]
    assert list(named(trace, "cpu").items()) == [
        (("mm", "mlp"), (25, 1)),
        (("linear", "mlp"), (40 - 25 - 2, 1)),
        (("mm", "loss"), (11, 2)),
        (("linear", "other"), (5, 1)),  # before its part begins
        (("copy_", "mlp"), (2, 1)),
    ]


def test_so_many_kernels_are_kept():
    trace = ranges(("step", 0, 2000)) + [event("cpu_op", f"op{i}", 100 * i, 101 * i) for i in range(20)]
    assert [name for name, _ in named(trace, "cpu")] == [f"op{i}" for i in range(19, 19 - KERNELS, -1)]


def test_without_a_ring_nothing_waits_for_one():
    trace = ranges(("step", 0, 100), ("attention", 0, 10)) + kernel(1, 5, 60, 90)
    assert microseconds(trace) == (100, {"attention": 30, "idle": 70})


def test_a_trace_without_kernels_of_a_gpu_is_none():
    with pytest.raises(ValueError, match="the trace has no kernels: CUPTI is not there"):
        by_part({"traceEvents": ranges(("step", 0, 100))}, "cuda")


def test_copies_count_where_nothing_runs_and_kernels_outside_of_the_step_do_not():
    trace = ranges(("step", 100, 200), ("attention", 100, 105)) + kernel(1, 50, 60, 120) + kernel(3, 190, 190, 250)
    trace += kernel(2, 101, 110, 150, "Memcpy HtoD (Pinned -> Device)", "gpu_memcpy")
    assert microseconds(trace) == (100, {"other": 20 + 10, "attention": 30, "idle": 40})


def test_winners_against_every_moment():
    rng = np.random.default_rng(0)
    for _ in range(50):
        starts = rng.integers(0, 40, size=rng.integers(1, 12))
        spans = [(int(a), int(a + rng.integers(1, 12)), int(rng.integers(5))) for a in starts]
        told = winners(spans)
        for moment in range(min(starts), max(stop for _, stop, _ in spans)):
            expected = min((key for start, stop, key in spans if start <= moment < stop), default=None)
            assert next(key for time_, key in reversed(told) if time_ <= moment) == expected


def test_a_part_is_named_only_where_a_profiler_runs():
    assert isinstance(part("loss"), nullcontext)
    add = within("loss")(torch.add)
    assert add(torch.ones(2), 1).tolist() == [2, 2]


def run(config):
    """On a rank; each block of rank 1 takes SLOW longer."""
    real = torch_backend.forward

    def slow(*args, **kwargs):
        time.sleep(SLOW if torch.distributed.get_rank() == 1 else 0)
        return real(*args, **kwargs)

    torch_backend.forward = slow
    try:
        return train(config, config.run_dir)
    finally:
        torch_backend.forward = real


def test_chosen_steps_of_a_run_are_profiled_on_all_ranks(ranks, tmp_path):
    text = write_texts(tmp_path / "text", 33, 47)
    ring = replace(job(tmp_path, "ring", text, mesh=(1, 2, 1), steps=3, n_layers=1), profile=[2, 3])
    ulysses = replace(job(tmp_path, "ulysses", text, mesh=(1, 1, 2), steps=3, n_layers=1), profile=[3])
    losses = [ranks(2)(run, config, timeout=200) for config in (ring, ulysses)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert_profiled(Path(ring.run_dir, "profile"), ["step-00000002", "step-00000003"])
    assert_profiled(Path(ulysses.run_dir, "profile"), ["step-00000003"])


def assert_profiled(folder, steps):
    traces = [f"{step}-rank{rank}.trace.json.gz" for step in steps for rank in range(2)]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*traces, *(f"{step}.json" for step in steps)])
    for step, traced in zip(steps, (traces[:2], traces[2:]), strict=False):
        told = json.loads((folder / f"{step}.json").read_text())
        assert (told["step"], told["device"]) == (int(step[5:]), "cpu")
        for rank, (one, name) in enumerate(zip(told["ranks"], traced, strict=True)):
            assert sum(one["parts"].values()) == pytest.approx(one["seconds"], rel=1e-9)
            assert list(one["parts"]) == [part_ for part_ in PARTS if part_ != "idle"]
            assert all(s > 0 for s in one["parts"].values())
            again = by_part(json.loads(gzip.decompress((folder / name).read_bytes())), "cpu")
            assert again._asdict() == one
            assert one["parts"]["attention"] > SLOW * rank  # how much less the other takes, a busy machine decides
        assert told["kernels"] == told["ranks"][0]["kernels"]
        assert any("ringspan::" in one["name"] or "mm" in one["name"] for one in told["kernels"])
        assert told["seconds"] == pytest.approx(sum(one["seconds"] for one in told["ranks"]) / 2)


def test_a_full_disk_ends_no_run(ranks, tmp_path):
    assert all("training goes on" in "".join(said) for said in ranks(1)(profile_nowhere, str(tmp_path)))


def profile_nowhere(folder):
    said = []
    Path(folder, "profile").touch()  # no folder can be made here
    profiler = Profiler([1], folder, torch.device("cpu"), said.append)
    with profiler.step(1):
        torch.ones(2).sum()
    return said


def test_ranks_are_averaged_and_told_in_a_line():
    first, second = [{"name": "mm", "part": "mlp", "seconds": 0.25, "calls": 2}], []
    ranks_ = [
        Profile(1.0, {"attention": 0.5, "ring": 0.5}, first),
        Profile(2.0, {"attention": 2.0, "ring": 0.0}, second),
    ]
    mean = mean_of(ranks_)
    assert mean == Profile(1.5, {"attention": 1.25, "ring": 0.25}, first)
    assert in_words(mean) == "1.500 s with the profiler: attention 83.3%, exposed ring 16.7%"


@pytest.mark.parametrize("step", [0, -1, 101])
def test_a_step_that_never_comes_is_refused(step):
    with pytest.raises(ValueError, match=rf"profile=\[{step}\]: steps are counted from 1 to steps=100"):
        TrainConfig(name="x", run_dir="x", profile=[5, step])


@pytest.mark.gpu
def test_on_a_gpu_a_real_step_adds_up_and_has_its_kernels(ranks, tmp_path):
    text = write_texts(tmp_path / "text", 33, 47)
    config = replace(job(tmp_path, "profiled", text, steps=3), profile=[3])
    ranks(1, cuda=True)(train, config, config.run_dir, timeout=200)
    folder = Path(config.run_dir, "profile")
    told = json.loads((folder / "step-00000003.json").read_text())
    assert sum(told["parts"].values()) == pytest.approx(told["seconds"])
    assert all(told["parts"][name] > 0 for name in ("attention", "mlp", "loss", "optimizer", "idle"))
    assert told["parts"]["ring"] == 0
    assert all(one["part"] in PARTS and one["seconds"] > 0 and one["calls"] > 0 for one in told["kernels"])
    assert (folder / "step-00000003-rank0.memory.pickle").stat().st_size > 1000
