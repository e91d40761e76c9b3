"""From a configuration to an open corpus: the cache, what invalidates it, and what is refused before any work."""

import errno
import os
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from omegaconf import OmegaConf
from omegaconf.errors import ValidationError
from test_tokenizer import byte_bpe

from ringspan.train import data
from ringspan.train.corpus import Corpus
from ringspan.train.data import DataConfig, cache_folder, check, open_corpus, prepare
from ringspan.train.packing import PackedRows


@pytest.fixture
def config(tmp_path) -> DataConfig:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("hello world")
    (tmp_path / "text" / "b.txt").write_text("more text")
    return DataConfig(path=str(tmp_path / "text"), cache=str(tmp_path / "cache"))


def test_documents_of_a_folder_become_tokens(config):
    corpus = open_corpus(config)
    assert corpus.tokens.tolist() == [*b"hello world", 256, *b"more text", 256]
    assert corpus.starts.tolist() == [0, 12, 22]
    assert corpus.name == "text (bytes)"


def test_a_tokenizer_json_is_used(config, tmp_path):
    byte_bpe(tmp_path / "tokenizer.json", special=["<eos>"])
    config.tokenizer = str(tmp_path / "tokenizer.json")
    corpus = open_corpus(config)
    assert corpus.starts.tolist() == [0, 11, 21]  # "he" of hello is one token
    assert corpus.tokens[10] == corpus.tokens[20] == corpus.end_of_document == 257
    assert corpus.vocab_size == 258
    assert corpus.name == "text (tokenizer.json)"


def test_preparing_once_is_enough(config, monkeypatch):
    folder = prepare(config)
    monkeypatch.setattr(data, "_write", None)  # not called again
    assert prepare(config) == folder
    check(config)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert sorted(path.name for path in folder.iterdir()) == ["ends.npy", "meta.json", "tokens.bin"]


@pytest.mark.parametrize("change", ["edit", "add", "remove", "tokenizer", "format"])
def test_whatever_changes_tokens_prepares_anew(config, change, tmp_path, monkeypatch):
    first = prepare(config)
    if change == "edit":
        (tmp_path / "text" / "a.txt").write_text("HELLO world")
    elif change == "add":
        (tmp_path / "text" / "c.txt").write_text("third")
    elif change == "remove":
        (tmp_path / "text" / "a.txt").unlink()
    elif change == "tokenizer":
        byte_bpe(tmp_path / "tokenizer.json")
        config.tokenizer = str(tmp_path / "tokenizer.json")
    elif change == "format":
        monkeypatch.setattr(data, "FORMAT", data.FORMAT + 1)
    second = prepare(config)
    assert second != first
    if change == "edit":
        assert bytes(open_corpus(config).tokens[:11].tolist()) == b"HELLO world"


def test_rows_do_not_change_the_corpus(config):
    config.cross_document = True
    folder = prepare(config)
    config.cross_document = False
    assert prepare(config) == folder
    rows = PackedRows(open_corpus(config), 64, 0, False)
    assert rows.lengths(0) == [12, 10, 42]
    assert rows.load(0, np.array([10, 11, 12, 63]))[1].tolist() == [256, -100, ord("o"), -100]


def test_a_preparation_that_fails_leaves_nothing(config, monkeypatch):
    def break_off(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "write_corpus", break_off)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    assert list(Path(config.cache).iterdir()) == []
    assert len(open_corpus(config).tokens) == 22


def test_a_full_disk_is_told_in_a_line(config, monkeypatch):
    def fill(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(data, "write_corpus", fill)
    assert refusal(config, prepare).startswith(f"data.cache={config.cache!r} cannot be written: No space left")
    monkeypatch.setenv("XDG_CACHE_HOME", config.cache)
    config.cache = None
    assert refusal(config, prepare).startswith(f"data.cache=null ({cache_folder(None)}) cannot be written: No space")
    assert list(cache_folder(None).iterdir()) == []


def test_what_a_killed_preparation_left_is_not_taken_and_goes(config, monkeypatch):
    folder = prepare(config)
    for age, name in ((2 * data.ABANDONED_SECONDS, "killed"), (0, "at-work")):
        left = folder.parent / f"{folder.name}.tmp-{name}"
        left.mkdir()
        (left / "tokens.bin").write_bytes(b"half")
        for path in (left / "tokens.bin", left):
            os.utime(path, times=(path.stat().st_mtime - age,) * 2)
    (folder / "meta.json").unlink()
    for path in folder.iterdir():
        path.unlink()
    assert prepare(config) == folder
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, f"{folder.name}.tmp-at-work"]


def test_files_that_change_under_the_reader_are_refused(config, tmp_path, monkeypatch):
    write = data.write_corpus

    def edit_and_write(*args, **kwargs):
        (tmp_path / "text" / "a.txt").write_text("something else")
        return write(*args, **kwargs)

    monkeypatch.setattr(data, "write_corpus", edit_and_write)
    with pytest.raises(ValueError, match="files changed while they were read"):
        prepare(config)
    assert list(Path(config.cache).iterdir()) == []


def prepare_together(config: DataConfig) -> tuple[str, str]:
    """Publish a corpus only when all ranks have written theirs."""
    publish = data._publish

    def wait_and_publish(temporary, folder):
        dist.barrier()
        publish(temporary, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_publish", wait_and_publish)
        folder = prepare(config)
    return str(folder), Corpus(folder).digest


def test_processes_that_prepare_at_once_do_no_harm(ranks, config):
    assert len(set(ranks(2)(prepare_together, config))) == 1
    assert len(list(Path(config.cache).iterdir())) == 1


def refusal(config: DataConfig, call=check) -> str:
    with pytest.raises(ValueError) as error:
        call(config)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("call", [check, prepare])
def test_mistakes_are_named(config, tmp_path, call):
    for name, content in (("empty", b""), ("binary", b"\0\1"), ("latin", b"na\xefve"), ("mark", b"\xef\xbb\xbf")):
        (tmp_path / name).write_bytes(content)

    def of(**fields) -> str:
        return refusal(DataConfig(**{"path": config.path, "cache": config.cache, **fields}), call)

    assert of(path="/no/such/file").startswith("data.path='/no/such/file' does not exist")
    assert of(path=str(tmp_path / "empty")).startswith(f"data.path='{tmp_path}/empty' is empty")
    assert of(path=str(tmp_path / "binary")).startswith(f"data.path='{tmp_path}/binary' is not text: binary has a NUL")
    assert of(path=str(tmp_path / "latin")).startswith(f"data.path='{tmp_path}/latin' is not text: latin is not UTF-8")
    assert of(tokenizer="gpt2").startswith("data.tokenizer='gpt2' does not exist")
    assert of(tokenizer=config.path).startswith(f"data.tokenizer='{config.path}' cannot be read (Is a directory)")
    assert of(tokenizer=f"{config.path}/a.txt").endswith("column 1")  # where the JSON breaks off
    assert of(cache=str(tmp_path / "mark")).startswith(f"data.cache='{tmp_path}/mark' cannot be made: File exists")
    assert of(cache=f"{config.path}/cache").startswith(f"data.cache='{config.path}/cache' is inside data.path=")
    if call is prepare:
        assert of(path=str(tmp_path / "mark")).startswith(f"data.path='{tmp_path}/mark' is empty")
    assert not Path(config.cache).exists() or list(Path(config.cache).iterdir()) == []


def test_a_hidden_cache_may_be_inside_the_text(config):
    config.cache = f"{config.path}/.cache"
    assert open_corpus(config).starts[-1] == 22


def test_skipped_files_are_known(config, tmp_path):
    (tmp_path / "text" / "picture").write_bytes(b"\0")
    assert open_corpus(config).skipped == ["picture"]


def test_the_cache_is_in_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder(None) == tmp_path / ".cache" / "ringspan"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(None) == tmp_path / "xdg" / "ringspan"
    assert cache_folder("~/here") == tmp_path / "here"
    monkeypatch.chdir(tmp_path)
    assert cache_folder("here") == tmp_path / "here"


def test_standard_library_end_to_end(tmp_path, monkeypatch):
    (tmp_path / "lib" / "pack").mkdir(parents=True)
    for name in ("pack/a", "pack/b", "single"):
        (tmp_path / "lib" / f"{name}.py").write_text(f"name = '{name}'\n")
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path / "lib")}.__getitem__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    check(DataConfig())
    corpus = open_corpus(DataConfig())
    first = bytes(corpus.tokens[: corpus.starts[1] - 1].tolist()).decode()
    assert first == "# pack/a.py\nname = 'pack/a'\n\n# pack/b.py\nname = 'pack/b'\n"
    assert len(corpus.starts) == 3
    assert corpus.name.startswith("standard library of Python 3.")
    assert len(list((tmp_path / "cache" / "ringspan").iterdir())) == 1


def test_configuration_is_typed():
    schema = OmegaConf.structured(DataConfig)
    assert OmegaConf.to_container(schema) == {
        "path": None,
        "tokenizer": "bytes",
        "cross_document": False,
        "cache": None,
    }
    with pytest.raises(ValidationError):
        OmegaConf.merge(schema, {"cross_document": "perhaps"})
