"""Each metric against numbers worked out by hand, and what a run leaves behind: files, W&B, one progress line."""

import io
import itertools
import json
import math
import re
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from ringspan.train import metrics, wandb_run
from ringspan.train.measured import Measured
from ringspan.train.metrics import METRICS, LoggerConfig, Ranks, WandbMode, flops_per_step, peak_of, record
from ringspan.train.run_log import RunLog

CPU = torch.device("cpu")
NUMBERS = {
    "step": 3,
    "tokens": 6000,
    "loss": 2.5,
    "grad_norm": 0.7,
    "lr": 1e-3,
    "step_tokens": 2000,
    "step_flops": 8e12,
    "step_seconds": 0.5,
    "data_seconds": 0.05,
    "save_seconds": 0.01,
    "exposed_comm_seconds": 0.005,
    "ring_imbalance": 0.02,
    "skipped": 2,
    "memory": {"weights": 1.0, "optimizer": 3.0, "activations": None, "gradients": None, "transport": 0.0},
    "world": 4,
    "device": CPU,
}


@dataclass
class Config:
    name: str = "a run"
    steps: int = 10
    mode: WandbMode = WandbMode.offline  # an enum, to be written by its value
    logger: LoggerConfig = field(default_factory=lambda: LoggerConfig(wandb=WandbMode.disabled))


NEEDLES = {64: [0.0, 1.0], 128: [0.5, 0.25]}


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def log_steps(
    folder: Path, steps: range, *, config: Config | None = None, losses: Sequence[float] = (), measured: bool = False
) -> None:
    log = RunLog(str(folder), config or Config(), first_step=steps.start - 1, stream=io.StringIO())
    if measured:
        log.banner({"mesh": {"ring": 2}})
    for step, loss in itertools.zip_longest(steps, losses, fillvalue=2.5):
        log.step(record(**{**NUMBERS, "step": step, "tokens": 2000 * step, "loss": loss}))
        if measured:
            found = Measured(loss=loss + 1, by_position=[(0, 2.0), (1, 1.0)], needles=NEEDLES)
            log.evaluation(step, 2000 * step, found)
    log.close()


def test_flops_by_hand():
    # one row of 4 tokens, causal: 1 + 2 + 3 + 4 keys. Forward: QK^T and PV, 2 products of 2 * 16 FLOPs for each of the
    # 10 pairs, 2 heads and 3 layers, is 3840; backward is five products for two, without the recomputed one four.
    forward_attention = 10 * 2 * 3 * (2 * 2 * 16)
    forward_matrices = 4 * 2 * 1000
    got = flops_per_step(1000, 4, n_layers=3, n_heads=2, head_dim=16, attended=10)
    assert got == 3 * (forward_attention + forward_matrices)


def test_a_record_by_hand(monkeypatch):
    monkeypatch.setattr(metrics, "peak_flops", lambda device: 20e12)
    monkeypatch.setattr(metrics, "peak_memory_gib", lambda device: (1.5, 2.5))
    assert record(**NUMBERS) == {
        "step": 3,
        "tokens": 6000,
        "train/loss": 2.5,
        "train/grad_norm": 0.7,
        "train/lr": 1e-3,
        "train/skipped": 2,
        "perf/tokens_per_second_per_gpu": 1000.0,  # 2000 tokens in half a second on 4
        "perf/mfu": 0.2,  # 16e12 FLOP/s on 4 chips of 20e12
        "perf/step_seconds": 0.5,
        "perf/data_seconds": 0.05,
        "perf/save_seconds": 0.01,
        "perf/exposed_comm_seconds": 0.005,
        "perf/ring_imbalance": 0.02,
        "memory/weights_gib": 1.0,
        "memory/optimizer_gib": 3.0,
        "memory/activations_gib": None,
        "memory/gradients_gib": None,
        "memory/transport_gib": 0.0,
        "memory/peak_allocated_gib": 1.5,
        "memory/peak_reserved_gib": 2.5,
    }
    monkeypatch.undo()
    assert record(**NUMBERS)["perf/mfu"] is None  # the peak of this CPU is not known


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Tesla T4", None),
    ],
)
def test_the_peak_of_a_chip(name, peak):
    assert peak_of(name) == peak


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own figure")
def test_memory_on_a_cpu_is_the_peak_of_the_process():
    linux_kib = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    allocated, reserved = metrics.peak_memory_gib(CPU)
    assert allocated == reserved == pytest.approx(linux_kib / 2**20, rel=0.02)


@pytest.mark.gpu
def test_memory_on_a_gpu_is_cuda_s():
    held = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    allocated, reserved = metrics.peak_memory_gib(held.device)
    assert 0.25 <= allocated <= reserved


def test_a_run_writes_every_name_and_a_resumed_one_goes_on(tmp_path):
    log_steps(tmp_path, range(1, 6))
    assert all(tuple(line) == METRICS for line in read(tmp_path))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "tok')  # killed while it wrote
    log_steps(tmp_path, range(4, 6))  # from a checkpoint after step 3
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3, 4, 5]
    log_steps(tmp_path, range(1, 2))  # resume=none starts anew
    assert [line["step"] for line in read(tmp_path)] == [1]


def test_numbers_that_json_has_not_are_null(tmp_path):
    log = RunLog(str(tmp_path), Config(), stream=io.StringIO())
    log.step(record(**{**NUMBERS, "loss": float("nan"), "grad_norm": float("inf")}))
    log.close()
    assert read(tmp_path)[0]["train/loss"] is None
    assert read(tmp_path)[0]["train/grad_norm"] is None


@contextmanager
def a_disk_that_ends_at(size: int) -> Iterator[None]:
    """No file of this process may grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_for_a_while_is_told_once_and_costs_no_line(tmp_path):
    log = RunLog(str(tmp_path), Config(), stream=(said := io.StringIO()))
    log.step(record(**{**NUMBERS, "step": 1}))
    one = (tmp_path / "metrics.jsonl").stat().st_size
    measured = Measured(loss=1.0, by_position=[(0, 2.0), (1, 1.0)])
    with a_disk_that_ends_at(one + one // 2):
        for step in (2, 3, 4):
            log.step(record(**{**NUMBERS, "step": step}))
            log.evaluation(step, 2000 * step, measured)
        assert (tmp_path / "metrics.jsonl").stat().st_size == one + one // 2  # half of a line
        assert not (tmp_path / "loss_by_position.svg").exists()
        assert not (tmp_path / "loss_by_position.svg.tmp").exists(), "others need the room"
    log.step(record(**{**NUMBERS, "step": 5}))
    log.evaluation(5, 10000, measured)
    log.close()
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3, 4, 5]
    evaluations = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in evaluations] == [2, 3, 4, 5]
    told = [line for line in said.getvalue().splitlines() if line.startswith("log: ")]
    assert told[0].startswith(f"log: File too large ({tmp_path}/metrics.jsonl); training goes on")
    assert told[-1] == "log: there is room again, and every line is written"
    assert len(told) == 2, told


def test_lines_that_never_find_room_are_counted_and_what_was_there_stays(tmp_path):
    log_steps(tmp_path, range(1, 3))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    log = RunLog(str(tmp_path), Config(), first_step=2, stream=(said := io.StringIO()))
    with a_disk_that_ends_at(len(before)):
        for step in (3, 4):
            log.step(record(**{**NUMBERS, "step": step}))
        log.close()
        assert "its last 2 lines are lost" in said.getvalue()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_full_disk_at_the_start_is_refused_and_nothing_is_lost(tmp_path):
    log_steps(tmp_path, range(1, 5))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with a_disk_that_ends_at(100), pytest.raises(ValueError, match=r"run_dir=.*File too large .*; make room, or give"):
        RunLog(str(tmp_path), Config(), first_step=4)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


class Gone:
    """A W&B run whose process has died."""

    disabled = False

    def log(self, values):
        raise ConnectionResetError("Connection lost")


def test_a_run_outlives_w_and_b(tmp_path):
    log = RunLog(str(tmp_path), Config(), stream=(said := io.StringIO()))
    log.wandb = Gone()
    for step in (1, 2):
        log.step(record(**{**NUMBERS, "step": step}))
    log.verdict(1.0, 2.0)
    log.close()
    assert said.getvalue().count("W&B has stopped (Connection lost); training goes on") == 1
    assert [line["step"] for line in read(tmp_path)] == [1, 2]


def test_other_ranks_write_and_say_nothing(tmp_path):
    log = RunLog(str(tmp_path / "run"), Config(), rank=1, stream=(said := io.StringIO()))
    log.banner({"mesh": {"ring": 2}})
    log.step(record(**NUMBERS))
    log.verdict(1.0, 2.0)
    log.say("x")
    log.close()
    assert said.getvalue() == ""
    assert not (tmp_path / "run").exists()


def test_all_ranks_print_where_they_are_asked_to_and_one_writes(tmp_path):
    config = Config(logger=LoggerConfig(wandb=WandbMode.disabled, ranks=Ranks.all))
    for rank in (0, 3):
        log = RunLog(str(tmp_path / str(rank)), config, rank=rank, stream=(said := io.StringIO()))
        log.banner({"mesh": {"ring": 4}})
        log.step(record(**{**NUMBERS, "data_seconds": 0.01 * rank}))
        log.say("x")
        log.verdict(1.0, 2.0)
        log.close()
        lines = said.getvalue().splitlines()
        assert all(line.startswith(f"rank {rank}: ") for line in lines)
        assert any(line.startswith(f"rank {rank}: step  3/10 | ") and f"data {rank * 2}.0%" in line for line in lines)
        assert ("mesh  ring 4" in said.getvalue()) == (rank == 0), "facts are told once"
        assert (tmp_path / str(rank)).exists() == (rank == 0)


def test_the_banner_is_printed_and_kept(tmp_path):
    log = RunLog(str(tmp_path), Config(), stream=(said := io.StringIO()))
    log.banner({"parameters": 1234567, "attention": {"backend": "torch", "layout": "zigzag"}})
    log.close()
    assert "parameters  1,234,567" in said.getvalue()
    assert "attention  backend torch, layout zigzag" in said.getvalue()
    kept = json.loads((tmp_path / "run.json").read_text())
    assert kept["attention"] == {"backend": "torch", "layout": "zigzag"}
    assert kept["config"]["mode"] == "offline"
    assert kept["versions"].keys() >= {"python", "torch"}
    assert kept["source"].keys() in ({"commit", "dirty"}, {"commit", "why"})
    assert f"source  commit {kept['source']['commit']}" in said.getvalue()


def test_the_verdict_says_which_is_smaller(tmp_path):
    for loss, said in ((2.0, "loss 2.000 < unigram entropy 3.000"), (3.5, "loss 3.500 >= unigram entropy 3.000")):
        log = RunLog(str(tmp_path), Config(), stream=(out := io.StringIO()))
        log.verdict(loss, 3.0)
        log.close()
        assert said in out.getvalue()


@pytest.mark.parametrize(
    ("environment", "asked", "mode"),
    [
        ({}, WandbMode.auto, "offline"),
        ({"WANDB_API_KEY": "k" * 40}, WandbMode.auto, "online"),
        ({"NETRC": "netrc"}, WandbMode.auto, "online"),
        ({"NETRC": "netrc", "WANDB_BASE_URL": "https://wandb.example.org"}, WandbMode.auto, "offline"),
        ({"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline"}, WandbMode.auto, "offline"),
        ({"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline"}, WandbMode.online, "online"),
        ({"WANDB_MODE": "online"}, WandbMode.disabled, "disabled"),
    ],
)
def test_online_only_with_a_key(monkeypatch, tmp_path, environment, asked, mode):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("netrc").write_text("machine api.wandb.ai login user password " + "k" * 40 + "\n")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_run.wandb_mode(asked) == mode


def test_wandb_has_the_run_against_tokens_and_goes_on_with_it(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    config = Config(logger=LoggerConfig(wandb=WandbMode.offline, project="proj", group="g"))
    log_steps(tmp_path, range(1, 3), config=config, losses=(1.5, 4.0))
    log_steps(tmp_path, range(2, 4), config=config, losses=(3.0, 2.0), measured=True)  # resumed after step 1
    runs = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    run_id = (tmp_path / "wandb_id").read_text().strip()
    assert [path.name for path in runs] == [f"run-{run_id}.wandb"] * 2
    said = [inspect(path) for path in runs]
    assert said[0]["run"][0]["project"] == "proj"
    assert said[0]["run"][0]["run_group"] == "g"
    assert said[0]["run"][0]["config"]["update"]["mode"] == "offline"
    assert {"glob_name": "*", "options": {"defined": True, "step_sync": True}, "step_metric": "tokens"} in said[0][
        "metric"
    ]
    for part, tokens in zip(said, ([2000, 4000], [4000, 4000, 6000, 6000]), strict=True):
        assert [one["item"]["tokens"] for one in part["history"]] == tokens
        missing = {"perf/mfu", "memory/activations_gib", "memory/gradients_gib"}  # null, so not logged
        assert set(METRICS) - set(part["history"][0]["item"]) == missing
    told = said[1]["config"][0]["update"]
    assert told["run"] == {"mesh": {"ring": 2}}
    assert {"python", "torch"} <= told["versions"].keys()
    assert "commit" in told["source"]
    evaluated = said[1]["history"][1]["item"]
    drawn = tmp_path / "wandb" / runs[1].parent.name / "files" / evaluated["eval/needles_by_depth.path"]
    assert drawn.read_text().count('fill="#06c"') == 4, "a field for each length and depth"
    assert evaluated["eval/loss_by_position_table.nrows"] == 2
    summary = {name: value for part in said[1]["summary"] for name, value in part["update"].items()}
    loss = {"best/train/loss": 1.5, "best/train/loss_step": 1, "final/train/loss": 2.0}  # of steps 1, then 2 and 3
    held_out = {"best/eval/loss": 3.0, "best/eval/loss_step": 3, "final/eval/loss": 3.0}
    assert {name: value for name, value in summary.items() if name[:5] in {"best/", "final"}} == {**loss, **held_out}


def inspect(path: Path) -> dict[str, list[dict]]:
    """The records of an offline W&B file, by type, as W&B's own reader tells them."""
    read = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    lines = subprocess.run(read, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    records: dict[str, list[dict]] = {}
    for one in map(json.loads, lines):
        records.setdefault(one["type"], []).append(one[one["type"]])
    return records


def test_a_loss_that_is_not_finite_is_told_and_left_out_of_what_is_written():
    by_position = [(0, 1.0), (1, math.nan), (2, 2.0)]
    measured = Measured(loss=math.inf, by_position=by_position, by_length={64: 800.0, 128: math.nan})
    written = {"loss_by_length": {64: 800.0}, "loss_by_position": [(0, 1.0), (2, 2.0)], "needles_by_depth": {}}
    assert measured.record() == written
    assert measured.in_words() == "loss inf"
    assert ["64", "800.0000", "inf"] in [line.split() for line in measured.tables().splitlines()]
    assert list(measured.drawings()) == ["loss_by_position.svg"]
    assert "nan" not in measured.drawings()["loss_by_position.svg"]
