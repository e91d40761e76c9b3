import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ringspan.train import checkpoint
from ringspan.train.checkpoint import Saved, find, read, require_same


def saved(step=3, **changes):
    config = {"model": {"dim": 8, "qk_norm": True}, "seq_len": 16}
    shape = {"world": 4, "zero": 1, "dtype": "torch.float32", "vocab_size": 320}
    return replace(Saved(step=step, tokens=48, rows_seen=3, loss=2.5, config=config, **shape), **changes)


def write(run_dir, step, seconds):
    folder = Path(run_dir, "checkpoints", f"step-{step:08d}")
    folder.mkdir(parents=True)
    (folder / "saved.json").write_text(json.dumps(asdict(saved(step, seconds=seconds))))
    return folder


def test_auto_finds_the_newest_whole_checkpoint(tmp_path):
    assert find(str(tmp_path), "auto") is None
    write(tmp_path, 20, seconds=50.0)
    newest = write(tmp_path, 10, seconds=60.0)  # the run has started again from an older one
    Path(tmp_path, "checkpoints", "step-00000030.half").mkdir()
    assert find(str(tmp_path), "auto") == newest
    assert find(str(tmp_path), "none") is None
    assert read(newest) == saved(10, seconds=60.0)


def test_a_path_is_taken_as_it_is(tmp_path):
    older = write(tmp_path, 10, seconds=1.0)
    write(tmp_path, 20, seconds=2.0)
    assert find("elsewhere", str(older)) == older
    with pytest.raises(ValueError, match=r"resume=.*/checkpoints: not a checkpoint; give auto, none or a folder"):
        find("elsewhere", str(tmp_path / "checkpoints"))


def test_a_damaged_checkpoint_is_named(tmp_path):
    folder = write(tmp_path, 10, seconds=1.0)
    (folder / "saved.json").write_text('{"step": 1')
    with pytest.raises(ValueError, match=r"step-00000010 is damaged: .*; delete it, or give resume=none"):
        find(str(tmp_path), "auto")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world": 2}, "saved with processes=4 and this run has processes=2: start it as it was"),
        ({"zero": 3}, "saved with engine.zero=1 and this run has engine.zero=3"),
        ({"dtype": "torch.bfloat16"}, "engine.dtype=torch.float32"),
        ({"vocab_size": 384}, "vocabulary=320"),
        ({"config": {"model": {"dim": 16, "qk_norm": True}}}, "model.dim=8 and this run has model.dim=16"),
        ({"config": {"model": {"dim": 8, "qk_norm": False}}}, "model.qk_norm=True"),
    ],
)
def test_another_shape_is_refused_in_one_line_that_says_which(changes, message):
    with pytest.raises(ValueError) as error:
        require_same(saved(), saved(**changes), Path("run/checkpoints/step-00000003"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_another_length_or_mesh_of_as_many_ranks_is_welcome():
    require_same(saved(), saved(config={**saved().config, "seq_len": 99}), Path("any"))


class Writer:
    """An engine that writes a file a rank, or fails half way."""

    def __init__(self, fails=False):
        self.fails = fails

    def save(self, folder):
        torch.save(dist.get_rank(), folder / f"{dist.get_rank()}.pt")
        if self.fails:
            raise OSError("no space left on device")


def save_over_and_over(run_dir):
    checkpoint.save(Writer(), run_dir, saved(1))
    try:
        checkpoint.save(Writer(fails=True), run_dir, saved(2))
    except OSError:
        dist.barrier()
    half_left = find(run_dir, "auto").name, Path(run_dir, "checkpoints", "step-00000002.half").exists()
    dist.barrier()  # all have looked
    again = checkpoint.save(Writer(), run_dir, saved(2))
    twice = checkpoint.save(Writer(), run_dir, saved(2, loss=9.0))  # the same step of a second attempt replaces it
    names = sorted(path.name for path in twice.iterdir())
    return half_left, again == twice == find(run_dir, "auto"), names, read(twice).loss


def test_a_half_written_checkpoint_is_never_taken_for_whole(tmp_path, ranks):
    for half_left, found, names, loss in ranks(2)(save_over_and_over, str(tmp_path)):
        assert half_left == ("step-00000001", True)
        assert found
        assert names == ["0.pt", "1.pt", "saved.json"]
        assert loss == 9.0
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000001", "step-00000002"]
