"""Shards against the plain definition; the same files whatever the processes, and wherever one was killed."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringspan.train import shards as module
from ringspan.train.corpus import Joined, Shard
from ringspan.train.reading import Segment
from ringspan.train.shards import Unit, token_dtype, tokenise, write_shards
from ringspan.train.tokenizer import ByteTokenizer, load_tokenizer

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=9)
IDS = st.lists(st.tuples(st.integers(0, 256), st.booleans()), min_size=1, max_size=9)
PARTS = st.one_of(st.tuples(TEXT, st.booleans()), IDS)


def segment(part, last: bool) -> Segment:
    if isinstance(part, tuple):
        return Segment(*part, last=last)
    return Segment(np.array([token for token, _ in part]), np.array([trained for _, trained in part]), last)


def segments(documents) -> list[Segment]:
    return [segment(part, at == len(one) - 1) for one in documents for at, part in enumerate(one)]


def expected(document) -> tuple[list[int], list[bool], int]:
    """(tokens, whether each is a label, bytes) of a document, by the definition."""
    tokens, trained, size = [], [], 0
    for part in document:
        if isinstance(part, tuple):
            raw = part[0].encode()
            tokens, trained, size = [*tokens, *raw], [*trained, *[part[1]] * len(raw)], size + len(raw)
        else:
            tokens, trained = [*tokens, *(t for t, _ in part)], [*trained, *(m for _, m in part)]
    if isinstance(document[-1], tuple) or tokens[-1] != 256:
        tokens, trained = [*tokens, 256], [*trained, trained[-1]]
    return tokens, trained, size


def read(folder: Path, shards: list[Shard]) -> list[tuple[list[int], list[bool], int]]:
    tokens = Joined([np.fromfile(folder / f"{s.name}.tokens", token_dtype(257)) for s in shards]).tolist()
    masks = [
        np.fromfile(folder / f"{s.name}.mask", np.uint8) if s.masked else np.ones(s.tokens, np.uint8) for s in shards
    ]
    trained = np.concatenate(masks).astype(bool).tolist()
    found, at, begin = [], 0, 0
    for shard in shards:
        for end, size in np.fromfile(folder / f"{shard.name}.documents", np.int64).reshape(-1, 2).tolist():
            found.append((tokens[begin : at + end], trained[begin : at + end], size))
            begin = at + end
        at += shard.tokens
    assert begin == len(tokens)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.lists(PARTS, min_size=1, max_size=4), min_size=1, max_size=12),
    st.integers(1, 40),
    st.integers(1, 60),
    st.integers(0, 99),
)
def test_documents_come_back_also_after_a_kill(documents, unit, shard, killed):
    with TemporaryDirectory() as one, TemporaryDirectory() as two, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "UNIT_CHARACTERS", unit)
        patch.setattr(module, "SHARD_TOKENS", shard)
        shards = write_shards(Path(one), segments(documents), ByteTokenizer)
        assert read(Path(one), shards) == [expected(document) for document in documents]
        assert all(s.tokens >= shard for s in shards[:-1])

        def break_off(shard):
            if shard.name == f"{killed % len(shards):05}":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_shards(Path(two), segments(documents), ByteTokenizer, told=break_off)
        names = []
        assert (
            write_shards(Path(two), segments(documents), ByteTokenizer, told=lambda s: names.append(s.name)) == shards
        )
        assert names == [s.name for s in shards]
        assert files(Path(one)) == files(Path(two))


@pytest.mark.parametrize("harm", ["cut", "flipped", "gone", "no record", "half a record"])
def test_a_shard_that_is_not_whole_is_written_again_with_all_that_follow(tmp_path, monkeypatch, harm):
    monkeypatch.setattr(module, "UNIT_CHARACTERS", 10)
    monkeypatch.setattr(module, "SHARD_TOKENS", 30)
    todo = segments([[("some text ", True)] * 3] * 9)
    write_shards(tmp_path, todo, ByteTokenizer)
    whole = files(tmp_path)
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in whole}
    file = tmp_path / ("00004.json" if "record" in harm else "00004.tokens")
    if harm in {"gone", "no record"}:
        file.unlink()
    else:
        content = file.read_bytes()
        file.write_bytes(content[:9] + (bytes([content[9] ^ 1]) + content[10:] if harm == "flipped" else b""))
    tokenised = []
    monkeypatch.setattr(module, "tokenise", lambda t, unit: tokenised.append(unit) or tokenise(t, unit))
    write_shards(tmp_path, todo, ByteTokenizer)
    assert files(tmp_path) == whole
    rewritten = {name for name in whole if (tmp_path / name).stat().st_mtime_ns != times[name]}
    assert rewritten == {name for name in whole if name >= "00004"}
    assert len(tokenised) == 27 - 4 * 3


def test_the_files_are_the_same_with_any_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "UNIT_CHARACTERS", 1000)
    monkeypatch.setattr(module, "SHARD_TOKENS", 5000)
    todo = segments([[("some text " * (n % 50 + 1), True)] for n in range(200)])
    found = []
    for workers in (1, 2):
        (folder := tmp_path / str(workers)).mkdir()
        write_shards(folder, iter(todo), partial(load_tokenizer, "bytes"), workers=workers)
        found.append(files(folder))
    assert found[0] == found[1]
    assert len(found[0]) > 9


def test_ids_that_the_tokenizer_has_not_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"token id 257 in the text, and data\.tokenizer knows 257: give"):
        write_shards(tmp_path, segments([[[(257, True)]]]), ByteTokenizer)


def test_a_process_that_dies_is_told_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "UNIT_CHARACTERS", 1)
    with pytest.raises(ValueError, match=r"a process that tokenises died.*data\.workers a lower number"):
        write_shards(tmp_path, segments([[("text", True)]] * 5), partial(load_tokenizer, "no such file"), workers=2)


def test_units_are_bounded_whatever_the_documents():
    todo = segments([[("x" * 1000, True)] * 9000])
    assert (
        max(sum(len(one.content) for one in unit) for unit in module.units(iter(todo))) < module.UNIT_CHARACTERS + 1000
    )


KILLED = """
import sys
from functools import partial
from pathlib import Path
from ringspan.train import shards
from ringspan.train.documents import find_source
from ringspan.train.reading import Columns, Skipped
from ringspan.train.tokenizer import load_tokenizer

assert __name__ == "__main__", "a process that tokenises has imported the script, and all that it needs"
shards.UNIT_CHARACTERS, shards.SHARD_TOKENS = 20_000, 30_000
if __name__ == "__main__":
    folder, tokenizer, text = sys.argv[1:]
    todo, load = find_source(text).segments(Columns(), Skipped("")), partial(load_tokenizer, tokenizer)
    shards.write_shards(Path(folder), todo, load, workers=2, told=lambda shard: print(shard, flush=True))
"""


def children(pid: int) -> list[int]:
    return [int(one) for task in Path(f"/proc/{pid}/task").iterdir() for one in (task / "children").read_text().split()]


def test_a_killed_preparation_leaves_no_process_and_goes_on_to_identical_shards(tmp_path):
    (tmp_path / "text").mkdir()
    rng = np.random.default_rng(0)
    for n in range(60):
        (tmp_path / "text" / f"{n}.txt").write_text(" ".join(map(str, rng.integers(0, 1000, 4000))))
    (tmp_path / "run.py").write_text(KILLED)

    def start(folder: Path) -> subprocess.Popen:
        folder.mkdir(exist_ok=True)
        arguments = [str(tmp_path / "run.py"), str(folder), "bytes", str(tmp_path / "text")]
        return subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)

    whole = start(tmp_path / "whole")
    lines = whole.communicate(timeout=60)[0].splitlines()
    assert whole.returncode == 0
    killed = start(tmp_path / "killed")
    assert killed.stdout.readline()
    left = children(killed.pid)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert len(left) >= 2
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() and os.getpgid(pid) for pid in left) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in left if Path(f"/proc/{pid}").exists()]
    again = start(tmp_path / "killed")
    assert again.communicate(timeout=60)[0].splitlines() == lines
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_unit_of_the_middle_of_a_document_ends_none():
    unit = tokenise(ByteTokenizer(), [Segment("ab"), Segment("c", False)])
    assert (unit.tokens.tolist(), unit.mask.tolist(), len(unit.ends)) == ([97, 98, 99], [1, 1, 0], 0)
    assert isinstance(unit, Unit)
    assert (unit.open_bytes, unit.segments) == (3, 2)
