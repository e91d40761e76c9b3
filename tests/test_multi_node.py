"""Several hosts: two network namespaces, under a real torchrun; launch/slurm.sbatch, with a stand-in for SLURM."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_config import composed
from test_parity import run_all

ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "launch" / "train.py")
ENV = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT / ".types")}
SHAPE = "model=tiny model.n_layers=1 model.dim=16 model.n_heads=2 model.n_kv_heads=2 model.head_dim=8 model.mlp_dim=16"
LOOP = "seq_len=65 steps=3 optim.lr=1e-2 optim.warmup_steps=0 logger.wandb=disabled"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=ringspan"]
UNSHARE = ["unshare", "--uts", "--mount", "sh", "-c"]
ADDRESSES = {"host-a": "10.77.0.1", "host-b": "10.77.0.2"}


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[str]]]:
    """``on_host("host-a", *command)`` is a command that runs on one of two hosts, which have a wire between them, names
    of their own and one file system."""
    names = {host: f"ringspan-{os.getpid()}-{host}" for host in ADDRESSES}
    (a, b), known = names.values(), tmp_path_factory.mktemp("etc") / "hosts"
    told = {"localhost": "127.0.0.1", **ADDRESSES}
    known.write_text("".join(f"{address} {host}\n" for host, address in told.items()))
    wire = [f"ip link add wire netns {a} type veth peer name wire netns {b}"]
    for host, name in names.items():
        wire += [f"ip -n {name} addr add {ADDRESSES[host]}/24 dev wire"]
        wire += [f"ip -n {name} link set {device} up" for device in ("lo", "wire")]
    try:
        for command in [*(f"ip netns add {name}" for name in names.values()), *wire]:
            make(*command.split())
        inside = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
        enter = {
            host: ["nsenter", f"--net=/run/netns/{name}", *UNSHARE, inside, "sh", host, str(known)]
            for host, name in names.items()
        }
        make(*enter["host-a"], "true")
        yield lambda host, *command: [*enter[host], *command]
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def make(*command: str) -> None:
    """Skips the test where the machine does not allow it."""
    if not shutil.which(command[0]):
        pytest.skip(f"two hosts on one machine need {command[0]}, which is not installed")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"network namespaces are not permitted here: {done.stderr.strip()}")


@pytest.mark.skipif("CI" in os.environ, reason="takes 15 to 20 s of two cores, which CI has not left")
@pytest.mark.parametrize(("ranks_each", "ulysses"), [(1, 1), (2, 2)])
def test_two_hosts_train_to_the_loss_of_one_process(ranks_each, ulysses, on_host, ranks, tmp_path):
    """A ring across them; with two ranks each, those that trade heads are on one host."""
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a text to learn from\n" for i in range(400)))
    values = [*SHAPE.split(), *LOOP.split(), f"data.path={tmp_path / 'text.txt'}", f"data.cache={tmp_path / 'cache'}"]
    alone = composed(*values, "name=alone", f"run_dir={tmp_path / 'alone'}")
    command = [*TORCHRUN, "--rdzv-endpoint=host-a:29400", f"--nproc-per-node={ranks_each}", SCRIPT, *values]
    command += ["name=both", f"parallel.ulysses={ulysses}"]
    hosts = [
        subprocess.Popen(
            on_host(host, *command), cwd=tmp_path, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for host in ADDRESSES
    ]
    ranks(1)(run_all, [alone], timeout=200)  # meanwhile
    try:
        said = [host.communicate(timeout=240)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], said
    told = json.loads((tmp_path / "runs" / "both" / "run.json").read_text())
    assert told["mesh"] == {"data": 1, "ring": 2, "ulysses": ulysses}
    assert told["attention"]["transport"] == "p2p"
    assert "WARNING" not in "".join(said)
    one, two = (
        [line["train/loss"] for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]
        for folder in (tmp_path / "alone", tmp_path / "runs" / "both")
    )
    assert len(two) == 3
    assert two == pytest.approx(one, rel=1e-4)  # fp32, added in another order
    assert one[2] < one[0] - 0.01, "it does not learn, and any loss would do"


# launch/slurm.sbatch: SLURM's commands, and torchrun with one worker, as far as the script can tell

STAND_INS = {
    "srun": '#!/usr/bin/env bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
    "scontrol": '#!/usr/bin/env bash\nif [[ $1 == show ]]; then echo head; echo other; else echo "$@" > requeued; fi\n',
    "torchrun": """#!PYTHON
import signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda *_: open("torchrun-was-told", "w").close())
open("arguments", "w").write(" ".join(sys.argv[1:]))
sys.exit(subprocess.run([sys.executable, "-u", "worker.py"]).returncode)
""",
    "worker.py": """import os, signal, sys, time
def save(*_):
    time.sleep(0.3)
    open("saved", "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
if "FAILS" in os.environ:
    sys.exit(3)
open("ready", "w").close()
time.sleep(60)
""",
}


@pytest.fixture
def slurm(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts launch/slurm.sbatch as SLURM does on the first of 2 hosts."""
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(text.replace("PYTHON", sys.executable))
        (tmp_path / name).chmod(0o755)
    given = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "h[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    path = f"{tmp_path}:{os.environ['PATH']}"

    def start(*arguments: str, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(ROOT / "launch" / "slurm.sbatch"), *arguments],
            cwd=tmp_path,
            env={**os.environ, **given, "SLURM_GPUS_ON_NODE": "8", "PATH": path, **more},
        )

    return start


def test_slurm_s_warning_reaches_the_workers_which_save_and_the_job_is_queued_again(slurm, tmp_path):
    job = slurm("seq_len=65536", "engine.zero=3")
    until = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 0
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "torchrun-was-told").exists(), "it would end its workers within 30 s, saved or not"
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    told = (tmp_path / "arguments").read_text().split()
    assert {"--nnodes=2", "--nproc-per-node=8", "--max-restarts=3", "--rdzv-backend=c10d"} < set(told)
    assert any(argument.startswith("--rdzv-endpoint=head:") for argument in told)
    assert told[-4:] == ["launch/train.py", f"name=slurm-{os.getpid()}", "seq_len=65536", "engine.zero=3"]


def test_a_job_that_fails_under_slurm_says_so_and_is_not_queued_again(slurm, tmp_path):
    assert slurm(FAILS="yes").wait(60) == 3
    assert not (tmp_path / "requeued").exists()
