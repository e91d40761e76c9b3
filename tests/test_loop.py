"""Whole runs: what they write, stop and resume, and what they refuse."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_parity import SEQ_LEN, job, write_texts

from ringspan.kernels import torch_backend
from ringspan.parallel.attention import SequenceAttention
from ringspan.parallel.mesh import Mesh
from ringspan.train import loop
from ringspan.train.data import DataConfig, open_corpus
from ringspan.train.loop import Backend, LoopConfig, Trainer, resume_command, signals, train
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


def test_another_world_size_stage_or_model_is_refused_on_resume(root, text, ranks):
    config = job(root, "refused", text, steps=1)
    ranks(1)(run, config, timeout=200)
    for changed, message in (
        (job(root, "refused", text, steps=2, zero=2), "saved with engine.zero=1 and this run has engine.zero=2"),
        (replace(config, model=ModelConfig(dim=32, n_layers=1)), "n_layers=2 and this run has model.n_layers=1"),
    ):
        assert message in ranks(1)(run, changed)[0]
    two = job(root, "refused", text, mesh=(1, 2, 1), steps=2)
    assert all("processes=1 and this run has processes=2" in told for told in ranks(2)(run, two))


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
    assert "1 files left out, not being text" in json.loads(Path(config.run_dir, "run.json").read_text())["corpus"]


def test_what_is_recorded_is_what_was_asked_for_and_what_runs(root, text, ranks):
    config = job(root, "picked", text, mesh=(1, 2, 1), steps=2, layout="striped", attention=Backend.torch)
    results = ranks(2)(run_counting, config, timeout=200)
    said = json.loads(Path(config.run_dir, "run.json").read_text())
    assert said["attention"] == {"backend": "torch", "transport": "p2p", "layout": "striped"}
    assert said["mesh"] == {"data": 1, "ring": 2, "ulysses": 1}
    assert said["engine"] == {"device": "cpu", "dtype": "torch.float32", "zero": 1}
    assert "left out" not in said["corpus"]
    for _, calls in results:
        steps, layers, blocks = 2, 2, 2
        assert 0 < len(calls) <= steps * layers * blocks  # a block without keys is skipped
        assert {shape[:2] for shape in calls} == {(8, SEQ_LEN // 2)}  # half of each of 8 rows: a ring of two


def test_a_backend_that_cannot_run_is_refused_and_never_replaced(root, text, ranks):
    config = job(root, "triton", text, steps=1, attention=Backend.triton)
    assert "backend='triton' cannot run here" in ranks(1)(run, config)[0]
    assert not Path(config.run_dir, "metrics.jsonl").exists()


def test_a_loss_that_is_no_longer_finite_ends_the_run_and_names_the_step(root, text, ranks):
    config = replace(job(root, "diverges", text, mesh=(1, 2, 1), steps=9), optim=OptimConfig(lr=1e30, warmup_steps=2))
    for told in ranks(2)(run, config, timeout=200):
        assert "step 2: the gradient norm is nan; lower optim.lr (now 1e+30)" in told
    assert len(lines(config)) == 1


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
    shards = [[x.tolist() for x in (mb.tokens, mb.labels, mb.positions)] for mb in loaded]
    order = rows.order(5, batches.rows_of_a_step)
    whole = [[x.tolist() for x in rows.load(row, np.arange(61))] for row in order]
    return mesh.data_rank, batches.positions.tolist(), shards, whole, [mb.attended for mb in loaded]


@pytest.mark.parametrize(("mesh", "layout"), [((2, 2, 1), "zigzag"), ((1, 2, 2), "striped")])
def test_ranks_together_hold_every_position_of_every_row_once(mesh, layout, root, text, ranks):
    open_corpus(DataConfig(path=text, cache=f"{text}-cache"))
    results = ranks(4)(local_batches, text, *mesh, layout, timeout=100)
    data = mesh[0]
    seen = {}
    for data_rank, positions, shards, whole, attended in results:
        assert whole == results[0][3]
        assert all(pairs > 0 for pairs in attended)
        for number, (tokens, labels, within) in enumerate(shards):
            for i in range(2):
                row = (number * 2 + i) * data + data_rank
                for at, *values in zip(positions, tokens[i], labels[i], within[i], strict=True):
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
    assert resume_command(config) == f"torchrun --nproc_per_node=4 {end}"
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
