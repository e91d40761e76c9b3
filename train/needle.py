"""A synthetic retrieval task: pairs of a key and a value are hidden in text, and asked for at its end.

Only a model that attends to where the pair is can answer; a guess is right once in VALUES. Keys and values are ids of
their own behind the vocabulary, so that text never has them and any tokenizer will do.

    text text KEY VALUE text ... text KEY' VALUE' text   KEY' VALUE' KEY VALUE
                                                         ^ the label here is VALUE', and only at keys there are labels
"""

import numpy as np

from ringspan.train.corpus import Joined
from ringspan.train.packing import IGNORE, parts

KEYS, VALUES = 32, 32
IDS = KEYS + VALUES
NEEDLES = 8  # of a row, one in each eighth of the text
SHORTEST = 8 * NEEDLES  # tokens: room for the needles, the questions and some text


class NeedleRows:
    """Endless rows, each drawn from (seed, row) alone.

    tokens: what the text is taken from;  first_id: keys are the KEYS ids from it on, values the VALUES behind those
    length: tokens of a row that are not padding, None for all
    shuffled: questions come in an order of each row's own, not in the order `depths`
    """

    def __init__(
        self, tokens: Joined, first_id: int, seq_len: int, seed: int, length: int | None = None, shuffled: bool = True
    ):
        """Raises ValueError where a row is too short."""
        self.seq_len, self.length = seq_len, seq_len if length is None else length
        if not SHORTEST <= self.length <= seq_len:
            raise ValueError(f"seq_len={self.length}: rows with needles (data.needles) have {SHORTEST} tokens or more")
        self._tokens, self._first_id, self._seed, self._shuffled = tokens, first_id, seed, shuffled
        self.text = self.length - 2 * NEEDLES  # tokens before the questions
        self.depths = np.random.default_rng(0).permutation(NEEDLES)  # which needle question k asks for, 0 the first

    def __len__(self) -> int:
        return 1 << 40  # one never comes again

    def order(self, rows_seen: int, n: int) -> list[int]:
        return list(range(rows_seen, rows_seen + n))

    def lengths(self, row: int) -> list[int]:
        return [self.length, self.seq_len - self.length] if self.length < self.seq_len else [self.length]

    def load(self, row: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng([self._seed, row])
        offset = int(rng.integers(max(1, len(self._tokens) - self.text)))
        keys = self._first_id + rng.permutation(KEYS)[:NEEDLES]
        values = self._first_id + KEYS + rng.integers(VALUES, size=NEEDLES)
        eighths = np.linspace(0, self.text, NEEDLES + 1).astype(np.int64)
        places = rng.integers(eighths[:-1], eighths[1:] - 1)  # of keys; the value is behind it, in the same eighth
        asked = rng.permutation(NEEDLES) if self._shuffled else self.depths
        tokens, within = np.zeros(len(positions), np.int64), np.zeros(len(positions), np.int64)
        for at, begin, stop, piece in parts(positions, [0, self.text, self.length, self.seq_len]):
            here = slice(at, at + stop - begin)
            within[here] = np.arange(begin, stop) - (self.length if piece == 2 else 0)
            if piece == 0:
                tokens[here] = self._text(offset + begin, stop - begin)
        questions = self.text + 2 * np.arange(NEEDLES)
        where = np.concatenate([places, places + 1, questions, questions + 1])
        _put(tokens, positions, where, np.concatenate([keys, values, keys[asked], values[asked]]))
        labels = np.full(len(positions), IGNORE, np.int64)
        _put(labels, positions, questions, values[asked])
        return tokens, labels, within

    def _text(self, start: int, n: int) -> np.ndarray:
        """n tokens from start on; a text that is too short is repeated."""
        found = self._tokens[start : start + n]
        return found if len(found) == n else np.resize(self._tokens[:], start + n)[start:]


def _put(into: np.ndarray, positions: np.ndarray, where: np.ndarray, what: np.ndarray) -> None:
    """into[i] = what[j] where positions[i] = where[j]; `where` has nothing twice."""
    order = np.argsort(where)
    nearest = np.minimum(np.searchsorted(where[order], positions), len(where) - 1)
    hit = where[order][nearest] == positions
    into[hit] = what[order][nearest[hit]]
