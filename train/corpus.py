"""A corpus is a folder of shards: tokens of all documents end to end, where each ends; and a manifest of them."""

import hashlib
import json
import secrets
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 2  # raised when the same text would give other files: caches are named by it
COUNTED_TOKENS = 1 << 20  # counted at once: numpy counts in int64, 8 bytes a token
HASHED_BYTES = 1 << 22  # at once


@dataclass(frozen=True)
class Shard:
    """NAME.tokens (dtype of the manifest), NAME.documents int64 (n, 2), NAME.mask uint8 where some token is no label.

    A row of .documents is for a document that ends here: behind which of the shard's tokens, and its bytes of text.
    """

    name: str  # 00000, 00001, ...
    tokens: int
    documents: int
    segments: int  # of the source, whose tokens these are
    open_bytes: int  # of the document that goes on in the next shard
    masked: bool
    sha256: str  # of the files, one behind the other

    def files(self, folder: Path) -> list[Path]:
        kinds = ("tokens", "documents", *(["mask"] if self.masked else []))
        return [folder / f"{self.name}.{kind}" for kind in kinds]

    def is_whole(self, folder: Path) -> bool:
        """Whether its files are there and have its hash."""
        try:
            return sha256_of(self.files(folder)) == self.sha256
        except FileNotFoundError:
            return False


class Joined:
    """Arrays end to end, read by slices of the whole; of one dtype."""

    def __init__(self, parts: Sequence[np.ndarray]):
        self._parts = [np.asarray(part) for part in parts]  # slicing a memmap as such costs ten times more
        self._stops = np.cumsum([len(part) for part in parts]).tolist()
        self.dtype = self._parts[0].dtype

    def __len__(self) -> int:
        return self._stops[-1]

    def __getitem__(self, at: slice) -> np.ndarray:
        start, stop, step = at.indices(len(self))
        assert step == 1, at
        number = min(bisect_right(self._stops, start), len(self._parts) - 1)
        found = []
        while True:
            begin = self._stops[number - 1] if number else 0
            found.append(self._parts[number][start - begin : max(stop, start) - begin])
            if stop <= self._stops[number]:
                return found[0] if len(found) == 1 else np.concatenate(found)
            start, number = self._stops[number], number + 1

    def tolist(self) -> list[int]:
        return self[:].tolist()


class Corpus:
    """Memory-mapped tokens. Document d is tokens[starts[d]:starts[d + 1]], its last token is `end_of_document`.

    tokens: uint16 or uint32 (tokens,);  starts: int64 (documents + 1,)
    labelled: uint8 (tokens,), 0 where a token is no label; None where all are
    bytes: int64 (documents,), of a document's text in UTF-8; 0 where it was given as token ids
    unigram_entropy: nats a token, of the distribution of all tokens, ends of documents with them: the loss of a model
        that knows how often each token is and nothing else
    digest: equal on two ranks, or before and after a resumption, if and only if the tokens are
    skipped: names of files and rows that were left out, the first thousand;  n_skipped: how many were
    """

    def __init__(self, folder: str | Path):
        """Opens what `prepare` wrote. Raises ValueError where that is missing or damaged."""
        folder = Path(folder)
        if not is_corpus(folder):
            raise ValueError(f"no corpus in {folder}: every host must see the folder of data.cache, which rank 0 fills")
        meta = read_manifest(folder)
        self.name: str = meta["name"]
        self.vocab_size: int = meta["vocab_size"]
        self.end_of_document: int = meta["end_of_document"]
        self.unigram_entropy: float = meta["unigram_entropy"]
        self.digest: str = meta["digest"]
        self.skipped: list[str] = meta["skipped"]
        self.n_skipped: int = meta["n_skipped"]
        shards, dtype = [Shard(**shard) for shard in meta["shards"]], np.dtype(meta["dtype"])
        for shard in shards:
            check_size(folder, shard, dtype)
        self.tokens = Joined([_mapped(folder / f"{shard.name}.tokens", dtype) for shard in shards])
        self.labelled = Joined([_mask(folder, shard) for shard in shards]) if any(s.masked for s in shards) else None
        documents = np.concatenate([_documents(folder, shard) for shard in shards])
        offsets = np.repeat(np.cumsum([0, *(s.tokens for s in shards[:-1])]), [s.documents for s in shards])
        self.starts = np.concatenate([[0], documents[:, 0] + offsets])
        self.bytes = documents[:, 1]


def is_corpus(folder: Path) -> bool:
    return (folder / "manifest.json").exists()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises ValueError where it is of another format than this version's."""
    try:
        meta = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        found = meta["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'manifest.json'} is damaged: {error}; prepare the text again") from error
    if found != FORMAT:
        raise ValueError(f"the corpus in {folder} has format {found}, not {FORMAT}: prepare the text again")
    return meta


def write_manifest(folder: Path, shards: Sequence[Shard], dtype: np.dtype, vocab_size: int, **facts: Any) -> None:
    """Last of all: with it the folder is a corpus."""
    counts = np.zeros(vocab_size, np.int64)
    for shard in shards:
        _count(_mapped(folder / f"{shard.name}.tokens", dtype), counts)
    meta = {
        "format": FORMAT,
        **facts,
        "vocab_size": vocab_size,
        "dtype": dtype.str,
        "tokens": sum(shard.tokens for shard in shards),
        "documents": sum(shard.documents for shard in shards),
        "unigram_entropy": entropy(counts),
        "digest": hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest(),
        "shards": [asdict(shard) for shard in shards],
    }
    (folder / "manifest.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def check_size(folder: Path, shard: Shard, dtype: np.dtype) -> None:
    """Raises ValueError where a file of the shard is missing or of another size; costs a microsecond."""
    sizes = [shard.tokens * dtype.itemsize, shard.documents * 16, shard.tokens]
    for file, size in zip(shard.files(folder), sizes, strict=False):
        found = file.stat().st_size if file.exists() else None
        if found != size:
            raise damaged(file, "is missing" if found is None else f"has {found:,} bytes instead of {size:,}")


def verify(folder: Path) -> None:
    """Compare the hash of every shard. Raises ValueError, naming the first that differs.

    A shard whose files have the size and times that they had when their hash was right is not read again: hashing
    100 GB takes a minute or more. For the same reason one rank alone does it.
    """
    seen_file, seen = folder / "verified.json", {}
    with suppress(OSError, ValueError):  # none is there yet, or a crash has left half of one: then all is read again
        seen = json.loads(seen_file.read_text(encoding="utf-8"))
    now = {}
    for shard in (Shard(**shard) for shard in read_manifest(folder)["shards"]):
        files = shard.files(folder)
        if missing := next((file for file in files if not file.exists()), None):
            raise damaged(missing, "is missing")
        now[shard.name] = [shard.sha256, *([s.st_size, s.st_mtime_ns, s.st_ctime_ns] for s in map(Path.stat, files))]
        if seen.get(shard.name) != now[shard.name] and not shard.is_whole(folder):
            raise damaged(files[0], "does not have the hash that is in the manifest")
    if now != seen:
        _write_if_allowed(seen_file, json.dumps(now))


def _write_if_allowed(file: Path, text: str) -> None:
    half = file.with_name(f"{file.name}.{secrets.token_hex(8)}")  # several may write at once, and be killed
    try:
        half.write_text(text, encoding="utf-8")
        half.rename(file)
    except OSError:  # a full disk, or a folder that only others may write: then it is hashed each time
        with suppress(OSError):
            half.unlink()


def damaged(file: Path, what: str) -> ValueError:
    return ValueError(f"{file} {what}: the corpus is damaged; delete {file.parent}, and prepare it again")


def sha256_of(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while part := file.read(HASHED_BYTES):
                digest.update(part)
    return digest.hexdigest()


def entropy(counts: np.ndarray) -> float:
    """Of the distribution that counts are in proportion to, in nats."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def _count(tokens: np.ndarray, counts: np.ndarray) -> None:
    """Add to counts (vocabulary,) how often each token is there."""
    for start in range(0, len(tokens), COUNTED_TOKENS):
        found = np.bincount(tokens[start : start + COUNTED_TOKENS])
        counts[: len(found)] += found


def _mapped(file: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.empty(0, dtype)


def _mask(folder: Path, shard: Shard) -> np.ndarray:
    if shard.masked:
        return _mapped(folder / f"{shard.name}.mask", np.dtype(np.uint8))
    return np.broadcast_to(np.uint8(1), shard.tokens)  # takes no memory


def _documents(folder: Path, shard: Shard) -> np.ndarray:
    return np.fromfile(folder / f"{shard.name}.documents", np.dtype("<i8")).reshape(-1, 2)
