"""The data of a run: which text, cut into tokens how, kept where.

    check(config.data)                     # at the edge: finds every mistake in the configuration, quickly
    corpus = Corpus(prepare(config.data))  # one process: what open_corpus(config.data) does
    rows = PackedRows(corpus, seq_len, seed, config.data.cross_document)

With many ranks, rank 0 calls `prepare` and tells the others the folder it returns (a broadcast, which they wait in),
then every rank opens `Corpus(folder)`, so that all read the same tokens even while files in data.path change. Hosts
that share no file system each call `prepare`; `Corpus.digest` then says whether they hold the same tokens.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from ringspan.train.corpus import FORMAT, Corpus, is_corpus, write_corpus
from ringspan.train.documents import (
    Source,
    check_text,
    find_source,
    fingerprint,
    read_documents,
    without_binaries,
)
from ringspan.train.tokenizer import load_tokenizer, tokenizer_fingerprint

ABANDONED_SECONDS = 3600.0  # a preparation that has written nothing for so long was killed


@dataclass(kw_only=True)
class DataConfig:
    path: str | None = None  # a text file, a .jsonl file, or a folder of them; null: Python's own standard library
    tokenizer: str = "bytes"  # or the path of a Hugging Face tokenizer.json
    cross_document: bool = False  # true: documents end to end, cut at seq_len, attention and labels going across them
    cache: str | None = None  # folder for tokenised text; null: ringspan in the user's cache folder


def check(config: DataConfig) -> None:
    """Find mistakes before anything heavy is built. Raises ValueError with the field, its value and a way out.

    Reads a MiB of text at most, or the beginnings of a folder's files up to the first that is text.
    """
    source = find_source(config.path)
    folder = _folder(config, source)
    if is_corpus(folder):
        return
    check_text(source)
    load_tokenizer(config.tokenizer)
    _check_cache(config, source, folder.parent)


def prepare(config: DataConfig) -> Path:
    """Tokenise the text unless that is done, and return the folder to open with `Corpus`.

    Several processes may prepare at once, and be killed at any time: the folder appears complete or not at all. The
    cache may be deleted whenever no run starts. Raises ValueError as `check` does, and where a file turns out not to
    be text behind its first MiB.
    """
    source = find_source(config.path)
    folder = _folder(config, source)
    if is_corpus(folder):
        return folder
    check_text(source)
    _check_cache(config, source, folder.parent)
    _remove_abandoned(folder)
    temporary = folder.with_name(f"{folder.name}.tmp-{secrets.token_hex(8)}")
    try:
        temporary.mkdir()
        _write(temporary, config, source)
        if _folder(config, source) != folder:
            raise ValueError(f"{source.setting}: files changed while they were read; start again")
        _publish(temporary, folder)
    except OSError as error:  # a full disk, say; errors of reading are ValueErrors by now
        raise ValueError(f"{_setting(config)} cannot be written: {error.strerror}; give another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def open_corpus(config: DataConfig) -> Corpus:
    """Prepare and open, in one process."""
    return Corpus(prepare(config))


def _write(folder: Path, config: DataConfig, source: Source) -> None:
    tokenizer = load_tokenizer(config.tokenizer)
    text_source, skipped = without_binaries(source)
    texts = (row["text"] for row in read_documents(text_source))
    name = f"{source.name} ({Path(config.tokenizer).name})"
    if not write_corpus(folder, texts, tokenizer, name=name, skipped=skipped):
        raise ValueError(f"{source.setting} is empty: there is no text in it")


def _publish(temporary: Path, folder: Path) -> None:
    try:
        os.rename(temporary, folder)
    except OSError:
        if not is_corpus(folder):  # else another process was quicker: the same tokens are there
            raise


def _folder(config: DataConfig, source: Source) -> Path:
    """Where the corpus is or will be: its name is a hash of all that decides what is in it."""
    key = json.dumps([FORMAT, source.name, fingerprint(source), source.headed, tokenizer_fingerprint(config.tokenizer)])
    return cache_folder(config.cache) / hashlib.sha256(key.encode()).hexdigest()[:32]


def cache_folder(cache: str | None) -> Path:
    """The folder that `data.cache` means."""
    if cache is not None:
        return Path(os.path.abspath(os.path.expanduser(cache)))
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "ringspan"


def _check_cache(config: DataConfig, source: Source, cache: Path) -> None:
    """Raises ValueError where the cache cannot be written, or is inside the folder that is read."""
    if source.would_read(cache):
        raise ValueError(
            f"{_setting(config)} is inside {source.setting} and would be read as text; give another folder"
        )
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{_setting(config)} cannot be made: {error.strerror}; give another folder") from error
    if not os.access(cache, os.W_OK | os.X_OK):
        raise ValueError(f"{_setting(config)} cannot be written; give another folder")


def _setting(config: DataConfig) -> str:
    """To begin an error with: the field, its value, and what that means where it is null."""
    return f"data.cache=null ({cache_folder(None)})" if config.cache is None else f"data.cache={config.cache!r}"


def _remove_abandoned(folder: Path) -> None:
    """Delete what killed preparations of this corpus left. Those at work write every few seconds."""
    for temporary in folder.parent.glob(f"{folder.name}.tmp-*"):
        with contextlib.suppress(FileNotFoundError):  # another process deletes it too
            written = max(path.stat().st_mtime for path in (temporary, *temporary.iterdir()))
            if time.time() - written > ABANDONED_SECONDS:
                shutil.rmtree(temporary, ignore_errors=True)
