"""The allocator's history as a picture: who held how much, from whatever of it is remembered."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from ringspan.train import memory_picture
from ringspan.train.memory_picture import BEFORE, COLUMNS, draw, history, owner_of
from ringspan.train.metrics import GIB

ROOT = Path(memory_picture.__file__).resolve().parents[1]
LOSS = [{"filename": "/x/site-packages/torch/nn.py"}, {"filename": f"{ROOT}/train/loss.py"}, {"filename": "/mine.py"}]
ZERO = [{"filename": "/x/site-packages/deepspeed/zero.py"}, {"filename": "/mine.py"}]


def a_snapshot(events, left):
    """Of device 1; ``events``: (what, address, GiB, frames), 1 ms apart; ``left``: GiB by address at the end."""
    trace = [
        {"action": what, "addr": at, "size": int(size * GIB), "frames": frames, "time_us": 5000 + 1000 * i}
        for i, (what, at, size, frames) in enumerate(events)
    ]
    blocks = [{"requested_size": int(size * GIB), "state": "active_allocated"} for size in left.values()]
    free = {"requested_size": GIB, "state": "inactive"}
    segments = [{"device": 1, "blocks": [*blocks, free]}, {"device": 0, "blocks": [blocks[0]]}]
    return {"device_traces": [[], trace], "segments": segments}


EVENTS = [
    ("alloc", 10, 2.0, LOSS),
    ("segment_alloc", 10, 9.0, LOSS),  # asked of CUDA, and nobody's yet
    ("alloc", 20, 1.0, ZERO),
    ("free_requested", 99, 3.0, []),  # had come before
    ("free_completed", 99, 3.0, []),
    ("free_requested", 10, 2.0, LOSS),
    ("alloc", 30, 0.5, []),
]


def test_what_is_held_adds_up_to_what_is_there_at_the_end():
    found = history(a_snapshot(EVENTS, {20: 1.0, 30: 0.5, 40: 4.0}), 1)
    gib = [{name: size / GIB for name, size in held.items() if size} for held in found.held]
    assert found.seconds == pytest.approx([0, 0.002, 0.003, 0.005, 0.006])
    assert gib == [
        {BEFORE: 7, "train/loss.py": 2},
        {BEFORE: 7, "train/loss.py": 2, "deepspeed": 1},
        {BEFORE: 4, "train/loss.py": 2, "deepspeed": 1},
        {BEFORE: 4, "deepspeed": 1},
        {BEFORE: 4, "deepspeed": 1, "torch": 0.5},
    ]


def test_the_peak_is_seen_however_long_the_history():
    events = [("alloc", i, 1.0 + i % 7, LOSS) if i % 2 == 0 else ("free_requested", i - 1, 1.0 + (i - 1) % 7, LOSS)
              for i in range(10 * COLUMNS)]  # fmt: skip
    found = history(a_snapshot(events, {0: 5.0}), 1)
    assert len(found.seconds) <= COLUMNS + 1
    assert found.seconds == sorted(found.seconds)
    assert max(held.total() for held in found.held) == 12 * GIB


def test_owners_are_the_innermost_files_of_ours_else_packages(tmp_path):
    linked = tmp_path / "linked"
    linked.symlink_to(ROOT)
    mine = [{"filename": f"{ROOT}/.venv/lib/site-packages/torch/nn.py"}, {"filename": f"{linked}/train/loss.py"}]
    assert [owner_of(frames) for frames in (LOSS, ZERO, [], [{"filename": "??"}], mine)] == [
        "train/loss.py", "deepspeed", "torch", "torch", "train/loss.py",
    ]  # fmt: skip


def test_a_picture_names_the_largest_and_the_peak(tmp_path):
    many = [("alloc", i, 0.5 + i / 100, [{"filename": f"{ROOT}/train/part{i}.py"}]) for i in range(9)]
    draw(a_snapshot(many, {i: size for i, (_, _, size, _) in enumerate(many)}), 1, "a step", tmp_path / "x.svg")
    text = (tmp_path / "x.svg").read_text()
    names = re.findall(r"<!-- (.*?) -->", text)
    assert f"a step: {sum(size for _, _, size, _ in many):.2f} GiB at most" in names
    assert {"there before, 0.00", "train/part8.py, 0.58", "train/part3.py, 0.53", "others, 1.53"} <= set(names)
    assert not [name for name in names if name.startswith("train/part2.py")]
    draw({"device_traces": [[]], "segments": []}, 0, "nothing", tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


@pytest.mark.gpu
def test_on_a_gpu_what_lives_is_found():
    torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python")
    kept = torch.empty(GIB // 4, dtype=torch.uint8, device="cuda")
    torch.empty(GIB // 2, dtype=torch.uint8, device="cuda")
    snapshot = torch.cuda.memory._snapshot()
    torch.cuda.memory._record_memory_history(None)
    found = history(snapshot, torch.cuda.current_device())
    most, last = max(found.held, key=Counter.total), found.held[-1]
    assert last["tests/test_memory_picture.py"] == kept.numel()
    assert most.total() - last.total() == GIB // 2
