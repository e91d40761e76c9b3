"""A synthetic retrieval task: needles, each a key and its value, are hidden in text, and asked for at its end.

Only a model that attends to where a needle is can answer; a guess is right once in VALUES. All ids are behind the
vocabulary, so that text never has them and any tokenizer will do. A model that was not trained with these ids is asked
in plain words, with its own tokenizer's tokens: see `SentenceRows`.

    text text KEY=VALUE text text text ... text KEY'=VALUE' text   KEY' VALUE' KEY VALUE
                                                                   ^ the label here is VALUE'; only keys have labels

A row to train on holds documents like this of one size, drawn for each row: its whole length, a half of it, and so on
to SMALLEST tokens. What is learned in short ones, where a needle is one of a few tokens, is then asked for from ever
further away, and a row has hundreds of questions. A needle is one token for the same reason: with a token for the key
and one for the value, two layers of attention have to work together before either has a gradient, and models of a
million parameters stayed at guessing for as long as was tried.
"""

from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from ringspan.train.corpus import Joined
from ringspan.train.packing import IGNORE, Rows, parts
from ringspan.train.tokenizer import Tokenizer

KEYS, VALUES = 8, 8
IDS = KEYS + VALUES + KEYS * VALUES  # keys that ask, values that answer, and needles, in this order
NEEDLES = 8  # of a document, one in each eighth of the text; fewer where it has not 4 tokens for each
SMALLEST = 8  # tokens: two needles, and a question for each
ENDLESS = 1 << 40  # rows: one never comes again
SHORTEST = 8 * NEEDLES  # tokens of a row: room for all needles, the questions and some text
DEPTHS = np.random.default_rng(0).permutation(NEEDLES)  # the needle that question k of an evaluation asks for

PLACES = ("Oslo", "Lima", "Cairo", "Delhi", "Paris", "Quito", "Seoul", "Tunis")  # one for each needle
NUMBERS = range(100, 1000)
SENTENCE = ("\nThe secret number of {place} is", " {number}", ".\n")  # the middle one is the answer


class Questions(Rows, Protocol):
    """Rows of one document each, at whose end question k asks for the needle of depth DEPTHS[k], 0 the first."""

    @property
    def questions(self) -> tuple[int, int]:
        """(position of the first question, tokens of each)."""
        ...


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
        return ENDLESS

    def order(self, rows_seen: int, n: int) -> list[int]:
        return list(range(rows_seen, rows_seen + n))

    @property
    def questions(self) -> tuple[int, int]:
        assert self.length, "rows to train on hold documents of several lengths"
        return self.length - 2 * NEEDLES, 2

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
                tokens[at : at + stop - begin] = text_from(self._tokens, offset + begin, stop - begin)
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


class Sentences:
    """SENTENCE with each place and number, as a tokenizer's ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        before, answer, after = SENTENCE
        self.before = tokenizer.encode([before.format(place=place) for place in PLACES])
        self.answers = tokenizer.encode([answer.format(number=number) for number in NUMBERS])
        (self.after,) = tokenizer.encode([after])
        self.longest = max(map(len, self.before)) + max(map(len, self.answers)) + len(self.after)
        self.shortest_row = 2 * NEEDLES * self.longest  # half of it text with eight sentences, half of it questions
        self.end_of_document = tokenizer.end_of_document


class SentenceRows:
    """Endless rows like those of an evaluation, in plain words: for models that do not know the IDS.

    text ... The secret number of Oslo is 417. ... text   The secret number of Oslo is 417. The secret number of ...
                                                          the tokens of " 417" are labels, here alone

    A needle is found if each token of its answer is the likeliest one: a guess is right once in 900. In the text no
    document ends, as all of a row is one.
    """

    def __init__(self, tokens: Joined, sentences: Sentences, seq_len: int) -> None:
        assert seq_len >= sentences.shortest_row, f"{seq_len} tokens are too few"
        self.seq_len, self._tokens, self._sentences = seq_len, tokens, sentences
        self._document = lru_cache(maxsize=1)(self._draw)

    @property
    def questions(self) -> tuple[int, int]:
        return self.seq_len - NEEDLES * self._sentences.longest, self._sentences.longest

    def __len__(self) -> int:
        return ENDLESS

    def order(self, rows_seen: int, n: int) -> list[int]:
        return list(range(rows_seen, rows_seen + n))

    def lengths(self, row: int) -> list[int]:
        return [self.seq_len]

    def load(self, row: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens, labels = self._document(row)
        at, padding = np.maximum(positions, 0), positions < 0
        return np.where(padding, 0, tokens[at]), np.where(padding, IGNORE, labels[at]), at

    def _draw(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, labels) of all of a row."""
        rng, known = np.random.default_rng([0, row]), self._sentences
        text = text_from(self._tokens, int(rng.integers(max(1, len(self._tokens) - self.seq_len))), self.seq_len)
        tokens = np.resize(text[text != known.end_of_document], self.seq_len).astype(np.int64)
        labels = np.full(self.seq_len, IGNORE, np.int64)
        first, size = self.questions
        edges = np.linspace(0, first, NEEDLES + 1).astype(np.int64)
        starts = rng.integers(edges[:-1], edges[1:] - size + 1)  # each in its eighth
        places, numbers = rng.permutation(NEEDLES), rng.integers(len(NUMBERS), size=NEEDLES)
        for question, depth in enumerate(DEPTHS.tolist()):
            answer = known.answers[numbers[depth]]
            sentence = np.concatenate([known.before[places[depth]], answer, known.after])
            tokens[starts[depth] : starts[depth] + len(sentence)] = sentence
            stop = first + (question + 1) * size
            tokens[stop - len(sentence) : stop] = sentence
            said = stop - len(known.after)
            labels[said - len(answer) - 1 : said - 1] = answer
        return tokens, labels


def text_from(tokens: Joined, start: int, n: int) -> np.ndarray:
    """n tokens from start on; a text that is too short is repeated."""
    found = tokens[start : start + n]
    return found if len(found) == n else np.resize(tokens[:], start + n)[start:]
