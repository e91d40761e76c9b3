"""The commands that users type, as real processes; and the launcher by itself, with workers that fail, die and hang."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.context import SpawnProcess
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from commands import exit_code

from ringspan.parallel import workers
from ringspan.parallel.workers import WorkerError, launch, receive, run_on
from ringspan.train.metrics import METRICS

ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "launch" / "train.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ENV = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT / ".types")}
SMALL = "model=tiny model.n_layers=1 model.dim=16 model.n_heads=2 model.n_kv_heads=1 model.head_dim=8 model.mlp_dim=16"

NO_WANDB = "logger.wandb=disabled"  # it starts in two seconds; one test does


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a run that takes a moment: a small model on a small text."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("".join(f"line {i} of a text to learn from\n" for i in range(400)))
    return [*SMALL.split(), f"data.path={folder / 'text.txt'}", f"data.cache={folder / 'cache'}"]


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Path]:
    """A folder to start runs in; afterwards no process that was started there is left."""
    yield tmp_path
    left: list[str] = []
    for _ in range(50):  # the last ones may be on their way out
        left = processes_in(tmp_path)
        if not left:
            return
        time.sleep(0.1)
    pytest.fail(f"left behind: {left}")


def processes_in(folder: Path) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == folder:
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it has just left, or is not ours
            continue
    return found


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=ENV, capture_output=True, text=True, timeout=240, check=False)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_process_saves_at_ctrl_c_and_says_how_to_go_on(here, small):
    command = [sys.executable, SCRIPT, *small, "seq_len=65", "name=x", NO_WANDB]
    job = Started([*command, "steps=100000"], here)
    job.wait_for("step     20/")
    job.process.send_signal(signal.SIGINT)
    assert job.end() == 0, job.said
    assert job.said.lstrip().startswith("corpus  text.txt (bytes), "), "a library has spoken"
    (saved,) = (here / "runs" / "x" / "checkpoints").glob("step-*")
    steps = int(saved.name.removeprefix("step-"))
    assert [line["step"] for line in metrics(here / "runs" / "x")] == list(range(1, steps + 1))
    assert f"to go on: python {SCRIPT} " in " ".join(job.said.split())


class Started:
    """A command that runs, and what it has said so far."""

    def __init__(self, command: list[str], cwd: Path) -> None:
        self.process = subprocess.Popen(
            command, cwd=cwd, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.said = ""

    def wait_for(self, text: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line
            if text in line:
                return
        pytest.fail(f"it never said {text!r}, but:\n{self.said}")

    def end(self) -> int:
        self.said += self.process.communicate(timeout=180)[0]
        return self.process.returncode


def test_sigterm_saves_and_ends_a_sweep_that_goes_on_after_a_failed_job(here, small):
    sweep = [sys.executable, SCRIPT, "-m", *small, NO_WANDB, "nproc=2", "seq_len=0,65,129", "steps=100000", "name=s"]
    job = Started(sweep, here)
    job.wait_for("step      3/")
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 0, job.said
    assert job.said.count("job 0") == 1
    assert "seq_len=0: must be 1 or more" in job.said
    statuses = [line.split(",")[5] for line in (here / "sweeps" / "s" / "results.csv").read_text().splitlines()]
    assert statuses == ["status", "failed", "stopped", "waiting"]
    assert job.said.splitlines()[-1].startswith("3 jobs: 1 failed, 1 stopped, 1 waiting; ")
    assert list((here / "sweeps" / "s" / "1" / "checkpoints").glob("step-*"))
    told = json.loads((here / "sweeps" / "s" / "1" / "run.json").read_text())["config"]
    assert (told["name"], told["logger"]["group"]) == ("s-1", "s")
    assert told["run_dir"] == str(here / "sweeps" / "s" / "1")


def under_torchrun(here: Path, nodes: int, *arguments: str) -> tuple[int, dist.Store]:
    """As torchrun starts rank 0, of 2 ranks a node: its exit code, and the store that all ranks have."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1"}
    numbers = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2 * nodes, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": store.port}
    place = torchrun | {name: str(number) for name, number in numbers.items()}
    with contextlib.chdir(here), mock.patch.dict(os.environ, place):
        return exit_code("train.py", *arguments), dist.PrefixStore("attempt-0", store)


def test_a_sweep_under_torchrun_takes_its_number_of_processes_and_sends_the_other_ranks_home(
    here, small, monkeypatch, capfd
):
    started = []
    monkeypatch.setattr("ringspan.train.launcher.launch_all", lambda jobs, *_: started.extend(jobs))
    code, store = under_torchrun(here, 1, "-m", *small, "seq_len=0,33", "name=s")
    assert code == 1
    assert receive(store) is None
    ((task, (config, folder), nproc, _),) = started
    assert (task.__name__, config.seq_len, folder, nproc) == ("train", 33, str(here / "sweeps" / "s" / "1"), 2)
    assert "seq_len=0: must be 1 or more" in capfd.readouterr().err


def test_a_sweep_under_torchrun_on_several_nodes_is_refused(here, small, capfd):
    code, store = under_torchrun(here, 2, "-m", *small, "seq_len=65,33", "name=s")
    assert (code, receive(store)) == (1, None)
    assert "sweep under torchrun runs on one node" in capfd.readouterr().err


@pytest.mark.parametrize(("ulysses", "warned"), [(2, False), (4, True)])
def test_a_mesh_that_trades_heads_across_hosts_is_warned_of(ulysses, warned, here, small, monkeypatch, capfd):
    mesh = [f"parallel.ulysses={ulysses}", "model.n_heads=4"]
    monkeypatch.setattr("ringspan.parallel.workers.process_group", refuse)
    under_torchrun(here, 2, *small, *mesh, "name=x", "resume=none")
    err = capfd.readouterr().err
    assert ("parallel.ulysses=2 stays inside of hosts" in err) == warned
    assert "the group was asked for" in err


def refuse(place: object) -> None:
    raise ValueError("the group was asked for")


def test_a_folder_that_cannot_be_written_is_told_in_one_line(here, small):
    (here / "file").write_text("")
    done = run(sys.executable, SCRIPT, *small, "nproc=1", f"run_dir={here}/file/run", cwd=here)
    assert done.returncode == 1
    assert done.stderr == f"train.py: run_dir: Not a directory ({here}/file/run); give a folder that can be written\n"


def test_a_mistake_under_torchrun_is_told_once(here, small, capfd):
    """By rank 0, which sends the others home."""
    code, store = under_torchrun(here, 1, *small, "parallel.ring=3")
    assert (code, receive(store)) == (1, None)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("train.py: parallel: ring=3")
    assert "does not multiply to the 2 processes of this run" in line
    assert list((here / "runs").iterdir()) == []


@pytest.mark.skipif("CI" in os.environ, reason="takes 20 s of two cores, which CI has not left")
def test_a_mistake_that_all_ranks_find_in_training_is_told_once(here, small):
    blown_up = ["engine.clip=0", "optim.lr=1e30", "optim.warmup_steps=0", "engine.zero=0"]
    done = run(*TORCHRUN, SCRIPT, *small, NO_WANDB, "seq_len=65", "steps=9", "name=x", *blown_up, cwd=here)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert len(told) == 1, done.stderr
    assert "lower optim.lr (now 1e+30)" in told[0]
    assert "loop.py" not in done.stderr, "a traceback for a user's mistake"


@pytest.mark.skipif("CI" in os.environ, reason="takes 40 to 70 s of two cores, which CI has not left")
def test_torchrun_from_another_folder_goes_on_by_itself_after_a_killed_rank(here, small):
    """In one run folder, though its name is the time of the start, from its own checkpoint, and in the same W&B run."""
    torchrun = [*TORCHRUN, "--max-restarts=1", SCRIPT, *small, "seq_len=65", "steps=14", "train.save_every=2"]
    job = Started([*torchrun, "resume=none", "train.keep=0"], here)
    job.wait_for("step  6/14")
    os.kill(max(children_of(job.process.pid)), signal.SIGKILL)
    assert job.end() == 0, job.said
    assert job.said.count("step 14/14 | loss ") == 1
    assert "unigram entropy" in job.said.splitlines()[-1]
    assert {path.name for path in here.iterdir()} == {"runs"}
    (folder,) = (here / "runs").iterdir()
    lines = metrics(folder)
    assert tuple(lines[0]) == METRICS
    assert [line["step"] for line in lines] == list(range(1, 15))
    assert (folder / "checkpoints" / "step-00000014").is_dir()
    told = json.loads((folder / "run.json").read_text())
    assert 2 <= int(told["resumed"][-8:]) < 14
    assert told["attention"] == {"strategy": "ring", "backend": "torch", "transport": "p2p", "layout": "balanced"}
    assert told["mesh"] == {"data": 1, "ring": 2, "ulysses": 1}
    assert told["config"]["seq_len"] == 65
    runs = {path.name.rpartition("-")[2] for path in (folder / "wandb").glob("offline-run-*")}
    assert runs == {(folder / "wandb_id").read_text().strip()}


def children_of(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
        except OSError:  # it has just left
            continue
    return found


def rank_sum(base: int) -> int:
    total = torch.tensor(base + dist.get_rank())
    dist.all_reduce(total)
    return int(total)


def rank_sum_at_length(base: int) -> tuple[int, str]:
    """A result that no pipe holds at once."""
    return rank_sum(base), "long " * 40_000


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ZeroDivisionError("the true cause")
    dist.barrier()  # here rank 0 hears that its peer has gone


def die_on_rank_one() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()


def workers_left() -> list[object]:
    """Of `launch`, which spawns them; the pool of ranks has children of another kind."""
    return [child for child in mp.active_children() if isinstance(child, SpawnProcess)]


def hang(folder: str) -> None:
    signal.signal(signal.SIGTERM, lambda *_: Path(folder, f"asked{dist.get_rank()}").touch())
    Path(folder, f"ready{dist.get_rank()}").touch()
    while True:
        time.sleep(0.05)


def test_fresh_workers_give_rank_0_s_result(capfd):
    assert run_on(2, rank_sum_at_length, 10) == (21, "long " * 40_000)
    assert capfd.readouterr().err == ""
    assert not workers_left()


def test_one_process_is_this_one_in_a_group_of_its_own(monkeypatch):
    monkeypatch.setattr(workers, "launch", fail_on_rank_one)
    with mock.patch.dict(os.environ):
        assert run_on(1, lambda base: (os.getpid(), rank_sum(base)), 10) == (os.getpid(), 10)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("task", "said"),
    [(fail_on_rank_one, r"ZeroDivisionError: the true cause$"), (die_on_rank_one, "^worker 1 was ended by signal 9")],
)
def test_the_worker_that_failed_first_is_told(task, said):
    with pytest.raises(WorkerError, match=said) as error:
        launch(task, nproc=2)
    assert "peer" not in str(error.value)
    assert not workers_left()


def test_the_second_signal_ends_workers_that_do_not_leave(tmp_path):
    def signals() -> None:
        wait_for_files(tmp_path, "ready0", "ready1")
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for_files(tmp_path, "asked0", "asked1")
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=signals)
    sender.start()
    with pytest.raises(SystemExit) as exit_:
        launch(hang, str(tmp_path), nproc=2)
    sender.join()
    assert exit_.value.code == 128 + signal.SIGTERM
    assert not workers_left()


def wait_for_files(folder: Path, *names: str) -> None:
    until = time.monotonic() + 60
    while not all((folder / name).exists() for name in names):
        assert time.monotonic() < until, f"{names} never came"
        time.sleep(0.05)


def test_workers_leave_with_a_parent_that_was_killed(here):
    program = "import sys; from test_launch import *; launch(hang, sys.argv[1], nproc=1)"
    env = {**ENV, "PYTHONPATH": os.pathsep.join([ENV["PYTHONPATH"], str(ROOT / "tests")])}
    parent = subprocess.Popen([sys.executable, "-c", program, str(here)], cwd=here, env=env)
    wait_for_files(here, "ready0")
    parent.kill()
    parent.wait()  # and `here` sees that nothing is left
