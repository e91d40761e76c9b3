"""Whole runs: what they write, stop and resume, and what they refuse."""

import errno
import json
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import open_corpus
from test_parity import SEQ_LEN, job, write_texts

from ringspan.kernels import torch_backend
from ringspan.parallel.attention import SequenceAttention
from ringspan.parallel.mesh import Mesh
from ringspan.train import loop, tensors
from ringspan.train.data import DataConfig
from ringspan.train.loop import Trainer, resume_command, signals, train
from ringspan.train.loop_config import Backend, LoopConfig
from ringspan.train.manifest import read_manifest
from ringspan.train.model import ModelConfig
from ringspan.train.optim import OptimConfig
from ringspan.train.packing import PackedRows
from ringspan.train.step import Batches


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("loop")


@pytest.fixture(scope="module")
def text(root):
    return write_texts(root / "text", 5, 90)


def lines(config):
    return [json.loads(line) for line in Path(config.run_dir, "metrics.jsonl").read_text().splitlines()]


def curve(config):
    return [(line["step"], line["tokens"], line["train/loss"], line["train/grad_norm"]) for line in lines(config)]


def run(config):
    """On a rank: the run's result, an exit's code, or what a user is told."""
    try:
        return train(config, config.run_dir)
    except SystemExit as leaving:
        return f"exit {leaving.code}"
    except ValueError as error:
        return str(error)


def run_watched(config):
    """What is told, and whether somebody still watches over a run that never began, and would end the process."""
    said, watchdogs = run(config), [thread for thread in threading.enumerate() if thread.name == "watchdog"]
    for thread in watchdogs:
        thread.join(5)
    return said, any(thread.is_alive() for thread in watchdogs)


def run_stopped(config, step, rank):
    """SIGTERM to one rank, somewhere inside a step."""
    ends = Trainer.advance

    def advance(self):
        ends(self)
        if self.done.step == step and self.mesh.world > rank == torch.distributed.get_rank():
            os.kill(os.getpid(), signal.SIGTERM)

    Trainer.advance = advance
    before = signal.getsignal(signal.SIGTERM)
    try:
        return run(config), signal.getsignal(signal.SIGTERM) == before
    finally:
        Trainer.advance = ends


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_stop_and_resume_gives_the_identical_curve(zero, root, text, ranks):
    def same(name):
        return job(root, f"{name}-{zero}", text, mesh=(1, 2, 1), zero=zero, steps=6, layout="zigzag")

    whole, stopped = same("whole"), same("stopped")
    losses = ranks(2)(run, whole, timeout=200)
    assert losses == [lines(whole)[-1]["train/loss"]] * 2
    assert ranks(2)(run_stopped, stopped, 3, 1, timeout=200) == [("exit 0", True)] * 2
    assert [path.name for path in Path(stopped.run_dir, "checkpoints").iterdir()] == ["step-00000003"]
    assert ranks(2)(run, stopped, timeout=200) == losses
    assert curve(stopped) == curve(whole)  # to the last bit
    assert ranks(2)(run, stopped, timeout=200) == losses  # nothing is left to do


def test_saves_and_logs_as_often_as_told_and_resumes_from_a_path(root, text, ranks):
    config = job(root, "saves", text, steps=5, save_every=2, log_every=3)
    ranks(1)(run, config, timeout=200)
    folder = Path(config.run_dir, "checkpoints")
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000004", "step-00000005"]
    assert [line["step"] for line in lines(config)] == [3, 5]
    assert [line["tokens"] for line in lines(config)] == [3 * 8 * SEQ_LEN, 5 * 8 * SEQ_LEN]
    branch = replace(job(root, "branch", text, steps=5), resume=str(folder / "step-00000002"))
    ranks(1)(run, branch, timeout=200)
    assert [line["step"] for line in lines(branch)] == [3, 4, 5]
    assert curve(branch)[-1] == curve(config)[-1]
    fresh = replace(branch, resume="none", steps=1)
    ranks(1)(run, fresh, timeout=200)
    assert [line["step"] for line in lines(fresh)] == [1]


def test_a_run_goes_on_on_any_mesh_and_stage(root, text, ranks):
    def part(name, steps, mesh, zero, layout="zigzag", accumulation=1):
        config = job(root, name, text, mesh=mesh, zero=zero, steps=steps, layout=layout, accumulation=accumulation)
        return replace(config, optim=OptimConfig(lr=1e-2, warmup_steps=0, min_lr=1.0))  # whatever `steps` is

    whole = part("one-mesh", 8, (1, 1, 1), 0)
    ranks(1)(run, whole, timeout=200)
    for steps, mesh, zero, layout, accumulation in (
        (2, (2, 2, 1), 1, "zigzag", 1),
        (4, (1, 1, 2), 3, "contiguous", 2),
        (6, (2, 2, 2), 2, "striped", 1),
        (8, (4, 1, 1), 0, "zigzag", 2),
    ):
        config = part("many-meshes", steps, mesh, zero, layout, accumulation)
        world = mesh[0] * mesh[1] * mesh[2]
        assert len(set(ranks(world)(run, config, timeout=280))) == 1
    got = curve(config)
    assert [line[:2] for line in got] == [line[:2] for line in curve(whole)]
    for ours, expected in zip(got, curve(whole), strict=True):
        assert ours[2:] == pytest.approx(expected[2:], rel=1e-4), ours[0]  # fp32: sums in another order
    said = json.loads(Path(config.run_dir, "run.json").read_text())["changed"]
    assert "parallel.data was 2 and is 4" in said


def test_another_model_or_other_data_is_refused_on_resume_and_nothing_is_lost(root, text, ranks):
    config = job(root, "refused", text, steps=1)
    ranks(1)(run, config, timeout=200)
    before = {path: path.read_bytes() for path in Path(config.run_dir).rglob("*") if path.is_file()}
    other = write_texts(root / "other", 6, 91)
    for changed, message in (
        (replace(config, model=ModelConfig(dim=32, n_layers=1)), "model.n_layers was 2 and is 1"),
        (job(root, "refused", other, steps=2), "data (digest of its tokens) was"),
    ):
        told = ranks(1)(run, changed)[0]
        assert message in told
        assert "start it as it was, or anew with resume=none" in told
    assert {path: path.read_bytes() for path in Path(config.run_dir).rglob("*") if path.is_file()} == before


def test_the_wall_clock_limit_saves_and_leaves_on_all_ranks(root, text, ranks):
    config = job(root, "time", text, mesh=(1, 2, 1), steps=50, max_hours=1e-9)
    assert ranks(2)(run, config, timeout=200) == ["exit 0"] * 2
    assert [line["step"] for line in lines(config)] == [1]
    assert [path.name for path in Path(config.run_dir, "checkpoints").iterdir()] == ["step-00000001"]


def files_of(config):
    """What the last checkpoint's tensors are, by file."""
    manifest = read_manifest(sorted(Path(config.run_dir, "checkpoints").iterdir())[-1])
    return {name: file.sha256 for name, file in manifest.files.items()}


def test_two_deterministic_runs_are_the_same_to_the_bit(root, text, ranks):
    first, second = (
        replace(job(root, name, text, mesh=(2, 2, 1), zero=2, steps=3, layout="striped"), deterministic=True)
        for name in ("deterministic-1", "deterministic-2")
    )
    for config in (first, second):
        assert ranks(4)(run_telling_determinism, config, timeout=200) == [({True}, False)] * 4
    assert curve(first) == curve(second)
    assert files_of(first) == files_of(second)


def run_telling_determinism(config):
    """Whether torch was told inside a step, and is as it was afterwards."""
    torch.seed()  # where torch's generators stand must not matter
    update, inside = Trainer.update, set()
    Trainer.update = lambda self: (inside.add(torch.are_deterministic_algorithms_enabled()), update(self))[1]
    try:
        run(config)
    finally:
        Trainer.update = update
    return inside, torch.are_deterministic_algorithms_enabled()


def run_on_a_full_disk(config, full):
    """No file of rank 1 can be written at the steps in ``full``."""
    write = tensors.write

    def failing(path, *content):
        if torch.distributed.get_rank() == 1 and int(path.parent.name[5:13]) in full:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, *content)

    tensors.write = failing
    try:
        return run(config)
    finally:
        tensors.write = write


def test_a_run_goes_on_when_a_checkpoint_cannot_be_written_but_does_not_end_so(root, text, ranks, capfd):
    config = job(root, "full", text, mesh=(1, 2, 1), steps=4, save_every=1)
    losses = ranks(2)(run_on_a_full_disk, config, {2}, timeout=200)
    assert losses == [lines(config)[-1]["train/loss"]] * 2
    kept = ["step-00000001", "step-00000003", "step-00000004"]
    assert sorted(path.name for path in Path(config.run_dir, "checkpoints").iterdir()) == kept
    longer = replace(config, steps=5)
    for told in ranks(2)(run_on_a_full_disk, longer, {5}, timeout=200):
        assert "step-00000005 is not complete: rank 1: No space left on device" in told
    assert sorted(path.name for path in Path(config.run_dir, "checkpoints").iterdir()) == kept


def run_counting(config):
    calls = []
    real = torch_backend.forward
    torch_backend.forward = lambda *a, **k: (calls.append(a[0].shape), real(*a, **k))[1]
    try:
        result = run(config)
    finally:
        torch_backend.forward = real
    return result, calls


def test_files_that_are_no_text_are_counted(root, ranks):
    folder = Path(write_texts(root / "mixed", 33, 47))
    (folder / "picture.txt").write_bytes(b"\xff\xfe\x00")
    config = job(root, "mixed-run", str(folder), steps=1)
    ranks(1)(run, config, timeout=200)
    assert "1 files or rows left out" in json.loads(Path(config.run_dir, "run.json").read_text())["corpus"]


def test_what_is_recorded_is_what_was_asked_for_and_what_runs(root, text, ranks):
    config = job(root, "picked", text, mesh=(1, 2, 1), steps=2, layout="striped", attention=Backend.torch)
    results = ranks(2)(run_counting, config, timeout=200)
    said = json.loads(Path(config.run_dir, "run.json").read_text())
    assert said["attention"] == {"strategy": "ring", "backend": "torch", "transport": "p2p", "layout": "striped"}
    # Each half of the 64 positions is one tile a row, which all ranks compute in step 0; in step 1 the second rank
    # computes its queries against the first one's keys while that waits: 2 tiles, where the mean rank has 1.5.
    assert said["first_micro_batch"] == {"tokens_of_a_rank": 256, "chunks_of_a_rank": 1, "ring_imbalance": 0.3333}
    lines = Path(config.run_dir, "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["perf/ring_imbalance"] for line in lines] == pytest.approx([1 / 3, 1 / 3])
    assert said["mesh"] == {"data": 1, "ring": 2, "ulysses": 1}
    assert said["engine"] == {"device": "cpu", "dtype": "torch.float32", "zero": 1, "optimizer": "adamw"}
    assert "left out" not in said["corpus"]
    for _, calls in results:
        steps, layers, blocks, shares = 2, 2, 2, 2  # of the heads: each takes its own turns
        assert 0 < len(calls) <= steps * layers * blocks * shares  # a block without keys is skipped
        assert {shape[:2] for shape in calls} == {(8, SEQ_LEN // 2)}  # half of each of 8 rows: a ring of two


def test_a_backend_that_cannot_run_is_refused_and_never_replaced(root, text, ranks):
    config = job(root, "triton", text, steps=1, attention=Backend.triton)
    said, watched = ranks(1)(run_watched, config)[0]
    assert "train.attention=triton cannot run here" in said
    assert not watched
    assert not Path(config.run_dir, "metrics.jsonl").exists()


def test_documents_may_attend_across_their_ends(root, text, ranks):
    apart, across = job(root, "apart", text, steps=2), job(root, "across", text, steps=2)
    across.data.cross_document = True
    ranks(1)(run, apart, timeout=200)
    ranks(1)(run, across, timeout=200)
    assert curve(apart)[0] != curve(across)[0]


def local_batches(folder, data, ring, ulysses, layout):
    corpus, mesh = open_corpus(DataConfig(path=folder, cache=f"{folder}-cache")), Mesh.create(data, ring, ulysses)
    rows = PackedRows(corpus, 61, seed=1, cross_document=False)
    attend = SequenceAttention(mesh, layout)
    batches = Batches(rows, attend, 2, 2, torch.device("cpu"))
    loaded = batches.load(5)
    held = [attend.local_positions(batches.layout(one)[1]).tolist() for one in batches.rows_after(5)]
    shards = [[x.tolist() for x in (mb.tokens, mb.labels, mb.positions)] for mb in loaded]
    order = rows.order(5, batches.rows_of_a_step)
    whole = [[x.tolist() for x in rows.load(row, np.arange(61))] for row in order]
    return mesh.data_rank, held, shards, whole, [mb.attended for mb in loaded]


@pytest.mark.parametrize(("mesh", "layout"), [((2, 2, 1), "balanced"), ((1, 2, 2), "striped")])
def test_ranks_together_hold_every_position_of_every_row_once(mesh, layout, root, text, ranks):
    open_corpus(DataConfig(path=text, cache=f"{text}-cache"))
    results = ranks(4)(local_batches, text, *mesh, layout, timeout=100)
    data = mesh[0]
    seen = {}
    for data_rank, held, shards, whole, attended in results:
        assert whole == results[0][3]
        assert all(pairs > 0 for pairs in attended)
        for number, (tokens, labels, within) in enumerate(shards):
            for i in range(2):
                row = (number * 2 + i) * data + data_rank
                for at, *values in zip(held[number], tokens[i], labels[i], within[i], strict=True):
                    if at < 0:
                        assert values == [0, -100, 0]
                    else:
                        assert seen.setdefault((row, at), values) is values, "twice"
                        assert values == [x[at] for x in whole[row]]
    assert len(seen) == 4 * data * 61


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch": 0}, r"train\.micro_batch=0: must be 1 or more"),
        ({"accumulation": -1}, r"train\.accumulation=-1"),
        ({"log_every": 0}, r"train\.log_every=0"),
        ({"save_every": -1}, r"train\.save_every=-1: must be 0 or more"),
        ({"skip_limit": 0}, r"train\.skip_limit=0: must be 1 or more"),
        ({"keep": -1}, r"train\.keep=-1"),
        ({"max_hours": -0.5}, r"train\.max_hours=-0\.5"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        LoopConfig(**changes)


def test_the_resume_command_is_the_one_that_started_the_run(root, text, monkeypatch):
    config = replace(job(root, "again", text), run_dir="/runs/my run", name="again")
    monkeypatch.setattr(sys, "argv", ["launch/train.py", "seq_len=64", "name=x", "resume=none", "model=tiny"])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    end = "launch/train.py seq_len=64 model=tiny name=again 'run_dir=/runs/my run'"
    assert resume_command(config) == f"python {end}"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    assert resume_command(config) == f"torchrun --nproc_per_node=4 {end}"
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    told = "on each of the 2 hosts, with the --rdzv options that it had: "
    assert resume_command(config) == f"{told}torchrun --nproc_per_node=4 --nnodes=2 {end}"
    monkeypatch.setattr(sys, "argv", ["launch/train.py", "-m", "seq_len=64,128"])
    assert resume_command(config) == "the job's own values, without -m, and run_dir='/runs/my run'"


def refuse_on_rank_zero():
    def make():
        raise ValueError("no such text")

    try:
        loop.from_rank_zero(make)
    except ValueError as error:
        return str(error)


def test_a_mistake_found_by_rank_zero_reaches_all(ranks):
    assert ranks(2)(refuse_on_rank_zero) == ["no such text"] * 2


def test_the_first_signal_asks_and_the_second_leaves_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with signals() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGTERM)
        assert stop()
        with pytest.raises(SystemExit) as left:
            signal.raise_signal(signal.SIGTERM)
    assert left.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
