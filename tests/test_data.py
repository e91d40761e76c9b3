"""From a configuration to an open corpus: the cache, what invalidates it, and what is refused before any work."""

import errno
import os
import re
import shutil
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from omegaconf import OmegaConf
from omegaconf.errors import ValidationError
from test_tokenizer import byte_bpe

from ringspan.train import data, shards
from ringspan.train.corpus import Corpus
from ringspan.train.data import DataConfig, cache_folder, check, prepare
from ringspan.train.packing import LongDocuments, PackedRows, Packing
from ringspan.train.reading import Unreadable


@pytest.fixture
def config(tmp_path) -> DataConfig:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("hello world")
    (tmp_path / "text" / "b.txt").write_text("more text")
    return DataConfig(path=str(tmp_path / "text"), cache=str(tmp_path / "cache"))


def open_corpus(config: DataConfig) -> Corpus:
    """Of the one source of a configuration."""
    (folder,) = prepare(config)
    return Corpus(folder)


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
    assert corpus.tokens[10:11] == corpus.tokens[20:21] == corpus.end_of_document == 257
    assert corpus.vocab_size == 258
    assert corpus.name == "text (tokenizer.json)"


def test_token_ids_are_read_from_their_column_and_their_mask_from_its(config, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"ids": [5, 6, 7], "trained": [0, 1, 1]}\n')
    given = replace(config, path=str(tmp_path / "rows.jsonl"), column="ids")
    masked = open_corpus(replace(given, mask_column="trained"))
    assert masked.tokens.tolist() == [5, 6, 7, 256]
    assert masked.labelled.tolist() == [0, 1, 1, 1]
    assert open_corpus(given).labelled is None


def test_preparing_once_is_enough(config, monkeypatch):
    (folder,) = prepare(config)
    monkeypatch.setattr(data, "_write", None)  # not called again
    assert prepare(config) == [folder]
    check(config)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    names = ["00000.documents", "00000.tokens", "manifest.json", "source", "verified.json"]
    assert sorted(path.name for path in folder.iterdir()) == names


@pytest.mark.parametrize("change", ["edit", "add", "remove", "tokenizer", "format", "column", "unreadable"])
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
    elif change == "column":
        config.column = "body"
    elif change == "unreadable":
        config.unreadable = Unreadable.refuse
    second = prepare(config)
    assert second != first
    if change == "edit":
        assert bytes(open_corpus(config).tokens[:11].tolist()) == b"HELLO world"


def test_rows_do_not_change_the_corpus(config):
    folder = prepare(config)
    for changes in ({"cross_document": True}, {"packing": Packing.whole}, {"needles": 0.5}, {"held_out": 0.5}):
        assert prepare(replace(config, **changes)) == folder
    rows = PackedRows(open_corpus(config), 64, 0)
    assert rows.lengths(0) == [12, 10, 42]
    assert rows.load(0, np.array([10, 11, 12, 63]))[1].tolist() == [256, -100, ord("o"), -100]


def break_off_after_the_first_shard(config: DataConfig, monkeypatch, error: BaseException) -> None:
    """One shard a document, and an end behind the first of two."""

    def break_off(shard):
        raise error

    monkeypatch.setattr(shards, "UNIT_CHARACTERS", 1)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 1)
    with pytest.raises(type(error) if not isinstance(error, OSError) else ValueError):
        prepare(config, told=break_off)


def test_a_preparation_that_is_killed_goes_on_where_it_was(config, monkeypatch):
    break_off_after_the_first_shard(config, monkeypatch, KeyboardInterrupt())
    (left,) = Path(config.cache).iterdir()
    assert left.name.endswith(".partial")
    (left / "00000.tokens").touch()
    told = []
    monkeypatch.setattr(shards, "tokenise", lambda t, unit, real=shards.tokenise: told.append(unit) or real(t, unit))
    assert open_corpus(config).tokens.tolist() == [*b"hello world", 256, *b"more text", 256]
    assert [unit[0].content for unit in told] == ["more text"]
    assert len(list(Path(config.cache).iterdir())) == 1


def test_what_another_source_has_left_is_not_taken(config, monkeypatch, tmp_path):
    source = data.find_source(config.path)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "00000.tokens").write_bytes(b"xx")
    (tmp_path / "out.partial" / "source").write_text("another")
    data.write_corpus(tmp_path / "out", config, source)
    assert Corpus(tmp_path / "out").tokens.tolist() == open_corpus(config).tokens.tolist()


def test_a_full_disk_is_told_in_a_line(config, monkeypatch):
    def fill(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(data, "write_shards", fill)
    assert refusal(config, prepare).startswith(f"data.cache={config.cache!r} cannot be written: No space left")
    monkeypatch.setenv("XDG_CACHE_HOME", config.cache)
    config.cache = None
    assert refusal(config, prepare).startswith(f"data.cache=null ({cache_folder(None)}) cannot be written: No space")


def test_files_that_change_under_the_reader_are_refused(config, tmp_path, monkeypatch):
    write = data.write_shards

    def edit_and_write(*args, **kwargs):
        (tmp_path / "text" / "a.txt").write_text("something else")
        return write(*args, **kwargs)

    monkeypatch.setattr(data, "write_shards", edit_and_write)
    with pytest.raises(ValueError, match="files changed while they were read"):
        prepare(config)
    assert list(Path(config.cache).iterdir()) == []


def test_a_prepared_corpus_whose_hash_is_wrong_is_refused(config):
    (folder,) = prepare(config)
    content = (folder / "00000.tokens").read_bytes()
    (folder / "00000.tokens").write_bytes(content[:-1] + b"x")
    for one in (config, DataConfig(path=str(folder))):
        assert "00000.tokens does not have the hash that is in the manifest" in refusal(one, prepare)


def test_prepared_shards_are_a_source(config, tmp_path):
    (folder,) = prepare(config)
    shards_alone = DataConfig(path=str(folder), cache="/no/such/place")
    check(shards_alone)
    assert prepare(shards_alone) == [folder]
    assert open_corpus(shards_alone).digest == open_corpus(config).digest
    byte_bpe(tmp_path / "tokenizer.json")
    for call in (check, prepare):
        with pytest.raises(
            ValueError, match=r"data\.tokenizer='.*' is not the one that data\.path='.*' was prepared with"
        ):
            call(replace(shards_alone, tokenizer=str(tmp_path / "tokenizer.json")))


def test_a_mixture_is_prepared_source_by_source(config, tmp_path):
    (tmp_path / "more.txt").write_text("third")
    mixed = DataConfig(mixture={config.path: 3, str(tmp_path / "more.txt"): 1}, cache=config.cache)
    check(mixed)
    folders = prepare(mixed)
    assert [Corpus(folder).name for folder in folders] == ["text (bytes)", "more.txt (bytes)"]
    assert folders[:1] == prepare(config)
    mixed.mixture["/no/such/file"] = 1
    assert refusal(mixed).startswith("data.path='/no/such/file' does not exist")


def prepare_together(config: DataConfig) -> tuple[str, str, int]:
    """All ranks at once: who writes, and what comes of it."""
    written = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_write", lambda *args, real=data._write: written.append(1) or real(*args))
        dist.barrier()
        (folder,) = prepare(config)
    return str(folder), Corpus(folder).digest, len(written)


def test_processes_that_prepare_at_once_do_it_once(ranks, config):
    for _ in range(2):
        results = ranks(4)(prepare_together, config)
        assert len({result[:2] for result in results}) == 1
        assert sum(result[2] for result in results) == 1
        assert len(list(Path(config.cache).iterdir())) == 1
        shutil.rmtree(config.cache)


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


def test_a_source_of_which_nothing_is_left_says_what_was_first(config, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n{}\n3\n')
    told = refusal(DataConfig(path=str(tmp_path / "a.jsonl"), cache=config.cache), prepare)
    why = 'a.jsonl line 1 has no "text" (data.column); it has body (and 2 more)'
    assert told == f"data.path='{tmp_path}/a.jsonl' is empty: there is no text in it; left out: {why}"
    assert list(Path(config.cache).iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"overlap": -1}, "data.overlap=-1: must be 0 or more"),
        ({"shortest": -1}, "data.shortest=-1: must be 0 or more"),
        ({"workers": -1}, "data.workers=-1: must be 0 or more"),
        ({"held_out": 1.0}, "data.held_out=1.0: must be from 0 to below 1"),
        ({"needles": -0.1}, "data.needles=-0.1: must be from 0 to 1"),
        ({"path": "a", "mixture": {"b": 1}}, "data.path='a': give it or data.mixture, not both"),
        ({"mixture": {"a": 1, "b": 0}}, "data.mixture: the share of 'b' is 0; it must be above 0"),
        ({"mixture": {"a": float("nan")}}, "data.mixture: the share of 'a' is nan; it must be above 0"),
        ({"overlap": 5, "packing": Packing.concatenate}, "data.overlap=5: with data.packing=concatenate"),
        ({"overlap": 5, "long_documents": LongDocuments.drop}, "data.overlap=5: with data.long_documents=drop"),
    ],
)
def test_values_that_do_not_go_together_are_named(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DataConfig(**fields)


def test_a_hidden_cache_may_be_inside_the_text(config):
    config.cache = f"{config.path}/.cache"
    assert open_corpus(config).starts[-1] == 22


def test_skipped_files_are_known(config, tmp_path):
    (tmp_path / "text" / "picture").write_bytes(b"\0")
    corpus = open_corpus(config)
    assert (corpus.skipped, corpus.n_skipped) == (["picture"], 1)
    config.unreadable = Unreadable.refuse
    assert "picture has a NUL byte at byte 0; mend or remove it" in refusal(config, prepare)


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
    assert OmegaConf.to_object(schema) == DataConfig()
    mixed = OmegaConf.merge(schema, OmegaConf.from_dotlist(["mixture={a/b.txt: 3, hub:x/y: 1}"]))
    assert OmegaConf.to_object(mixed).mixture == {"a/b.txt": 3.0, "hub:x/y": 1.0}
    for bad in ({"cross_document": "perhaps"}, {"packing": "tight"}, {"mixture": {"a": "much"}}):
        with pytest.raises(ValidationError):
            OmegaConf.merge(schema, bad)
