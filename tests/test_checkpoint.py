"""Checkpoints as ranks write them together: in the background, whole or not at all, and found again."""

import errno
import os
import resource
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_manifest import saved

from ringspan.train import checkpoint, tensors
from ringspan.train.checkpoint import Checkpointer, Reader, check_writable, choose, require_room
from ringspan.train.manifest import read_manifest

CPU = torch.device("cpu")


class Counting:
    """As much of `State` as a checkpointer sees: each rank has four elements of "w", all of a given value."""

    def __init__(self, value=0.0):
        self.mine = torch.full((4,), value)

    def to_save(self):
        yield "master", "w", 4 * dist.get_rank(), self.mine

    def shapes(self):
        return {"w": [4 * dist.get_world_size()]}

    def scalars(self):
        return {}


def save(checkpoints, step, value=0.0, **changes):
    checkpoints.begin(Counting(value), CPU, saved(step, **changes))
    return checkpoints.wait()


def names(run_dir):
    return sorted(path.name for path in Path(run_dir, "checkpoints").iterdir())


def values(folder):
    return Reader(folder, read_manifest(folder)).read("master", "w", 0, 4 * dist.get_world_size()).tolist()


def save_and_go_on(run_dir):
    """The state changes while the first checkpoint is written, which waits for us."""
    checkpoints, state, may_write = Checkpointer(run_dir), Counting(1.0), threading.Event()
    real = tensors.write
    tensors.write = lambda *given: (may_write.wait(20), real(*given))[1]
    try:
        checkpoints.begin(state, CPU, saved(1))
        state.mine.fill_(2.0)
        before = choose(run_dir, "auto")[0]
        dist.barrier()  # the main threads talk while the writers do
        may_write.set()
        assert checkpoints.wait() is None
        checkpoints.begin(state, CPU, saved(2))
        assert checkpoints.wait() is None
    finally:
        tensors.write = real
    newest = choose(run_dir, "auto")[0]
    return before, newest.name, values(newest.with_name("step-00000001")), values(newest)


def test_what_is_written_is_the_state_when_it_was_asked_for(tmp_path, ranks):
    for before, newest, first, second in ranks(2)(save_and_go_on, str(tmp_path)):
        assert before is None
        assert (newest, first, second) == ("step-00000002", [1.0] * 8, [2.0] * 8)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    files = sorted(path.name for path in (tmp_path / "checkpoints" / "step-00000001").iterdir())
    assert files == ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"]


def save_on_a_full_disk(run_dir):
    """On rank 1 the disk is full in the middle of its file, the second time."""
    checkpoints = Checkpointer(run_dir)
    assert save(checkpoints, 1, 1.0) is None
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        problem = save(checkpoints, 2, 2.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    newest, left = choose(run_dir, "auto")[0].name, names(run_dir)
    dist.barrier()  # all have looked
    assert save(checkpoints, 2, 3.0) is None
    checkpoints.close()
    return problem, newest, left, values(choose(run_dir, "auto")[0])


def test_a_full_disk_costs_that_checkpoint_alone_and_all_ranks_know(tmp_path, ranks):
    results = ranks(2)(save_on_a_full_disk, str(tmp_path))
    assert results[0] == results[1]
    problem, newest, left, content = results[0]
    assert problem.endswith(f"step-00000002 is not complete: rank 1: [Errno {errno.EFBIG}] File too large")
    assert (newest, left, content) == ("step-00000001", ["step-00000001"], [3.0] * 8)


def save_the_same_step_again(run_dir):
    checkpoints = Checkpointer(run_dir, keep=2)
    for step in (1, 2, 2, 3):
        if dist.get_rank() == 0:  # what a run that was killed has left
            Path(run_dir, "checkpoints", "step-00000009.half").mkdir(parents=True, exist_ok=True)
        assert save(checkpoints, step, float(step)) is None
        dist.barrier()
    return values(choose(run_dir, "auto")[0])


def test_a_step_saved_again_replaces_the_first_and_the_policy_is_followed(tmp_path, ranks):
    assert ranks(2)(save_the_same_step_again, str(tmp_path)) == [[3.0] * 8] * 2
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def save_three_and_damage(run_dir):
    checkpoints = Checkpointer(run_dir)
    for step in (1, 2, 3):
        assert save(checkpoints, step, float(step)) is None
    file = Path(run_dir, "checkpoints", "step-00000003", "rank-00001.safetensors")
    if dist.get_rank() == 0:
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
        Path(run_dir, "checkpoints", "step-00000002", "rank-00000.safetensors").unlink()
    dist.barrier()
    found = choose(run_dir, "auto")
    try:
        choose(run_dir, str(file.parent))
    except ValueError as error:
        return found, str(error)


def test_auto_goes_on_from_the_newest_whole_one_and_says_what_is_wrong_with_the_others(tmp_path, ranks):
    for (path, refused), told in ranks(2)(save_three_and_damage, str(tmp_path)):
        assert path == tmp_path / "checkpoints" / "step-00000001"
        changed = "rank-00001.safetensors has another SHA-256 than when it was written"
        assert refused == {
            "step-00000003": changed,
            "step-00000002": "rank-00000.safetensors: No such file or directory",
        }
        assert told.endswith(f"no checkpoint is whole (step-00000003: {changed}); resume=none starts anew")


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", "/proc/nothing/here"):
        with pytest.raises(ValueError, match=f"run_dir={folder}: .*; give another"):
            check_writable(str(folder), 1)
    check_writable(str(tmp_path), 1)
    assert names(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only folder")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="Permission denied"):
        check_writable(str(tmp_path), 1)


def test_a_disk_without_room_is_refused_with_what_it_takes(tmp_path):
    with pytest.raises(ValueError, match=r"GB free and a checkpoint takes 1000000000\.0 GB: make room, keep fewer"):
        require_room(tmp_path, 10**18)


def is_daemon():
    """The writer of a rank may wait for one that is gone; the process can leave all the same."""
    task = checkpoint.Task(lambda: time.sleep(60))
    return task.thread.daemon


def test_nobody_waits_for_a_writer_at_exit(ranks):
    assert ranks(1)(is_daemon) == [True]


def random_numbers(run_dir, resumed):
    checkpoints = Checkpointer(run_dir)
    if resumed:
        folder = choose(run_dir, "auto")[0]
        checkpoint.set_random_states(CPU, Reader(folder, read_manifest(folder)).random[dist.get_rank()])
    else:
        torch.manual_seed(dist.get_rank() + 7)
        torch.rand(5)
        assert save(checkpoints, 1) is None
    return torch.rand(3).tolist()


def test_random_states_go_on_on_each_rank(tmp_path, ranks):
    first = ranks(2)(random_numbers, str(tmp_path), False)
    assert first[0] != first[1]
    assert ranks(2)(random_numbers, str(tmp_path), True) == first
