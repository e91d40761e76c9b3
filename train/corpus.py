"""A corpus is three files in a folder: tokens of all documents end to end, where each ends, figures about them."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ringspan.train.tokenizer import Tokenizer

FORMAT = 1  # raised when the same text would give other files: caches are named by it
BATCH_CHARACTERS = 1 << 22  # of text tokenised at once: enough for a tokenizer's threads, little memory
COUNTED_TOKENS = 1 << 20  # counted at once: numpy counts in int64, 8 bytes a token


class Corpus:
    """Memory-mapped tokens. Document d is tokens[starts[d]:starts[d + 1]], its last token is `end_of_document`.

    tokens: uint16 or uint32 (tokens,);  starts: int64 (documents + 1,)
    unigram_entropy: nats a token, of the distribution of all tokens, ends of documents with them: the loss of a model
        that knows how often each token is and nothing else
    digest: of the tokens: equal on two ranks, or before and after a resumption, if and only if the tokens are
    skipped: names of files of the folder that were left out, not being text
    """

    def __init__(self, folder: str | Path):
        """Opens what `prepare` wrote. Raises ValueError where that is missing or damaged."""
        folder = Path(folder)
        if not is_corpus(folder):
            raise ValueError(f"no corpus in {folder}: every host must see the folder of data.cache, which rank 0 fills")
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.name: str = meta["name"]
        self.vocab_size: int = meta["vocab_size"]
        self.end_of_document: int = meta["end_of_document"]
        self.unigram_entropy: float = meta["unigram_entropy"]
        self.digest: str = meta["digest"]
        self.skipped: list[str] = meta["skipped"]
        dtype = np.dtype(meta["dtype"])
        if (folder / "tokens.bin").stat().st_size != meta["tokens"] * dtype.itemsize:
            raise ValueError(f"the corpus in {folder} is damaged; delete that folder, and it is prepared anew")
        self.tokens = np.memmap(folder / "tokens.bin", dtype=dtype, mode="r")
        self.starts = np.concatenate([[0], np.load(folder / "ends.npy")])


def is_corpus(folder: Path) -> bool:
    return (folder / "meta.json").exists()


def write_corpus(
    folder: Path, texts: Iterable[str], tokenizer: Tokenizer, *, name: str, skipped: Iterable[str] = ()
) -> int:
    """Tokenise into an existing folder, meta.json last. Returns the number of tokens; empty texts are no documents."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    ends, counts, digest = [np.zeros(1, np.int64)], np.zeros(tokenizer.vocab_size, np.int64), hashlib.sha256()
    with open(folder / "tokens.bin", "wb") as file:
        for batch in _batches(texts):
            documents = [_ended(ids, tokenizer.end_of_document, dtype) for ids in tokenizer.encode(batch)]
            ends.append(ends[-1][-1] + np.cumsum([len(document) for document in documents]))
            for document in documents:
                file.write(document.data)
                digest.update(document.data)
                _count(document, counts)
    document_ends = np.concatenate(ends)[1:]
    np.save(folder / "ends.npy", document_ends)
    meta = {
        "name": name,
        "vocab_size": tokenizer.vocab_size,
        "end_of_document": tokenizer.end_of_document,
        "dtype": dtype.str,
        "tokens": int(counts.sum()),
        "documents": len(document_ends),
        "unigram_entropy": entropy(counts),
        "digest": digest.hexdigest(),
        "skipped": list(skipped),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    return int(counts.sum())


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists of BATCH_CHARACTERS or a little more."""
    batch, size = [], 0
    for text in texts:
        if text:
            batch.append(text)
            size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _ended(ids: np.ndarray, end_of_document: int, dtype: np.dtype) -> np.ndarray:
    document = np.empty(len(ids) + 1, dtype)
    document[:-1] = ids
    document[-1] = end_of_document
    return document


def _count(tokens: np.ndarray, counts: np.ndarray) -> None:
    """Add to counts (vocabulary,) how often each token is there; only up to the largest one, documents being short."""
    for start in range(0, len(tokens), COUNTED_TOKENS):
        found = np.bincount(tokens[start : start + COUNTED_TOKENS])
        counts[: len(found)] += found


def entropy(counts: np.ndarray) -> float:
    """Of the distribution that counts are in proportion to, in nats."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
