"""A rank that hangs is named, by itself and by those that wait for it."""

import json
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

from ringspan.train import watchdog
from ringspan.train.watchdog import FIRST_STEP, SLOW, Watchdog


def told(tmp_path, capfd, *phases, limit=0.2, world=1, store=None):
    """What a watchdog says when the last of ``phases`` never ends."""
    left = threading.Event()
    watch = Watchdog(tmp_path, limit, store or dist.HashStore(), rank=0, world=world, leave=left.set)
    watch.settle()
    for phase in phases:
        watch.at(phase)
    assert left.wait(20)
    return capfd.readouterr().err


def test_the_operation_is_named_and_stacks_are_written(tmp_path, capfd):
    said = told(tmp_path / "hang", capfd, "step 3: data", "step 3: update")
    assert said.startswith("hang: rank 0 has been in 'step 3: update' for 0 s; all ranks are there; stacks are in ")
    stacks = (tmp_path / "hang" / "rank-00000.stacks.txt").read_text()
    assert "test_watchdog.py" in stacks
    assert "Thread" in stacks
    assert "version" in json.loads((tmp_path / "hang" / "rank-00000.gloo.json").read_text())


def test_a_rank_that_hangs_on_a_full_disk_is_ended_all_the_same(tmp_path, capfd):
    (tmp_path / "hang").write_text("a file where the folder should be")
    said = told(tmp_path / "hang", capfd, "step 3: update")
    assert f"stacks could not be written: File exists ({tmp_path}/hang)" in said


def test_progress_keeps_it_quiet_and_closing_ends_it(tmp_path):
    left = threading.Event()
    watch = Watchdog(tmp_path, 0.3, dist.HashStore(), rank=0, world=1, leave=left.set)
    watch.settle()
    for i in range(10):
        watch.at(f"phase {i}")
        time.sleep(0.1)
    watch.close()
    time.sleep(0.6)
    assert not left.is_set()
    assert list(tmp_path.iterdir()) == []


def test_the_first_step_and_slow_ones_may_take_longer(monkeypatch, tmp_path):
    now = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    watch = Watchdog(tmp_path, 0.0, dist.HashStore(), rank=0, world=1)
    watch.limit = 10.0
    watch.at("compiling")
    assert watch.allowed() == 10 * FIRST_STEP
    now[0] = 70.0
    watch.settle()
    assert watch.allowed() == 10
    watch.at("a")  # the phase that ended the first step does not count
    watch.since = now[0]
    watch.longest = 0.0
    now[0] = 80.0
    watch.at("b")
    assert watch.allowed() == 10 * SLOW
    watch.at("evaluation", slow=True)
    assert watch.allowed() == max(10 * FIRST_STEP, 10 * SLOW)
    now[0] = 180.0
    watch.at("c")
    assert watch.longest == 10  # the evaluation is no measure of a step


def wait_or_hang(folder, hangs):
    """Rank 1 sleeps, the others wait for it; what each watchdog says."""
    said, left = [], threading.Event()
    print_ = watchdog.print = lambda line, **_: said.append(line)  # type: ignore[attr-defined]
    rank, world = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    watchdog.ANSWER_SECONDS = 3.0 if hangs == "silent" else 30.0
    watch = Watchdog(folder, 0.5, dist.PrefixStore(hangs, store), rank=rank, world=world, leave=left.set)
    watch.settle()
    watch.at("step 1: data")
    if rank == 1 and hangs == "silent":
        watch.close()  # as if it were stopped: it does not answer
    if rank != 1:
        watch.at("step 1: update")
    heard = left.wait(0 if rank == 1 and hangs == "silent" else 40)
    dist.barrier()
    del watchdog.print  # type: ignore[attr-defined]
    assert print_ is not None
    return heard, said


@pytest.mark.parametrize(
    ("hangs", "expected"),
    [
        ("busy", "all wait for ranks [1], in 'step 1: data'"),
        ("silent", "no answer from ranks [1]: stopped, ended"),
    ],
)
def test_those_who_wait_name_the_rank_that_is_behind(hangs, expected, tmp_path, ranks):
    results = ranks(4)(wait_or_hang, tmp_path, hangs, timeout=100)
    for rank, (heard, said) in enumerate(results):
        if rank == 1 and hangs == "silent":
            continue
        assert heard
        (line,) = said
        assert f"rank {rank} has been in" in line
        assert expected in line


HOLDS_PYTHON = """
import ctypes, sys, time
from pathlib import Path
import torch.distributed as dist
from ringspan.train import watchdog

watchdog.GRACE_SECONDS = 1.0
watch = watchdog.Watchdog(Path(sys.argv[1]), 2.0, dist.HashStore(), rank=0, world=1)
watch.settle()
watch.at("step 3: update")
time.sleep(1.2)  # it has looked
ctypes.PyDLL(None).sleep(100)
"""


def test_a_call_that_keeps_pythons_lock_ends_too(tmp_path):
    command = [sys.executable, "-c", HOLDS_PYTHON, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 1
    assert "Timeout (0:00:03)!" in found.stderr, found.stderr
    assert '"<string>", line 12 in <module>' in found.stderr
