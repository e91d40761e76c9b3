"""Rows of seq_len tokens out of a corpus's documents, and the order in which they are drawn.

A row is a list of pieces, a piece is a run of one document's tokens. Everything here is a pure function of the corpus,
seq_len, seed and the number of rows seen: that number is all there is to save and restore.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from ringspan.train.corpus import Corpus

IGNORE = -100  # label of a position that predicts nothing


class Packing(str, Enum):
    """Which pieces of documents share a row."""

    best_fit = "best_fit"  # documents whole where they fit, rows filled best-fit decreasing
    concatenate = "concatenate"  # documents end to end in an order drawn from the seed, cut every seq_len
    whole = "whole"  # one document, or one part of a long one, a row; the rest of the row is padding


class LongDocuments(Enum):
    """What becomes of documents longer than seq_len."""

    split = "split"
    drop = "drop"


class Rows(Protocol):
    """Rows to train on, numbered; which comes when; and what is in them."""

    seq_len: int

    def __len__(self) -> int: ...

    def order(self, rows_seen: int, n: int) -> list[int]:
        """The next n rows after rows_seen."""
        ...

    def lengths(self, row: int) -> list[int]:
        """Lengths of the runs that attend to themselves alone; padding is the last one. Their sum is seq_len."""
        ...

    def load(self, row: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens, labels, positions in the document) at some positions of a row, reading no more than these.

        positions: int64 (n,), in any order; -1 (a shard's padding) gives token 0, label IGNORE, position 0. The row's
        own padding gives the same tokens and labels. A document's piece counts its positions from 0, like a document.
        Returns three int64 (n,).
        """
        ...


class Pieces(NamedTuple):
    """All rows' pieces, row after row; indices are into the corpus's tokens. All int64."""

    start: np.ndarray  # (pieces,) index of the first token
    length: np.ndarray  # (pieces,) tokens
    follow: np.ndarray  # (pieces,) index of what the last token predicts, -1 where it predicts nothing
    context: np.ndarray  # (pieces,) tokens at the front that predict what the document's part before has predicted
    first: np.ndarray  # (rows + 1,) row r holds pieces first[r] to first[r + 1] - 1


@dataclass(frozen=True)
class Waste:
    """What does not become a label, and what of the rows is no token; logged once."""

    padding: float  # of all positions
    context: float  # of all positions: tokens that are there a second time
    cuts: int  # of documents, one for each part but the first
    dropped_documents: int  # too long, or too short
    dropped_tokens: int


class PackedRows:
    """Rows of seq_len positions that hold every token of their documents once; what is left of a row is padding.

    Every token is the label of the one before it, once, also where a document is cut; its end predicts nothing, and
    its first token is no label. With cross_document, attention and labels go on from one document of a row to the
    next, and with `concatenate` also from row to row: only the first token of all is then no label. A part of a split
    document begins with the last `overlap` tokens of the part before again, whose labels are IGNORE.
    """

    def __init__(
        self,
        corpus: Corpus,
        seq_len: int,
        seed: int,
        cross_document: bool = False,
        *,
        packing: Packing = Packing.best_fit,
        long_documents: LongDocuments = LongDocuments.split,
        overlap: int = 0,
        shortest: int = 0,
        documents: np.ndarray | None = None,
    ):
        """seq_len: tokens, of a whole row;  seed: of the order, not negative;  documents: those to take, None all.

        Raises ValueError where no document is left, or overlap is not below seq_len.
        """
        if overlap >= seq_len:
            raise ValueError(f"data.overlap={overlap}: must be below seq_len={seq_len}")
        self._tokens, self._labelled = corpus.tokens, corpus.labelled
        self._cross_document = cross_document
        self.seq_len = seq_len
        start, stop = corpus.starts[:-1], corpus.starts[1:]
        if documents is not None:
            start, stop = start[documents], stop[documents]
        length = stop - start
        kept = (length >= shortest) & ((length <= seq_len) | (long_documents is LongDocuments.split))
        if not kept.any():
            raise ValueError(
                f"no document is left: of {len(kept):,}, {int((length < shortest).sum()):,} are shorter than "
                f"data.shortest={shortest} and {int((length > seq_len).sum()):,} longer than seq_len={seq_len} "
                f"(data.long_documents={long_documents.value})"
            )
        start, stop = start[kept], stop[kept]
        if packing is Packing.concatenate:
            self._pieces = concatenate(start, stop, seq_len, seed, cross_document)
        else:
            self._pieces = pack(start, stop, seq_len, overlap, packing is Packing.best_fit, cross_document)
        positions = len(self) * seq_len
        self.waste = Waste(
            padding=1 - float(self._pieces.length.sum()) / positions,
            context=float(self._pieces.context.sum()) / positions,
            cuts=len(self._pieces.start) - len(start),
            dropped_documents=int((~kept).sum()),
            dropped_tokens=int(length[~kept].sum()),
        )
        # An epoch's order costs 15 ms a million rows; a call needs at most the present epoch's and the next one's.
        self._epoch = lru_cache(maxsize=2)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(len(self)))

    def __len__(self) -> int:
        return len(self._pieces.first) - 1

    def order(self, rows_seen: int, n: int) -> list[int]:
        """The next n rows after rows_seen: every row once an epoch, shuffled anew each, epochs end to end."""
        return [int(self._epoch(i // len(self))[i % len(self)]) for i in range(rows_seen, rows_seen + n)]

    def lengths(self, row: int) -> list[int]:
        return np.diff(self._bounds(self._edges(row)), append=self.seq_len).tolist()

    def load(self, row: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        assert positions.size == 0 or -1 <= positions.min() <= positions.max() < self.seq_len, "not in the row"
        pieces, edges = self._row(row), self._edges(row).tolist()
        tokens, within = np.zeros(len(positions), np.int64), np.zeros(len(positions), np.int64)
        labels = np.full(len(positions), IGNORE, np.int64)
        for at, begin, stop, piece in parts(positions, [*edges, self.seq_len]):
            here = slice(at, at + stop - begin)
            is_padding = piece == len(pieces.start)
            base = 0 if self._cross_document and not is_padding else edges[piece]
            within[here] = np.arange(begin - base, stop - base)
            if not is_padding:
                source = int(pieces.start[piece]) - edges[piece]  # of position 0, were the piece that long
                tokens[here] = self._tokens[source + begin : source + stop]
                self._label(labels[here], pieces, piece, begin - edges[piece])
        return tokens, labels, within

    def _label(self, labels: np.ndarray, pieces: Pieces, piece: int, offset: int) -> None:
        """Fill in the labels of some tokens of a piece, from its `offset` on."""
        first = int(pieces.start[piece]) + offset + 1  # what the first one predicts
        inside = min(len(labels), int(pieces.length[piece]) - offset - 1)  # those that predict tokens of the piece
        labels[:inside] = self._targets(first, first + inside)
        follow = int(pieces.follow[piece])
        if inside < len(labels) and follow >= 0:
            labels[inside:] = self._targets(follow, follow + 1)
        labels[: max(0, int(pieces.context[piece]) - offset)] = IGNORE

    def _targets(self, start: int, stop: int) -> np.ndarray:
        found = self._tokens[start:stop].astype(np.int64)
        if self._labelled is not None:
            found[self._labelled[start:stop] == 0] = IGNORE
        return found

    def _row(self, row: int) -> Pieces:
        here = slice(self._pieces.first[row], self._pieces.first[row + 1])
        p = self._pieces
        return Pieces(p.start[here], p.length[here], p.follow[here], p.context[here], p.first)

    def _edges(self, row: int) -> np.ndarray:
        """Where each piece begins in the row, then where padding does."""
        return np.concatenate([[0], np.cumsum(self._row(row).length)])

    def _bounds(self, edges: np.ndarray) -> np.ndarray:
        """Where positions restart: not at pieces if they go on across documents; at padding if there is any."""
        bounds = edges[[0, -1]] if self._cross_document else edges
        return bounds[:-1] if bounds[-1] == self.seq_len else bounds


def parts(positions: np.ndarray, edges: list[int]) -> Iterator[tuple[int, int, int, int]]:
    """(index, first position, behind the last one, piece) of each run of consecutive positions inside one piece.

    Piece p has positions edges[p] to edges[p + 1] - 1. Positions of -1 are in none.
    """
    broken = (np.diff(positions) != 1) | (positions[1:] == 0)
    starts = np.concatenate([[0], np.flatnonzero(broken) + 1]) if len(positions) else np.empty(0, np.int64)
    for at, n in zip(starts.tolist(), np.diff(starts, append=len(positions)).tolist(), strict=True):
        begin = int(positions[at])
        end = begin + n
        while 0 <= begin < end:
            piece = bisect_right(edges, begin) - 1
            stop = min(end, edges[piece + 1])
            yield at + n - (end - begin), begin, stop, piece
            begin = stop


def pack(start: np.ndarray, stop: np.ndarray, seq_len: int, overlap: int, fill: bool, cross_document: bool) -> Pieces:
    """Cut only what is longer than a row. Document d is tokens start[d] to stop[d] - 1; fill: rows take several."""
    stride = seq_len - overlap
    pieces_of = 1 - np.minimum(0, seq_len - (stop - start)) // stride
    document = np.repeat(np.arange(len(start)), pieces_of)
    number = np.arange(len(document)) - np.repeat(np.cumsum(pieces_of) - pieces_of, pieces_of)
    begin = start[document] + number * stride
    end = np.minimum(begin + seq_len, stop[document])
    row = best_fit(end - begin, seq_len) if fill else np.arange(len(begin))
    order = np.argsort(row, kind="stable")
    row, number, begin, end, document = (values[order] for values in (row, number, begin, end, document))
    follow = np.where(end < stop[document], end, -1)
    if cross_document:  # a part that is not the first has been predicted by the part before
        goes_on = np.append((row[1:] == row[:-1]) & (number[1:] == 0), False)
        follow = np.where(goes_on, np.append(begin[1:], -1), follow)
    first = np.concatenate([[0], np.cumsum(np.bincount(row))])
    return Pieces(begin, end - begin, follow, np.where(number > 0, overlap, 0), first)


def concatenate(start: np.ndarray, stop: np.ndarray, seq_len: int, seed: int, cross_document: bool) -> Pieces:
    """Documents end to end in an order drawn from seed, cut every seq_len. start and stop as for `pack`."""
    order = np.random.default_rng(seed).permutation(len(start))
    start, length = start[order], (stop - start)[order]
    ends = np.cumsum(length)  # in the stream
    begins, cuts = ends - length, np.arange(0, ends[-1], seq_len)
    edges = np.union1d(begins, cuts)  # a piece begins where a document or a row does
    document = np.searchsorted(ends, edges, side="right")
    begin = start[document] + edges - begins[document]
    follow = np.append(begin[1:], -1)
    if not cross_document:
        follow[:-1][document[1:] != document[:-1]] = -1
    first = np.append(np.searchsorted(edges, cuts), len(edges))
    return Pieces(begin, np.diff(edges, append=ends[-1]), follow, np.zeros_like(begin), first)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing: the row of each piece, longest piece first, each into the fullest row that has room for it.

    lengths: int64 (pieces,), 1 to capacity. Returns int64 (pieces,); rows are numbered from 0 with none left out.
    Pieces of equal length go together, so that the work grows with the different lengths and rooms, not with pieces
    times rows: a million documents of text take about a second.
    """
    rooms, rows = _Rooms(), 0
    filled: list[int] = []  # rows of the pieces so far, longest piece first
    values, counts = np.unique(lengths, return_counts=True)
    for length, pieces in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        count = pieces
        while count:
            room = rooms.smallest(length) or capacity
            # The row that fits best still does after taking one: as many go in as have room.
            each = min(room // length, count)
            taken = rooms.take(room, count // each) or list(range(rows, rows + count // each))
            rows = max(rows, taken[-1] + 1)
            filled.extend(row for row in taken for _ in range(each))
            count -= each * len(taken)
            rooms.put(room - each * length, taken)
    row_of = np.empty(len(lengths), np.int64)
    row_of[np.argsort(-lengths, kind="stable")] = filled
    return row_of


class _Rooms:
    """Rows that have room left, by how much. Rows without any piece and full ones are not in it."""

    def __init__(self) -> None:
        self._rows: dict[int, list[int]] = {}
        self._rooms: list[int] = []  # the keys of _rows, ascending

    def smallest(self, length: int) -> int:
        """The least room that is not under length, 0 if there is none."""
        at = bisect_left(self._rooms, length)
        return self._rooms[at] if at < len(self._rooms) else 0

    def take(self, room: int, n: int) -> list[int]:
        """Remove and return up to n rows with this room."""
        rows = self._rows.get(room, [])
        taken = rows[-n:]
        del rows[-n:]
        if taken and not rows:
            del self._rows[room], self._rooms[bisect_left(self._rooms, room)]
        return taken

    def put(self, room: int, rows: list[int]) -> None:
        if room and room not in self._rows:
            insort(self._rooms, room)
        if room:
            self._rows.setdefault(room, []).extend(rows)
