"""Sweeps: jobs side by side on GPUs of their own, one table of what became of them, other launchers and sweepers.

Training itself is a stand-in here, which writes the log of a run; test_launch.py has a sweep that trains.
"""

import csv
import json
import os
import signal
import time
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import pytest
from commands import exit_code
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

from ringspan.parallel import workers
from ringspan.parallel.workers import Job, WorkerError, launch_all
from ringspan.train import launcher as ours
from ringspan.train import sweep
from ringspan.train.launcher import refuse_code

ROOT = Path(__file__).parents[1]


class StandIn:
    """A crew that needs so many looks to be over; ``outcomes`` are by job, and what was seen goes into ``seen``."""

    looks = 3
    alive: ClassVar[list["StandIn"]] = []
    seen: ClassVar[list[tuple[object, tuple[str, ...], int]]] = []  # a job's arguments, its GPUs, jobs beside it
    news: ClassVar[list[object]] = []

    def __init__(self, job: Job, devices: list[str], crews: int) -> None:
        self.job, self.devices, self.left = job, devices, self.looks
        taken = [device for one in self.alive for device in one.devices]
        assert not set(devices) & set(taken), "a GPU has two jobs"
        self.alive.append(self)
        self.seen.append((job.args, tuple(devices), len(self.alive)))
        self.asked = False

    @property
    def over(self) -> bool:
        self.left -= 1
        return self.left <= 0 or self.asked

    def ask_to_leave(self) -> None:
        self.asked = True

    def listen(self) -> None:
        pass

    def end(self) -> object:
        self.alive.remove(self)
        return SystemExit(0) if self.asked else self.job.task(*self.job.args)


@pytest.fixture
def crews(monkeypatch):
    monkeypatch.setattr(workers, "Crew", StandIn)
    monkeypatch.setattr(workers, "wait", lambda news, timeout: None)
    monkeypatch.setattr(StandIn, "alive", [])
    monkeypatch.setattr(StandIn, "seen", [])
    return StandIn.seen


def double(number: int) -> int:
    return 2 * number


def test_jobs_run_side_by_side_each_on_gpus_of_its_own(crews):
    jobs = [Job(double, (number,), nproc=2) for number in range(8)]
    assert launch_all(jobs, at_once=8, devices=[str(i) for i in range(8)]) == [2 * i for i in range(8)]
    assert [args for args, _, _ in crews] == [(i,) for i in range(8)]
    assert [devices for _, devices, _ in crews[:4]] == [("0", "1"), ("2", "3"), ("4", "5"), ("6", "7")]
    assert max(beside for _, _, beside in crews) == 4, "8 GPUs have room for 4 jobs of 2"


def test_a_job_waits_for_as_many_gpus_as_it_needs(crews):
    jobs = [Job(double, (i,), nproc) for i, nproc in enumerate((1, 4, 2, 1, 3))]
    assert launch_all(jobs, at_once=9, devices=["GPU-a", "GPU-b", "GPU-c", "GPU-d"]) == [0, 2, 4, 6, 8]
    assert [(args[0], len(devices), beside) for args, devices, beside in crews] == [
        (0, 1, 1), (1, 4, 1), (2, 2, 1), (3, 1, 2), (4, 3, 1)
    ]  # fmt: skip


@pytest.mark.parametrize("at_once", [1, 3])
def test_without_gpus_a_given_number_runs_at_once(at_once, crews):
    assert launch_all([Job(double, (i,), 2) for i in range(5)], at_once) == [0, 2, 4, 6, 8]
    assert max(beside for _, _, beside in crews) == at_once
    assert {devices for _, devices, _ in crews} == {()}


def test_after_a_signal_running_jobs_are_asked_to_leave_and_none_starts(crews):
    said = []

    def told(number: int, *outcome: object) -> None:
        said.append((number, *map(type, outcome)))
        if number == 2 and not outcome:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as leaving:
        launch_all([Job(double, (i,), 1) for i in range(6)], at_once=2, told=told)
    assert leaving.value.code == 0
    assert {number for number, *_ in said} == {0, 1, 2}
    assert (2, SystemExit) in said


def test_visible_gpus_keep_the_names_that_this_process_was_given(monkeypatch):
    monkeypatch.setattr(workers, "gpus", lambda: 2)
    for named, expected in (("4,7", ["4", "7"]), ("GPU-a,GPU-b,GPU-c", ["GPU-a", "GPU-b"]), ("", ["0", "1"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        assert workers.visible_gpus() == expected


def visible() -> str:
    return os.environ["CUDA_VISIBLE_DEVICES"]


def test_real_workers_are_born_with_their_gpus_and_print_into_their_file(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out = str(tmp_path / "output.log")
    assert launch_all([Job(told_and_printed, (), 1, output=out)], 1, ["97"]) == ["97"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert Path(out).read_text() == "I see 97\n"
    assert capfd.readouterr() == ("", "")


def told_and_printed() -> str:
    os.kill(os.getpid(), signal.SIGUSR2)  # as SLURM does to all processes of a job
    print(f"I see {visible()}")
    return visible()


class Killed(BaseException):
    """The end of a process that nothing in it hears of."""


@pytest.mark.parametrize(("later", "said"), [(True, ("waiting", "")), (False, ("running", "last heard of 2h05m ago"))])
def test_a_job_that_was_killed_is_known_by_its_silence(later, said, tmp_path):
    def die() -> None:
        log = tmp_path / "metrics.jsonl"
        log.write_text('{"train/loss": 2.5, "perf/tokens_per_second_per_gpu": 10}\n')
        raise Killed

    with pytest.raises(Killed):
        sweep.noted(str(tmp_path), 3, ["seed=1"], die, later=later)
    for name, hours in (("job.json", 9), ("metrics.jsonl", 2)):
        os.utime(tmp_path / name, (then := time.time() - 3600 * hours - 310, then))
    (row,) = sweep.results(tmp_path)
    assert (row["job"], row["loss"], (row["status"], row["reason"])) == (3, 2.5, said)


# The command line, with a stand-in for training


def learn(config, run_dir: str) -> float:
    """What a run leaves behind that has a loss of 10 x its learning rate, and fails at a rate of 0.5."""
    folder, loss = Path(run_dir), 10 * config.optim.lr
    assert json.loads((folder / "job.json").read_text())["status"] == "running"
    rate = {"perf/tokens_per_second_per_gpu": 1000 * config.optim.lr}
    steps = [{"step": step, "train/loss": loss + 2 - step, **rate} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    measured = [{"step": step, "eval/loss": loss + error} for step, error in ((1, 0.25), (2, 0.5))]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in measured))
    return WorkerError("rank 1 ran into\nZeroDivisionError: the true cause") if config.optim.lr == 0.5 else loss


@pytest.fixture
def train_py(tmp_path, monkeypatch, crews):
    """`python launch/train.py ...` on a machine with 8 GPUs; gives its exit code."""
    (tmp_path / "text.txt").write_text("some text\n" * 100)
    monkeypatch.setattr("ringspan.train.loop.train", learn)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(*arguments: str, gpus: int = 8) -> int:
        monkeypatch.setattr(workers, "gpus", lambda: gpus)
        monkeypatch.setattr(ours, "gpus", lambda: gpus)
        return exit_code("train.py", *arguments, "data.path=text.txt", f"data.cache={tmp_path}/cache")

    return run


def table(folder: str) -> list[dict[str, str]]:
    with open(Path(folder, "results.csv"), newline="") as file:
        return list(csv.DictReader(file))


EIGHT = "optim.lr=0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8"


def test_a_sweep_of_8_jobs_of_which_one_fails_has_7_results_and_one_reason(train_py, crews, capfd):
    assert train_py("-m", "nproc=2", "name=s", "model=tiny", EIGHT) == 1
    rows = table("sweeps/s")
    assert tuple(rows[0]) == sweep.COLUMNS
    assert [(row["job"], row["overrides"]) for row in rows] == [(str(i), f"optim.lr=0.{i + 1}") for i in range(8)]
    assert [row["status"] for row in rows] == ["done"] * 4 + ["failed"] + ["done"] * 3
    assert [row["reason"] for row in rows] == [""] * 4 + ["ZeroDivisionError: the true cause"] + [""] * 3
    for number, row in enumerate(rows, start=1):
        assert float(row["loss"]) == pytest.approx(number)
        assert float(row["best_held_out"]) == pytest.approx(number + 0.25)
        assert float(row["tokens_per_second_per_gpu"]) == pytest.approx(100 * number)
    assert [devices for _, devices, _ in crews[:4]] == [("0", "1"), ("2", "3"), ("4", "5"), ("6", "7")]
    out, err = capfd.readouterr()
    assert "8 jobs: 7 done, 1 failed; " in out.splitlines()[-1]
    assert out.count("ZeroDivisionError: the true cause") == 1
    assert "train.py: job 4 (" in err
    assert "Traceback" not in err


def test_a_mistake_in_the_last_job_is_told_before_the_first_trains(train_py, crews, capfd):
    assert train_py("-m", "name=s", "model=tiny", "nproc=4,9", "hydra.launcher.at_once=2") == 1
    assert [row["status"] for row in table("sweeps/s")] == ["done", "failed"]
    assert table("sweeps/s")[1]["reason"].startswith("9 processes on a machine with 8 GPUs")
    out, err = capfd.readouterr()
    assert err.count("train.py: job 1 (") == 1
    assert "starts" not in err, "one that runs alone prints where the sweep does"
    assert out.splitlines()[-1].startswith("2 jobs: 1 done, 1 failed; ")


def test_hydra_s_own_launcher_runs_jobs_one_after_the_other(train_py):
    assert train_py("-m", "hydra/launcher=basic", "name=s", "model=tiny", "optim.lr=0.1,0.2") == 0
    assert [row["status"] for row in table("sweeps/s")] == ["done", "done"]


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("hydra.launcher.at_once=0", "hydra.launcher.at_once=0: must be 1 or more"),
        ("check=true", "check=true: looks at one run"),
    ],
)
def test_a_mistake_is_told_in_one_line(mistake, said, train_py, capfd, tmp_path):
    assert train_py("-m", "model=tiny", "optim.lr=0.1", "name=s", mistake) == 1
    err = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("Error executing job")]
    assert len(err) == 1, err
    assert said in err[0]
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.parametrize(
    ("launcher", "sweeper", "refused"),
    [
        ({"at_once": 2}, {"params": {"optim.lr": "1,2"}}, None),
        ({}, {"sampler": {"_target_": "optuna.samplers.TPESampler", "seed": 1}}, None),
        ({}, {"sampler": {"_target_": "os.mkdir", "path": "ran"}}, "hydra.sweeper.sampler"),
        ({}, {"custom_search_space": "os.mkdir"}, "hydra.sweeper.custom_search_space"),
        ({}, {"other": {"_target_": "optuna.samplers.TPESampler"}}, "hydra.sweeper.other"),
        (
            {"additional_parameters": {"x": [1, {"_target_": "os.mkdir"}]}},
            {},
            "hydra.launcher.additional_parameters.x.1",
        ),
    ],
)
def test_launchers_and_sweepers_are_configured_with_values_and_samplers(launcher, sweeper, refused):
    plugins = {"launcher": {"_target_": "theirs", **launcher}, "sweeper": {"_target_": "theirs", **sweeper}}
    if refused is None:
        refuse_code(OmegaConf.create({"hydra": plugins}))
        return
    with pytest.raises(HydraException, match=f"^{refused}: a configuration cannot run code here"):
        refuse_code(OmegaConf.create({"hydra": plugins}))


def installed(plugin: str) -> bool:
    return bool(find_spec("hydra_plugins") and find_spec(f"hydra_plugins.{plugin}"))


@pytest.mark.skipif(not installed("hydra_optuna_sweeper"), reason="hydra-optuna-sweeper is not installed")
def test_optuna_finds_the_lowest_loss_and_outlives_a_failed_job(train_py, capfd):
    settings = ["n_trials=12", "n_jobs=4", "max_failure_rate=0.5", "sampler.seed=1"]
    study = ["hydra/sweeper=optuna", *(f"hydra.sweeper.{setting}" for setting in settings)]
    assert train_py("-m", *study, "name=s", "model=tiny", "optim.lr=choice(0.1,0.5,0.9)") == 0
    rows = table("sweeps/s")
    assert len(rows) == 12
    assert {row["status"] for row in rows} == {"done", "failed"}
    best = (Path("sweeps/s") / "optimization_results.yaml").read_text()
    assert "optim.lr: 0.1" in best


@pytest.mark.skipif(installed("hydra_optuna_sweeper"), reason="hydra-optuna-sweeper is installed")
def test_a_plugin_that_is_not_installed_is_named(train_py, capfd):
    assert train_py("-m", "hydra/sweeper=optuna") == 1
    assert capfd.readouterr().err.endswith("which is not installed: pip install hydra-optuna-sweeper\n")


needs_submitit = pytest.mark.skipif(
    not installed("hydra_submitit_launcher"), reason="hydra-submitit-launcher is not installed"
)


@needs_submitit
def test_submitit_runs_jobs_elsewhere_and_the_table_is_made_of_their_files(train_py, monkeypatch, capfd):
    """In this process, by submitit's executor for debugging, after the way that a job takes to another one."""
    import cloudpickle  # noqa: PLC0415 - submitit's
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher, LocalLauncher  # noqa: PLC0415

    def launch(launcher, *args, **named):
        return BaseSubmititLauncher.launch(cloudpickle.loads(cloudpickle.dumps(launcher)), *args, **named)

    monkeypatch.setattr(LocalLauncher, "_EXECUTOR", "debug")
    monkeypatch.setattr(LocalLauncher, "launch", launch)
    assert train_py("-m", "hydra/launcher=submitit_local", "nproc=2", "model=tiny", "optim.lr=0.1,0.5") == 1
    (folder,) = Path("sweeps").iterdir()  # one, though it is named by the time, and jobs start at times of their own
    rows = table(str(folder))
    assert [row["status"] for row in rows] == ["done", "failed"]
    assert [float(row["loss"]) for row in rows] == pytest.approx([1, 5])
    assert rows[1]["reason"] == "ZeroDivisionError: the true cause"
    assert "2 jobs: 1 done, 1 failed; " in capfd.readouterr().out


@needs_submitit
def test_slurm_is_asked_for_as_many_gpus_as_a_job_has_processes():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        asked = compose("train", overrides=["hydra/launcher=slurm", "nproc=4"], return_hydra_config=True).hydra.launcher
    assert asked._target_.endswith(".SlurmLauncher")
    assert (asked.nodes, asked.tasks_per_node, asked.gpus_per_node) == (1, 1, 4)


def test_a_job_that_another_waits_for_saves_before_that_one_queues_it_again(crews, monkeypatch):
    """SIGUSR2 is submitit's, which handles it by leaving at once."""
    heard = []
    before = signal.signal(signal.SIGUSR2, lambda *_: heard.append(len(StandIn.alive)))
    try:
        with pytest.raises(SystemExit):
            launch_all([Job(double, (1,), 2)], told=lambda number, *_: os.kill(os.getpid(), signal.SIGUSR2))
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert heard == [0], "while workers were there"
