"""Rows of seq_len tokens out of a corpus's documents, and the order in which they are drawn.

A row is a list of pieces, a piece is a run of one document's tokens. Everything here is a pure function of the corpus,
seq_len, seed and the number of rows seen: that number is all there is to save and restore.
"""

from bisect import bisect_left, insort
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ringspan.train.corpus import Corpus

IGNORE = -100  # label of a position that predicts nothing


class Pieces(NamedTuple):
    """All rows' pieces, row after row; indices are into the corpus's tokens. All int64."""

    start: np.ndarray  # (pieces,) index of the first token
    length: np.ndarray  # (pieces,) tokens
    follow: np.ndarray  # (pieces,) index of what the last token predicts, -1 where it predicts nothing
    first: np.ndarray  # (rows + 1,) row r holds pieces first[r] to first[r + 1] - 1


class PackedRows:
    """Rows of seq_len positions that hold every token of the corpus exactly once; what is left of a row is padding.

    With documents kept apart (the default), each is whole in one row, or, where it is longer than seq_len, cut into
    pieces of seq_len and a rest; rows are filled best-fit decreasing. Every token is the label of the one before it,
    also where a document is cut; a document's end predicts nothing, and its first token is no label.
    With cross_document, documents follow each other in a shuffled order and are cut every seq_len; only the first token
    of all is no label.
    """

    def __init__(self, corpus: Corpus, seq_len: int, seed: int, cross_document: bool):
        """seq_len: tokens, of a whole row;  seed: of the order, not negative."""
        self._tokens = corpus.tokens
        self._cross_document = cross_document
        self.seq_len = seq_len
        starts = corpus.starts
        self._pieces = concatenate(starts, seq_len, seed) if cross_document else pack(starts, seq_len)
        # An epoch's order costs 15 ms a million rows; a call needs at most the present epoch's and the next one's.
        self._epoch = lru_cache(maxsize=2)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(len(self)))

    def __len__(self) -> int:
        return len(self._pieces.first) - 1

    def order(self, rows_seen: int, n: int) -> list[int]:
        """The next n rows after rows_seen: every row once an epoch, shuffled anew each, epochs end to end."""
        return [int(self._epoch(i // len(self))[i % len(self)]) for i in range(rows_seen, rows_seen + n)]

    def lengths(self, row: int) -> list[int]:
        """Lengths of the runs that attend to themselves alone; padding is the last one. Their sum is seq_len."""
        return np.diff(self._bounds(self._edges(row)), append=self.seq_len).tolist()

    def label_count(self, row: int) -> int:
        """How many of the row's labels are not IGNORE."""
        pieces = self._row(row)
        return int(pieces.length.sum() - (pieces.follow < 0).sum())

    def load(self, row: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens, labels, positions in the document) at some positions of a row, reading no more than these.

        positions: int64 (n,), in any order; -1 (a shard's padding) gives token 0, label IGNORE, position 0. The row's
        own padding gives the same tokens and labels. A document's piece counts its positions from 0, like a document.
        Returns three int64 (n,).
        """
        assert positions.size == 0 or -1 <= positions.min() <= positions.max() < self.seq_len, "not in the row"
        pieces, edges, bounds = self._row(row), self._edges(row), self._bounds(self._edges(row))
        real = (positions >= 0) & (positions < edges[-1])
        piece = np.searchsorted(edges, positions[real], side="right") - 1
        within = positions[real] - edges[piece]
        index = pieces.start[piece] + within
        follow = np.where(within < pieces.length[piece] - 1, index + 1, pieces.follow[piece])
        tokens = np.zeros(len(positions), np.int64)
        tokens[real] = self._tokens[index]
        labels = np.full(len(positions), IGNORE, np.int64)
        labels[real] = np.where(follow >= 0, self._tokens[follow].astype(np.int64), IGNORE)
        begin = bounds[np.searchsorted(bounds, positions, side="right") - 1]
        return tokens, labels, np.where(positions >= 0, positions - begin, 0)

    def _row(self, row: int) -> Pieces:
        here = slice(self._pieces.first[row], self._pieces.first[row + 1])
        return Pieces(
            self._pieces.start[here], self._pieces.length[here], self._pieces.follow[here], self._pieces.first
        )

    def _edges(self, row: int) -> np.ndarray:
        """Where each piece begins in the row, then where padding does."""
        return np.concatenate([[0], np.cumsum(self._row(row).length)])

    def _bounds(self, edges: np.ndarray) -> np.ndarray:
        """Where positions restart: not at pieces if they go on across documents; at padding if there is any."""
        bounds = edges[[0, -1]] if self._cross_document else edges
        return bounds[:-1] if bounds[-1] == self.seq_len else bounds


def pack(starts: np.ndarray, seq_len: int) -> Pieces:
    """Documents apart: cut only what is longer than a row. starts: int64 (documents + 1,), as in `Corpus`."""
    pieces_of = -(-np.diff(starts) // seq_len)
    document = np.repeat(np.arange(len(pieces_of)), pieces_of)
    number = np.arange(len(document)) - np.repeat(np.cumsum(pieces_of) - pieces_of, pieces_of)
    start = starts[document] + number * seq_len
    stop = np.minimum(start + seq_len, starts[document + 1])
    follow = np.where(stop < starts[document + 1], stop, -1)
    row = best_fit(stop - start, seq_len)
    order = np.argsort(row, kind="stable")
    first = np.concatenate([[0], np.cumsum(np.bincount(row))])
    return Pieces(start[order], (stop - start)[order], follow[order], first)


def concatenate(starts: np.ndarray, seq_len: int, seed: int) -> Pieces:
    """Documents end to end in an order drawn from seed, cut every seq_len. starts as in `Corpus`."""
    order = np.random.default_rng(seed).permutation(len(starts) - 1)
    ends = np.cumsum(np.diff(starts)[order])  # in the stream
    begins, cuts = ends - np.diff(starts)[order], np.arange(0, ends[-1], seq_len)
    edges = np.union1d(begins, cuts)  # a piece begins where a document or a row does
    document = np.searchsorted(ends, edges, side="right")
    start = starts[order[document]] + edges - begins[document]
    first = np.append(np.searchsorted(edges, cuts), len(edges))
    return Pieces(start, np.diff(edges, append=ends[-1]), np.append(start[1:], -1), first)


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
