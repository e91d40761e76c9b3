"""A synthetic retrieval task: needles, each a key and its value, are hidden in text, and asked for at its end.

Only a model that attends to where a needle is can answer; a guess is right once in VALUES. All ids are behind the
vocabulary, so that text never has them and any tokenizer will do.

    text text KEY=VALUE text text text ... text KEY'=VALUE' text   KEY' VALUE' KEY VALUE
                                                                   ^ the label here is VALUE'; only keys have labels

A row to train on holds documents like this of one size, drawn for each row: its whole length, a half of it, and so on
to SMALLEST tokens. What is learned in short ones, where a needle is one of a few tokens, is then asked for from ever
further away, and a row has hundreds of questions. A needle is one token for the same reason: with a token for the key
and one for the value, two layers of attention have to work together before either has a gradient, and models of a
million parameters stayed at guessing for as long as was tried.
"""

from typing import NamedTuple

import numpy as np

from ringspan.train.corpus import Joined
from ringspan.train.packing import IGNORE, parts

KEYS, VALUES = 8, 8
IDS = KEYS + VALUES + KEYS * VALUES  # keys that ask, values that answer, and needles, in this order
NEEDLES = 8  # of a document, one in each eighth of the text; fewer where it has not 4 tokens for each
SMALLEST = 8  # tokens: two needles, and a question for each
SHORTEST = 8 * NEEDLES  # tokens of a row: room for all needles, the questions and some text
DEPTHS = np.random.default_rng(0).permutation(NEEDLES)  # the needle that question k of an evaluation asks for


class Drawn(NamedTuple):
    """What a row has besides text, all int64 (n,)."""

    where: np.ndarray  # positions
    ids: np.ndarray  # what is there, from 0 on
    labels: np.ndarray  # ids, and IGNORE but at the keys that ask


class NeedleRows:
    """Endless rows, each drawn from (seed, row) alone.

    tokens: what the text is taken from;  first_id: of the IDS that needles have
    length: None to train on; else each row is one document of so many tokens, then padding, and question k asks for
        the needle of depth DEPTHS[k], 0 the first
    """

    def __init__(self, tokens: Joined, first_id: int, seq_len: int, seed: int, length: int | None = None):
        """Raises ValueError where a row is too short."""
        self.seq_len, self.length = seq_len, length
        if not SHORTEST <= (length or seq_len) <= seq_len:
            raise ValueError(
                f"seq_len={length or seq_len}: rows with needles (data.needles) have {SHORTEST} tokens or more"
            )
        self._tokens, self._first_id, self._seed = tokens, first_id, seed

    def __len__(self) -> int:
        return 1 << 40  # one never comes again

    def order(self, rows_seen: int, n: int) -> list[int]:
        return list(range(rows_seen, rows_seen + n))

    def lengths(self, row: int) -> list[int]:
        size, count, _ = self._begin(row)
        left = self.seq_len - size * count
        return [size] * count + [left] * (left > 0)

    def load(self, row: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        size, count, rng = self._begin(row)
        offset = int(rng.integers(max(1, len(self._tokens) - self.seq_len)))
        drawn, end = self._draw(rng, size, count), size * count
        tokens, labels = np.zeros(len(positions), np.int64), np.full(len(positions), IGNORE, np.int64)
        for at, begin, stop, piece in parts(positions, [0, end, self.seq_len]):
            if piece == 0:
                tokens[at : at + stop - begin] = self._text(offset + begin, stop - begin)
        order = np.argsort(drawn.where)
        nearest = order[np.minimum(np.searchsorted(drawn.where, positions, sorter=order), len(order) - 1)]
        hit = drawn.where[nearest] == positions
        tokens[hit] = self._first_id + drawn.ids[nearest[hit]]
        asks = hit & (drawn.labels[nearest] != IGNORE)
        labels[asks] = self._first_id + drawn.labels[nearest[asks]]
        within = np.where(positions < end, positions % size, positions - end)
        return tokens, labels, np.where(positions < 0, 0, within)

    def _begin(self, row: int) -> tuple[int, int, np.random.Generator]:
        """(tokens of a document, how many there are, what draws the rest of the row)."""
        rng = np.random.default_rng([self._seed, row])
        if self.length:
            return self.length, 1, rng
        size = self.seq_len >> int(rng.integers((self.seq_len // SMALLEST).bit_length()))
        return size, self.seq_len // size, rng

    def _draw(self, rng: np.random.Generator, size: int, count: int) -> Drawn:
        n = min(NEEDLES, size // 4)
        text = size - 2 * n  # tokens before the questions
        starts = size * np.arange(count)[:, None]
        edges = np.linspace(0, text, n + 1).astype(np.int64)
        places = starts + rng.integers(edges[:-1], edges[1:], size=(count, n))  # each in its eighth
        keys = rng.permuted(np.tile(np.arange(KEYS), (count, 1)), axis=1)[:, :n]
        values = rng.integers(VALUES, size=(count, n))
        needles = KEYS + VALUES + VALUES * keys + values
        order = np.tile(DEPTHS if self.length else np.arange(n), (count, 1))
        asked = order if self.length else rng.permuted(order, axis=1)
        keys, answers = np.take_along_axis(keys, asked, 1), KEYS + np.take_along_axis(values, asked, 1)
        questions, none = starts + text + 2 * np.arange(n), np.full_like(keys, IGNORE)
        each = [[places, questions, questions + 1], [needles, keys, answers], [none, answers, none]]
        return Drawn(*(np.concatenate([part.ravel() for part in parts_]) for parts_ in each))

    def _text(self, start: int, n: int) -> np.ndarray:
        """n tokens from start on; a text that is too short is repeated."""
        found = self._tokens[start : start + n]
        return found if len(found) == n else np.resize(self._tokens[:], start + n)[start:]
