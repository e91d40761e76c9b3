"""What a run trains on and is measured on: the sources together, their rows mixed, documents held out."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ringspan.train.corpus import Corpus
from ringspan.train.data import DataConfig
from ringspan.train.needle import IDS, VALUES, NeedleRows
from ringspan.train.packing import PackedRows, Rows

HELD_OUT_NEAR = 0.95  # of the share that is asked for is near enough to stop looking for documents that fit


class Mixed:
    """Rows of several kinds, each kind in its own order, spread as evenly as their shares allow.

    How many of the first n rows are of which kind is a formula of n, so nothing but n has to be kept.
    """

    def __init__(self, kinds: Sequence[Rows], shares: Sequence[float]):
        """shares: above 0; their sum need not be 1."""
        self.kinds, self.seq_len = kinds, kinds[0].seq_len
        self.shares = [share / math.fsum(shares) for share in shares]

    def __len__(self) -> int:
        """Rows before one of some kind comes again."""
        return min(int(len(kind) / share) for kind, share in zip(self.kinds, self.shares, strict=True))

    def counts(self, n: int) -> list[int]:
        """How many of the first n rows are of each kind: the first kind's share of n, rounded, and so on with the rest.

        None of them goes down as n goes up.
        """
        found, share_left = [], 1.0
        for share in self.shares[:-1]:
            found.append(math.floor(n * min(1.0, share / share_left) + 0.5))
            n, share_left = n - found[-1], share_left - share
        return [*found, n]

    def order(self, rows_seen: int, n: int) -> list[int]:
        begin, stop = self.counts(rows_seen), self.counts(rows_seen + n)
        coming = [iter(kind.order(a, b - a)) for kind, a, b in zip(self.kinds, begin, stop, strict=True)]
        found = []
        for i in range(rows_seen, rows_seen + n):
            after = self.counts(i + 1)
            kind = next(k for k, (a, b) in enumerate(zip(begin, after, strict=True)) if b > a)
            found.append(next(coming[kind]) * len(self.kinds) + kind)
            begin = after
        return found

    def lengths(self, row: int) -> list[int]:
        return self.kinds[row % len(self.kinds)].lengths(row // len(self.kinds))

    def load(self, row: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.kinds[row % len(self.kinds)].load(row // len(self.kinds), positions)


class Text:
    """The prepared sources of a run."""

    def __init__(self, folders: Sequence[Path], config: DataConfig):
        """folders: what `prepare(config)` has returned. Raises ValueError where the sources do not go together."""
        self.config = config
        self.corpora = [Corpus(folder) for folder in folders]
        self.shares = list(config.mixture.values()) or [1.0]
        first = self.corpora[0]
        for other in self.corpora:
            if (other.vocab_size, other.end_of_document) != (first.vocab_size, first.end_of_document):
                raise ValueError(f"data.mixture: {first.name} and {other.name} are not of one tokenizer")
        self.vocab_size = first.vocab_size + (IDS if config.needles else 0)
        self.held = [hold_out(np.diff(corpus.starts), config.held_out) for corpus in self.corpora]

    @property
    def name(self) -> str:
        return " + ".join(corpus.name for corpus in self.corpora)

    @property
    def tokens(self) -> int:
        return sum(len(corpus.tokens) for corpus in self.corpora)

    @property
    def digest(self) -> str:
        """Of the tokens of all sources."""
        return "+".join(corpus.digest for corpus in self.corpora)

    @property
    def n_skipped(self) -> int:
        return sum(corpus.n_skipped for corpus in self.corpora)

    @property
    def unigram_entropy(self) -> float:
        """Nats a token; of a mixture the mean, which a model reaches that also knows which source it reads.

        Of needles alone it is that of their answers, which are drawn from VALUES.
        """
        if self.config.needles == 1:
            return math.log(VALUES)
        values = [corpus.unigram_entropy for corpus in self.corpora]
        return float(np.average(values, weights=self.shares))

    def rows(self, seq_len: int, seed: int) -> Rows:
        """To train on. Raises ValueError where no document is left."""
        share = self.config.needles
        if share == 1:
            return self.needles(seq_len, seed)
        sources = self._packed(seq_len, seed, held_out=False)
        rows = sources[0] if len(sources) == 1 else Mixed(sources, self.shares)
        return Mixed([rows, self.needles(seq_len, seed)], [1 - share, share]) if share else rows

    def held_out(self, seq_len: int) -> Rows | None:
        """The same rows whatever the seed; None where nothing is held out."""
        if not self.config.held_out:
            return None
        sources = self._packed(seq_len, 0, held_out=True)
        return sources[0] if len(sources) == 1 else Mixed(sources, self.shares)

    def needles(self, seq_len: int, seed: int, length: int | None = None) -> NeedleRows:
        first = self.corpora[0]
        return NeedleRows(first.tokens, first.vocab_size, seq_len, seed, length)

    def tokens_per_byte(self) -> float | None:
        """Of what is held out; None where some of it came as token ids, and nobody knows its bytes."""
        held = [corpus.bytes[mask] for corpus, mask in zip(self.corpora, self.held, strict=True)]
        if not all(count.all() for count in held):
            return None
        tokens = [int(np.diff(c.starts)[mask].sum()) for c, mask in zip(self.corpora, self.held, strict=True)]
        bytes_of_a_token = [count.sum() / n for count, n in zip(held, tokens, strict=True)]
        return 1 / float(np.average(bytes_of_a_token, weights=self.shares))

    def _packed(self, seq_len: int, seed: int, held_out: bool) -> list[PackedRows]:
        c = self.config
        return [
            PackedRows(
                corpus,
                seq_len,
                seed,
                c.cross_document,
                packing=c.packing,
                long_documents=c.long_documents,
                overlap=c.overlap,
                shortest=c.shortest,
                documents=np.flatnonzero(held == held_out),
            )
            for corpus, held in zip(self.corpora, self.held, strict=True)
        ]


def packed_in(rows: Rows) -> Iterator[PackedRows]:
    """Those rows of a mixture that are made of documents."""
    if isinstance(rows, PackedRows):
        yield rows
    for kind in rows.kinds if isinstance(rows, Mixed) else ():
        yield from packed_in(kind)


def packing_facts(rows: Rows) -> dict[str, float]:
    """What packing wastes: shares of all positions, and counts; to be logged once."""
    if not list(packed_in(rows)):
        return {}  # needles alone
    all_waste = [one.waste for one in packed_in(rows)]
    positions = [len(one) * one.seq_len for one in packed_in(rows)]
    return {
        "padding": round(float(np.average([one.padding for one in all_waste], weights=positions)), 4),
        "repeated_context": round(float(np.average([one.context for one in all_waste], weights=positions)), 4),
        "cuts": sum(one.cuts for one in all_waste),
        "dropped_documents": sum(one.dropped_documents for one in all_waste),
        "dropped_tokens": sum(one.dropped_tokens for one in all_waste),
    }


def hold_out(lengths: np.ndarray, share: float) -> np.ndarray:
    """Which documents are held out, bool (documents,): drawn one after the other while they fit into `share` of all.

    It depends on nothing else, so that a run with another seed or seq_len is measured on the same documents. If the
    share is above 0 there is one at least. Raises ValueError where that leaves nothing.
    """
    held = np.zeros(len(lengths), bool)
    if share == 0:
        return held
    if len(lengths) < 2:
        raise ValueError(f"data.held_out={share}: there is but one document; give text of several, or 0")
    room = share * float(lengths.sum())
    enough = room * (1 - HELD_OUT_NEAR)
    for document in np.random.default_rng(0).permutation(len(lengths)).tolist():
        if lengths[document] <= room:
            held[document] = True
            room -= float(lengths[document])
        if room <= enough:
            break
    if not held.any():
        held[np.argmin(lengths)] = True
    return held
