"""launch/prepare.py: what it writes, how it goes on, and how it tells of mistakes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import exit_code
from test_data import open_corpus

from ringspan.train import prepare
from ringspan.train.corpus import Corpus
from ringspan.train.data import DataConfig
from ringspan.train.documents import find_source
from ringspan.train.prepare import PrepareConfig, prepare_folder, text_bytes
from ringspan.train.tokenizer import load_tokenizer

SCRIPT = Path(__file__).parents[1] / "launch" / "prepare.py"


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def words(folder: Path, files: int, each: int) -> Path:
    folder.mkdir()
    for n in range(files):
        text = " ".join(map(str, np.random.default_rng(n).integers(0, 1000, each)))
        (folder / f"{n:03}.txt").write_text(text)
    return folder


def quiet(what: str, total: int | None):
    return lambda size: None


def test_a_bpe_is_trained_and_used(tmp_path):
    words(tmp_path / "text", 20, 500)
    (tmp_path / "text" / "picture").write_bytes(b"\0")
    run = start(tmp_path, "data.path=text", "out=made/here", "bpe=300", "data.workers=1")
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out) == (0, "")
    corpus, tokenizer = Corpus(tmp_path / "made/here"), load_tokenizer(str(tmp_path / "made/here.bpe300.json"))
    assert corpus.vocab_size == tokenizer.vocab_size == 300
    first = corpus.tokens[: corpus.starts[1]].tolist()
    assert first == [
        *tokenizer.encode([(tmp_path / "text/000.txt").read_text()])[0].tolist(),
        tokenizer.end_of_document,
    ]
    assert f"text (here.bpe300.json): {len(corpus.tokens):,} tokens, 20 documents, " in err
    assert "left out: 1 files or rows: picture\n" in err
    assert "to train: python launch/train.py data.path=made/here" in err
    assert {path.name for path in tmp_path.iterdir()} == {"text", "made"}
    again = DataConfig(path=str(tmp_path / "made/here"), cache="/no/such/place")
    assert open_corpus(again).digest == corpus.digest
    again.tokenizer = str(tmp_path / "made/here.bpe300.json")
    assert open_corpus(again).digest == corpus.digest


def test_what_was_killed_goes_on_and_ends_the_same(tmp_path):
    words(tmp_path / "text", 9, 4_000_000 // 4)  # more than one shard
    whole = prepare_folder(
        PrepareConfig(out=str(tmp_path / "whole"), data=DataConfig(path=str(tmp_path / "text"))), quiet
    )
    killed = start(tmp_path, "data.path=text", "out=killed")
    deadline = time.monotonic() + 50
    while not (tmp_path / "killed.partial" / "00000.json").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    (left,) = tmp_path.glob("killed*")  # it may have been quicker than the kill
    written = os.stat(left / "00000.tokens").st_mtime_ns
    again = start(tmp_path, "data.path=text", "out=killed")
    assert (again.communicate(timeout=60), again.returncode)[1] == 0
    assert os.stat(tmp_path / "killed" / "00000.tokens").st_mtime_ns == written
    assert Corpus(tmp_path / "killed").digest == whole.digest
    for file in (tmp_path / "whole").iterdir():
        if file.name != "verified.json":
            assert (tmp_path / "killed" / file.name).read_bytes() == file.read_bytes()


def test_ctrl_c_ends_it_at_once_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "prepare_folder", interrupted)
    monkeypatch.setattr(os, "_exit", sys.exit)
    assert exit_code("prepare.py", f"out={tmp_path}/out") == 130
    assert capsys.readouterr().err.startswith("prepare.py: stopped; the same command goes on where it was\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "out is missing: give the folder to write, out=FOLDER"),
        ("out=x data.colum=a", "data.colum: there is no such key; did you mean data.column?"),
        ("out=x bpe=3", "bpe=3: must be 0 or at least 257"),
        ("out=x data.path=nowhere", "data.path='nowhere' does not exist"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments, message, tmp_path):
    run = start(tmp_path, *arguments.split())
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith("prepare.py: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_go_together_is_refused(tmp_path):
    text = str(words(tmp_path / "text", 2, 9))

    def refusal(out: str, data: DataConfig, bpe: int = 0) -> str:
        with pytest.raises(ValueError) as error:
            prepare_folder(PrepareConfig(out=out, bpe=bpe, data=data), quiet)
        return str(error.value)

    assert "prepare each source by itself" in refusal("x", DataConfig(mixture={text: 1}))
    assert "leave one of them out" in refusal("x", DataConfig(path=text, tokenizer="t.json"), bpe=300)
    assert "is inside data.path=" in refusal(f"{text}/out", DataConfig(path=text))
    out = str(tmp_path / "out")
    prepare_folder(PrepareConfig(out=out, data=DataConfig(path=text)), quiet)
    assert "is prepared already" in refusal(f"{out}2", DataConfig(path=out))
    (tmp_path / "text" / "new.txt").write_text("more")
    assert "is there, and not this text prepared like this" in refusal(out, DataConfig(path=text))
    assert "is there, and not this text" in refusal(text, DataConfig(path=None))
    (tmp_path / "file").touch()
    assert "cannot be written: " in refusal(str(tmp_path / "file" / "out"), DataConfig(path=text))


def test_progress_is_told_in_bytes_of_text(tmp_path):
    text = words(tmp_path / "text", 3, 200)
    told: dict[str, list[int | None]] = {}

    def bar(what: str, total: int | None):
        told[what] = [total]
        return told[what].append

    prepare_folder(PrepareConfig(out=str(tmp_path / "out"), bpe=300, data=DataConfig(path=str(text), workers=1)), bar)
    total = sum(path.stat().st_size for path in text.iterdir())
    assert list(told) == ["tokenizer", "tokens"]
    for counted in told.values():
        assert counted[0] == sum(counted[1:]) == total
    (text / "a.jsonl").touch()
    assert text_bytes(find_source(str(text))) is None
