"""check=true: what it looks at, what it says, and that it leaves nothing behind."""

import io
from pathlib import Path

import pytest
import torch.distributed as dist
from commands import exit_code
from test_parity import job, write_texts

from ringspan.parallel import workers
from ringspan.parallel.attention import SequenceAttention
from ringspan.train import checkup
from ringspan.train.data import DataConfig, prepare
from ringspan.train.phases import Phase

SHAPE = "model=tiny model.n_layers=1 model.dim=16 model.n_heads=2 model.n_kv_heads=1 model.head_dim=8 model.mlp_dim=16"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("checkup")


@pytest.fixture(scope="module")
def text(root):
    return write_texts(root / "text", 50, 90)


def look(config):
    """On a rank: (what is printed, what is told)."""
    stream, told = io.StringIO(), ""
    try:
        checkup.checkup(config, stream)
    except ValueError as error:
        told = str(error)
    return stream.getvalue(), told


def lines_of(answers) -> dict[str, tuple[str, str]]:
    """By part: (ok or FAILED, words). Rank 0 alone prints, and all ranks are told the same."""
    (said, told), *others = answers
    assert all(other == ("", told) for other in others)
    parts = [line.split(None, 2) for line in said.splitlines()]
    assert [name for name, *_ in parts] == ["configuration", "communication", "data", "memory"]
    failed = [name for name, state, _ in parts if state == "FAILED"]
    assert told == (f"check=true: this run would fail, by its {' and its '.join(failed)}; see above" if failed else "")
    return {name: (state, words) for name, state, words in parts}


@pytest.mark.parametrize("mesh", [(1, 2, 1), (1, 1, 2), (2, 1, 1)])
def test_ranks_talk_as_they_would_in_training(mesh, root, text, ranks):
    said = lines_of(ranks(2)(look, job(root, "talk", text, mesh=mesh)))
    assert {state for state, _ in said.values()} == {"ok"}
    data, ring, ulysses = mesh
    assert f"2 processes on 1 host, data {data} x ring {ring} x ulysses {ulysses}: all" in said["communication"][1]
    assert ("transport p2p" in said["communication"][1]) == (ring == 2)


def picked_for(config):
    """The length that attention is picked for, and what is said of it; the strategy goes by length on GPUs alone."""
    pick, lengths = SequenceAttention.pick, []

    def seen(self, q, *, kv_heads=None, seq_len=None):
        lengths.append(seq_len)
        return pick(self, q, kv_heads=kv_heads, seq_len=seq_len)

    SequenceAttention.pick = seen
    try:
        return lengths, look(config)
    finally:
        SequenceAttention.pick = pick


def test_attention_is_picked_as_the_run_does_it_for_the_longest_phase(root, text, ranks):
    config = job(root, "phases", text)
    config.phases = [Phase(step=1, seq_len=128), Phase(step=2, seq_len=32)]
    (lengths, _), *_ = ranks(1)(picked_for, config)
    assert lengths == [128]


def test_text_is_read_as_far_as_it_is_tokenised(root, text, ranks):
    fresh = job(root, "data", text)
    fresh.data = DataConfig(path=text, cache=f"{root}/empty")
    state, words = lines_of(ranks(1)(look, fresh))["data"]
    total = sum(len(path.read_text()) for path in sorted(Path(text).iterdir())[: checkup.SEGMENTS])
    assert (state, f"its first {total:,} tokens" in words) == ("ok", True)
    assert not list((root / "empty").glob("*")), "it has tokenised"
    prepare(fresh.data)
    _, words = lines_of(ranks(1)(look, fresh))["data"]
    assert "rows of 64, the first with " in words


def test_each_part_that_would_fail_is_told(root, text, ranks):
    config = job(root, "fails", text, mesh=(1, 2, 1))
    config.data = DataConfig(path=f"{text}/00.txt", cache=f"{root}/one", held_out=0.5)
    prepare(config.data)
    said = lines_of(ranks(2)(look, config))
    assert said["data"] == ("FAILED", "data.held_out=0.5: there is but one document; give text of several, or 0")
    assert said["memory"][0] == "FAILED"
    config = job(root, "large", text, mesh=(1, 2, 1))
    config.model.dim, config.model.n_layers, config.model.mlp_dim = 65536, 200, 65536
    state, words = lines_of(ranks(2)(look, config))["memory"]
    assert state == "FAILED"
    assert words.startswith("this run needs ")


def look_with_a_lost_wire(config):
    """Rank 1 gets something else than rank 0 has sent."""
    passed, checkup.pass_on = checkup.pass_on, lose
    try:
        return look(config)
    finally:
        checkup.pass_on = passed


def lose(mesh, transport, device):
    if dist.get_rank() == 1:
        raise ValueError("rank 1 of a ring got other keys than rank 0 has sent over p2p")


def look_without_the_file_system(config):
    config.run_dir += "" if dist.get_rank() == 0 else "/elsewhere"
    return look(config)


@pytest.mark.parametrize(
    ("way", "part", "said"),
    [
        (look_with_a_lost_wire, "communication", "rank 1 of a ring got other keys"),
        (look_without_the_file_system, "data", "file system that all hosts share"),
    ],
)
def test_what_another_rank_finds_is_told_by_rank_0(way, part, said, root, text, ranks):
    state, words = lines_of(ranks(2)(way, job(root, "other", text, mesh=(1, 2, 1))))[part]
    assert state == "FAILED"
    assert said in words


@pytest.mark.parametrize(("asked", "code"), [("data.held_out=0", 0), ("data.held_out=0.5", 1)])
def test_the_command_prints_a_report_and_leaves_nothing_behind(asked, code, tmp_path, monkeypatch, capfd):
    (tmp_path / "text.txt").write_text("some text to look at\n" * 50)
    prepare(DataConfig(path=f"{tmp_path}/text.txt", cache=f"{tmp_path}/cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workers, "gpus", lambda: 0)
    data = [f"data.path={tmp_path}/text.txt", f"data.cache={tmp_path}/cache", asked]
    left = exit_code("train.py", *SHAPE.split(), *data, "check=true", "seq_len=65", "name=x")
    out, err = capfd.readouterr()
    assert left == code, err
    assert [line.split()[1] for line in out.splitlines()] == ["ok", "ok", *(["FAILED"] * 2 if code else ["ok"] * 2)]
    assert len(err.splitlines()) == code
    assert list((tmp_path / "runs").iterdir()) == []
