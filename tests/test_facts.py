"""What run.json says of the code and of the machine: git's state, versions, hosts, devices and NVLink."""

import os
import socket
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_config import composed

from ringspan.train import budget, facts, source
from ringspan.train.facts import Place, machine, place
from ringspan.train.source import versions


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git checkout of one file, whatever the user's own settings are."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "x")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "x@example.org")
    (tmp_path / "a.py").write_text("x = 1\n")
    for command in (["init", "-q"], ["add", "a.py"], ["commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def test_the_commit_and_whether_it_is_what_runs(checkout):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True)
    assert source.source(checkout) == {"commit": head.stdout.strip(), "dirty": False}
    (checkout / "runs").mkdir()
    (checkout / "runs" / "b.py").touch()  # what git does not follow is no change
    assert not source.source(checkout)["dirty"]
    (checkout / "a.py").write_text("x = 2\n")
    assert source.source(checkout) == {"commit": head.stdout.strip(), "dirty": True}


def test_a_package_has_no_commit_even_inside_somebody_s_checkout(checkout, tmp_path_factory, monkeypatch):
    (checkout / "lib").mkdir()
    assert source.source(checkout / "lib") == {"commit": None, "why": "installed as a package"}
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path_factory.getbasetemp().parent))
    told = source.source(tmp_path_factory.mktemp("bare"))
    assert told["commit"] is None
    assert "not a git repository" in told["why"]
    monkeypatch.setenv("PATH", "")
    assert "No such file" in source.source(checkout)["why"]


def test_versions_are_those_of_what_is_imported():
    told = versions()
    assert torch.__version__.startswith(told["torch"])  # whose metadata may not name the build
    assert {"python", "deepspeed", "hydra-core", "wandb"} <= set(told)
    assert ("cuda" in told) == torch.cuda.is_available()


def test_ranks_on_cpus():
    here = place(torch.device("cpu"))
    assert (here.host, here.uuid) == (socket.gethostname(), None)
    cores = len(os.sched_getaffinity(0))
    assert machine([here, here]) == {"hosts": 1, "ranks": f"2 x cpu ({cores} cores)"}


def gpus(*linked: str | None, host: str = "a") -> list[Place]:
    """GPUs of one host, by the letters of those that each has links to."""
    names = [f"{host}{i}" for i in range(len(linked))]
    return [
        Place(host, "NVIDIA H100", name, None if to is None else [f"{host}{x}" for x in to])
        for name, to in zip(names, linked, strict=True)
    ]


@pytest.mark.parametrize(
    ("places", "nvlink"),
    [
        (gpus("1", "0"), "between all GPUs of a host"),
        ([*gpus("1", "0"), *gpus("1", "0", host="b")], "between all GPUs of a host"),
        (gpus("1", "0", ""), "between 2 of 6 pairs of ranks"),
        (gpus("", ""), "between 0 of 2 pairs of ranks"),
        (gpus("1", None), "not known: the driver does not tell"),
        ([*gpus(""), *gpus("", host="b")], "none: a GPU a host"),
    ],
)
def test_how_gpus_reach_each_other(places, nvlink):
    hosts = len({one.host for one in places})
    assert machine(places) == {"hosts": hosts, "ranks": f"{len(places)} x NVIDIA H100", "nvlink": nvlink}


def test_a_rank_knows_its_gpu_and_those_it_is_linked_to(monkeypatch):
    """On GPUs that are not there."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"GPU-{i}"))
    monkeypatch.setattr(facts, "nvlinks", lambda: [[0, 18, 0], [18, 0, 4], [0, 4, 0]])
    here = place(torch.device("cuda", 1))
    assert here == Place(socket.gethostname(), "NVIDIA H100", "GPU-1", ["GPU-0", "GPU-2"])
    monkeypatch.setattr(facts, "nvlinks", lambda: None)
    assert place(torch.device("cuda", 1)).linked is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks a machine without a driver")
def test_a_machine_without_a_driver_does_not_tell():
    assert facts.nvlinks() is None


@pytest.mark.gpu
def test_links_of_the_gpus_that_are_here():
    links, n = facts.nvlinks(), torch.cuda.device_count()
    assert links is not None
    assert [len(row) for row in links] == [n] * n


def a_run(documents: list[int], seq_len: int = 65536) -> SimpleNamespace:
    """What `expected` looks at of a run of the 1B model on two GPUs, whose first row has these documents."""
    config = composed(f"seq_len={seq_len}", "parallel.ring=2")
    rows = SimpleNamespace(lengths=lambda row: documents)
    batches = SimpleNamespace(rows=rows, rows_after=lambda seen: [[0]])
    done, phase = SimpleNamespace(rows_seen=0), SimpleNamespace(seq_len=seq_len)
    job = budget.job_of(config, 2, 512)
    return SimpleNamespace(batches=batches, done=done, phase=phase, job=job, machine=budget.Machine(), device=CUDA)


CUDA = torch.device("cuda")


def test_what_to_expect_is_the_budget_of_the_documents_that_are_there(monkeypatch):
    monkeypatch.setattr(facts, "peak_flops", lambda device: 989e12)
    whole, packed = (facts.expected(a_run(documents)) for documents in ([65536], [4096] * 16))
    run = a_run([65536])
    told = budget.budget(run.job, run.machine)
    assert whole["perf/step_seconds"] == pytest.approx(told.seconds_a_step, rel=1e-3)
    assert whole["perf/mfu"] == pytest.approx(told.utilisation, abs=1e-3)
    assert whole["perf/tokens_per_second_per_gpu"] == pytest.approx(told.tokens_per_second, abs=1)
    for one in (whole, packed):
        assert one["memory/peak_allocated_gib"] == pytest.approx(told.gpu_gib, abs=1e-3)
    documents = budget.budget(replace(run.job, document=4096), run.machine)  # 4096 keys at most, 2048.5 in the mean
    assert packed["perf/step_seconds"] == pytest.approx(documents.seconds_a_step, rel=1e-3)
    assert packed["perf/step_seconds"] < 0.8 * whole["perf/step_seconds"]
    monkeypatch.setattr(facts, "peak_flops", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert facts.expected(a_run([65536]))["perf/step_seconds"] == "not known for Tesla T4"
