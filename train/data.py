"""The data of a run: which text, cut into tokens how, kept where, packed into rows how.

    check(config.data)                     # at the edge: finds every mistake in the configuration, quickly
    folders = prepare(config.data)         # one process: a folder for each source
    text = Text(folders, config.data)      # all processes
    rows = text.rows(seq_len, seed)

With many ranks, rank 0 calls `prepare` and tells the others the folders it returns (a broadcast, which they wait in),
then every rank opens them, so that all read the same tokens even while files in data.path change. Hosts that share no
file system each call `prepare`; `Corpus.digest` then says whether they hold the same tokens.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from ringspan.train.corpus import FORMAT, Shard, is_corpus, read_manifest, verify, write_manifest
from ringspan.train.documents import Source, find_source
from ringspan.train.packing import LongDocuments, Packing
from ringspan.train.reading import Columns, Skipped, Unreadable
from ringspan.train.shards import token_dtype, write_shards
from ringspan.train.tokenizer import Tokenizer, load_tokenizer, tokenizer_fingerprint

Told = Callable[[Shard], None]


@dataclass(kw_only=True)
class DataConfig:
    # A file (text, .jsonl, .parquet, .arrow), a folder of them, one that launch/prepare.py wrote, or hub:OWNER/NAME;
    # null: Python's own standard library
    path: str | None = None
    mixture: dict[str, float] = field(
        default_factory=dict
    )  # instead of path: sources, and each one's share of the rows
    column: str = "text"  # of rows: text, token ids or chat turns
    mask_column: str | None = None  # of rows with token ids: 0 and 1; 0 is no label
    streaming: bool = True  # of the hub; false: downloaded as a whole first
    unreadable: Unreadable = Unreadable.skip  # files and rows that cannot be read
    tokenizer: str = "bytes"  # or the path of a Hugging Face tokenizer.json, a .tiktoken or a SentencePiece .model
    packing: Packing = Packing.best_fit  # which pieces of documents share a row
    cross_document: bool = False  # true: attention and labels go across the documents of a row
    long_documents: LongDocuments = LongDocuments.split  # those longer than seq_len
    overlap: int = 0  # tokens that a split document's next part begins with again, as context alone
    shortest: int = 0  # tokens; shorter documents are left out
    held_out: float = 0.0  # of the tokens, in whole documents, which are never trained on
    needles: float = 0.0  # of the rows, that are a synthetic retrieval task; 1: all
    workers: int = 0  # processes that tokenise; 0: one on each core
    cache: str | None = None  # folder for tokenised text; null: ringspan in the user's cache folder

    def __post_init__(self) -> None:
        for name in ("overlap", "shortest", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name}={getattr(self, name)}: must be 0 or more")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"data.held_out={self.held_out}: must be from 0 to below 1")
        if not 0 <= self.needles <= 1:
            raise ValueError(f"data.needles={self.needles}: must be from 0 to 1")
        if self.mixture and self.path is not None:
            raise ValueError(f"data.path={self.path!r}: give it or data.mixture, not both")
        if bad := next((name for name, share in self.mixture.items() if not share > 0), None):
            raise ValueError(f"data.mixture: the share of {bad!r} is {self.mixture[bad]}; it must be above 0")
        if self.overlap and self.packing is Packing.concatenate:
            raise ValueError(f"data.overlap={self.overlap}: with data.packing=concatenate rows are cut anywhere; use 0")
        if self.overlap and self.long_documents is LongDocuments.drop:
            raise ValueError(f"data.overlap={self.overlap}: with data.long_documents=drop nothing is split; use 0")

    def sources(self) -> list["DataConfig"]:
        """One for each source."""
        return [replace(self, path=path, mixture={}) for path in self.mixture] if self.mixture else [self]


def check(config: DataConfig) -> None:
    """Find mistakes before anything heavy is built. Raises ValueError with the field, its value and a way out.

    Reads a MiB of text at most, or the beginnings of a folder's files up to the first that is text; of the hub a row.
    """
    for one in config.sources():
        if prepared_folder(one):
            continue
        source = find_source(one.path, one.streaming)
        folder = text_folder(one, source)
        if is_corpus(folder):
            continue
        source.check()
        load_tokenizer(one.tokenizer)
        _check_cache(one, source, folder.parent)


def prepare(config: DataConfig, told: Told = lambda shard: None) -> list[Path]:
    """Tokenise each source unless that is done, and return the folders to open with `Corpus`.

    Several processes may prepare at once: one does and the others wait. One that is killed leaves whole shards, which
    the next one takes up. The cache may be deleted whenever no run starts. Raises ValueError as `check` does, and for
    shards whose hash is not the one in their manifest.
    """
    return [_prepare(one, told) for one in config.sources()]


def _prepare(config: DataConfig, told: Told) -> Path:
    if folder := prepared_folder(config):
        verify(folder)
        return folder
    source = find_source(config.path, config.streaming)
    folder = text_folder(config, source)
    if is_corpus(folder):
        verify(folder)
        return folder
    source.check()
    _check_cache(config, source, folder.parent)
    try:
        write_corpus(folder, config, source, told)
    except OSError as error:  # a full disk, say; errors of reading are ValueErrors by now
        raise ValueError(f"{_setting(config)} cannot be written: {error.strerror}; give another folder") from error
    return folder


def prepared_folder(config: DataConfig) -> Path | None:
    """The folder of data.path, if that is what `launch/prepare.py` wrote. Raises ValueError for another tokenizer."""
    folder = Path(os.path.expanduser(config.path or ""))
    if config.path is None or not is_corpus(folder):
        return None
    made_by = read_manifest(folder)["tokenizer"]
    if config.tokenizer != "bytes" and tokenizer_fingerprint(config.tokenizer) != made_by:
        raise ValueError(
            f"data.tokenizer={config.tokenizer!r} is not the one that data.path={config.path!r} was prepared with; "
            "leave it out"
        )
    return folder


def write_corpus(folder: Path, config: DataConfig, source: Source, told: Told = lambda shard: None) -> None:
    """Prepare a source as `folder`, which appears complete or not at all. Raises ValueError and OSError."""
    partial_folder, tokenizer = folder.with_name(f"{folder.name}.partial"), load_tokenizer(config.tokenizer)
    with _locked(partial_folder):
        if is_corpus(folder):  # another process has done it, while this one waited
            shutil.rmtree(partial_folder)
            return
        before = source.fingerprint()
        _require_same_work(partial_folder, key_of(config, source))
        _write(partial_folder, config, source, tokenizer, told)
        if source.fingerprint() != before:
            shutil.rmtree(partial_folder)
            raise ValueError(f"{source.setting}: files changed while they were read; start again")
        partial_folder.rename(folder)


def _write(folder: Path, config: DataConfig, source: Source, tokenizer: Tokenizer, told: Told) -> None:
    skipped = Skipped(source.setting, config.unreadable is Unreadable.refuse)
    segments = source.segments(Columns(config.column, config.mask_column), skipped)
    workers = 1 if config.tokenizer == "bytes" else config.workers or len(os.sched_getaffinity(0))  # bytes cost nothing
    shards = write_shards(folder, segments, partial(load_tokenizer, config.tokenizer), workers=workers, told=told)
    if not shards:
        shutil.rmtree(folder)
        reason = f"; left out: {skipped.first} (and {skipped.count - 1} more)" if skipped.count else ""
        raise ValueError(f"{source.setting} is empty: there is no text in it{reason}")
    write_manifest(
        folder,
        shards,
        token_dtype(tokenizer.vocab_size),
        tokenizer.vocab_size,
        name=f"{source.name} ({Path(config.tokenizer).name})",
        tokenizer=tokenizer_fingerprint(config.tokenizer),
        end_of_document=tokenizer.end_of_document,
        skipped=skipped.names,
        n_skipped=skipped.count,
    )
    for record in folder.glob("[0-9]*.json"):
        record.unlink()  # the manifest has them all


def _require_same_work(folder: Path, key: str) -> None:
    """What another source or tokenizer left in the folder goes."""
    marker = folder / "source"
    if not marker.exists() or marker.read_text(encoding="utf-8") != key:
        for path in folder.iterdir():
            path.unlink()
        marker.write_text(key, encoding="utf-8")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make a folder and hold it for this process; whoever else wants it waits. Killed, a process holds it no longer."""
    while True:
        folder.mkdir(exist_ok=True)
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # the one that held it has renamed or deleted it since
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_still(descriptor, folder):
                yield
                return
        finally:  # else the next turn makes it anew
            os.close(descriptor)


def _is_still(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(folder))
    except FileNotFoundError:
        return False


def text_folder(config: DataConfig, source: Source) -> Path:
    """Where the corpus is or will be: its name is a hash of all that decides what is in it."""
    return cache_folder(config.cache) / hashlib.sha256(key_of(config, source).encode()).hexdigest()[:32]


def key_of(config: DataConfig, source: Source) -> str:
    columns = [config.column, config.mask_column]
    tokenizer = tokenizer_fingerprint(config.tokenizer)
    return json.dumps([FORMAT, source.name, source.fingerprint(), columns, config.unreadable.value, tokenizer])


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
