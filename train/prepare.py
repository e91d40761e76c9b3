"""Prepare text once: train a tokenizer on it if asked for, and write shards that `data.path` may then name."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from ringspan.train.corpus import Corpus, is_corpus, verify
from ringspan.train.data import DataConfig, key_of, prepared_folder, write_corpus
from ringspan.train.documents import Files, Source, find_source
from ringspan.train.reading import LINES, TABLES, Columns, Segment, Skipped, Unreadable
from ringspan.train.tokenizer import load_tokenizer, train_bpe

SAMPLE_BYTES = 1 << 28  # of text that a BPE is trained on: more changes few merges, and takes memory
LEAST_BPE = 257  # every byte, and the end of a document

Read = Callable[[int], None]


@dataclass(kw_only=True)
class PrepareConfig:
    out: str = ""  # folder to write
    bpe: int = 0  # size of the vocabulary of a byte-level BPE to train on the text, as OUT.bpeSIZE.json; 0: none
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        if not self.out:
            raise ValueError("out is missing: give the folder to write, out=FOLDER")
        if self.bpe and self.bpe < LEAST_BPE:
            raise ValueError(f"bpe={self.bpe}: must be 0 or at least {LEAST_BPE}")
        if self.bpe and self.data.tokenizer != "bytes":
            raise ValueError(f"bpe={self.bpe}: data.tokenizer={self.data.tokenizer!r} is given; leave one of them out")
        if self.data.mixture:
            raise ValueError("data.mixture: prepare each source by itself, and mix the folders in training")


@dataclass(frozen=True)
class Watched:
    """A source that tells how many bytes of text have been read of it."""

    source: Source
    read: Read

    @property
    def setting(self) -> str:
        return self.source.setting

    @property
    def name(self) -> str:
        return self.source.name

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def check(self) -> None:
        self.source.check()

    def would_read(self, path: Path) -> bool:
        return self.source.would_read(path)

    def segments(self, columns: Columns, skipped: Skipped) -> Iterator[Segment]:
        for segment in self.source.segments(columns, skipped):
            self.read(size_of(segment))
            yield segment


def prepare_folder(config: PrepareConfig, bar: Callable[[str, int | None], Read]) -> Corpus:
    """Write config.out, or go on writing it. bar(what, total bytes of text or None) gives what is told of progress.

    Raises ValueError as `data.prepare` does, and where config.out holds something else.
    """
    out, data = Path(config.out), config.data
    if prepared_folder(data):
        raise ValueError(f"data.path={data.path!r} is prepared already")
    source = find_source(data.path, data.streaming)
    source.check()
    if source.would_read(out):
        raise ValueError(
            f"out={config.out!r} is inside {source.setting} and would be read as text; give another folder"
        )
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        if config.bpe:
            data = replace(data, tokenizer=str(_tokenizer(config, source, bar)))
        load_tokenizer(data.tokenizer)
        _require_ours(out, key_of(data, source))
        if not is_corpus(out):
            write_corpus(out, data, Watched(source, bar("tokens", text_bytes(source))))
    except OSError as error:
        raise ValueError(f"out={config.out!r} cannot be written: {error.strerror}; give another folder") from error
    verify(out)
    return Corpus(out)


def _tokenizer(config: PrepareConfig, source: Source, bar: Callable[[str, int | None], Read]) -> Path:
    """The file of a BPE that is trained now, or was before a kill."""
    file = Path(f"{config.out.rstrip('/')}.bpe{config.bpe}.json")
    if not file.exists():
        total = text_bytes(source)
        every = 1 if total is None else -(-total // SAMPLE_BYTES)
        read = bar("tokenizer", None if total is None else total // every)
        train_bpe(_sample(source, config.data, every, read), config.bpe, file)
    return file


def _sample(source: Source, data: DataConfig, every: int, read: Read) -> Iterator[str]:
    """Each so many segments of text, up to SAMPLE_BYTES."""
    left = SAMPLE_BYTES
    skipped = Skipped(source.setting, data.unreadable is Unreadable.refuse)
    for number, segment in enumerate(source.segments(Columns(data.column, data.mask_column), skipped)):
        if left <= 0:
            return
        if number % every == 0 and isinstance(segment.content, str):
            read(size_of(segment))
            left -= size_of(segment)
            yield segment.content


def _require_ours(out: Path, key: str) -> None:
    marker = out / "source"
    if out.exists() and not (is_corpus(out) and marker.exists() and marker.read_text(encoding="utf-8") == key):
        raise ValueError(f"out={str(out)!r} is there, and not this text prepared like this; delete it or give another")


def text_bytes(source: Source) -> int | None:
    """Of all text files; None where it is not known before it is read."""
    if not isinstance(source, Files) or any(file.endswith((*TABLES, *LINES)) for file in source.files()):
        return None
    return sum((source.root / file).stat().st_size for file in source.files())


def size_of(segment: Segment) -> int:
    return len(segment.content.encode()) if isinstance(segment.content, str) else segment.content.nbytes
