"""Mixtures, held-out documents and needles: which rows come when, and what is in them."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_corpus import WideTokenizer, write

from ringspan.train.corpus import Corpus, Joined
from ringspan.train.data import DataConfig, prepare
from ringspan.train.needle import DEPTHS, IDS, KEYS, NEEDLES, SHORTEST, SMALLEST, VALUES, NeedleRows
from ringspan.train.packing import IGNORE, PackedRows
from ringspan.train.rows import Mixed, Text, hold_out, packing_facts
from ringspan.train.step import Batches


class Numbered:
    """Rows that say which they are."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed, self.seq_len = n, seed, 3

    def __len__(self) -> int:
        return self.n

    def order(self, rows_seen: int, n: int) -> list[int]:
        epochs = range((rows_seen + n) // self.n + 1)
        drawn = [np.random.default_rng([self.seed, epoch]).permutation(self.n) for epoch in epochs]
        return np.concatenate(drawn)[rows_seen : rows_seen + n].tolist()

    def lengths(self, row: int) -> list[int]:
        return [row % 3, 3 - row % 3]

    def load(self, row: int, positions: np.ndarray):
        return tuple(np.full(len(positions), value) for value in (self.seed, row, 0))


SHARES = st.lists(st.floats(0.01, 10), min_size=1, max_size=4)


@settings(deadline=None, max_examples=30)
@given(SHARES, st.integers(0, 100), st.integers(0, 30), st.integers(1, 20))
def test_a_mixture_is_a_function_of_rows_seen(shares, rows_seen, n, step):
    kinds = [Numbered(7 + 5 * k, k) for k in range(len(shares))]
    mixed = Mixed(kinds, shares)
    stream = mixed.order(0, rows_seen + n)
    assert mixed.order(rows_seen, n) == stream[rows_seen:]
    in_steps = [row for at in range(0, rows_seen + n, step) for row in mixed.order(at, step)]
    assert in_steps[: rows_seen + n] == stream
    counts = Counter(row % len(kinds) for row in stream)
    for k, kind in enumerate(kinds):
        assert [row // len(kinds) for row in stream if row % len(kinds) == k] == kind.order(0, counts[k])
        assert abs(counts[k] - len(stream) * shares[k] / sum(shares)) <= len(kinds)
    for row in stream[:5]:
        kind, own = kinds[row % len(kinds)], row // len(kinds)
        assert mixed.lengths(row) == kind.lengths(own)
        assert [x[0] for x in mixed.load(row, np.arange(2))] == [kind.seed, own, 0]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 20), st.integers(0, 5))
def test_data_ranks_share_the_one_stream_whatever_their_number(micro_batch, accumulation, rows_seen, steps):
    rows = Mixed([Numbered(7, 0), Numbered(30, 1)], [0.3, 0.7])
    for data in (1, 2, 4):
        streams = []
        for rank in range(data):
            attend = SimpleNamespace(mesh=SimpleNamespace(data=data, data_rank=rank))
            batches = Batches(rows, attend, micro_batch, accumulation, None)
            taken = [batches.rows_after(rows_seen + step * batches.rows_of_a_step) for step in range(steps)]
            assert all(len(mb) == micro_batch for step in taken for mb in step)
            streams.append([row for step in taken for mb in step for row in mb])
        together = [row for turn in zip(*streams, strict=True) for row in turn]
        assert together == rows.order(rows_seen, steps * micro_batch * accumulation * data)


def test_a_mixture_ends_where_one_kind_begins_again():
    mixed = Mixed([Numbered(10, 0), Numbered(100, 1)], [0.5, 0.5])
    assert len(mixed) == 20
    assert len(set(mixed.order(0, 20))) == 20
    assert len(set(mixed.order(0, 21))) == 20


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=50), st.floats(0.001, 0.9))
def test_held_out_documents_are_as_many_as_fit_and_at_least_one(lengths, share):
    lengths = np.array(lengths)
    held = hold_out(lengths, share)
    assert 0 < held.sum() < len(lengths)
    assert lengths[held].sum() <= share * lengths.sum() or (held.sum() == 1 and lengths[held] == lengths.min())
    assert (hold_out(lengths, share) == held).all()


def test_nothing_is_held_out_unless_asked_for():
    assert not hold_out(np.array([5]), 0.0).any()
    with pytest.raises(ValueError, match=r"data\.held_out=0\.5: there is but one document"):
        hold_out(np.array([5]), 0.5)


def test_held_out_takes_about_the_share_it_is_told():
    lengths = np.random.default_rng(0).lognormal(6, 1, 3000)
    assert 0.019 <= lengths[hold_out(lengths, 0.02)].sum() / lengths.sum() <= 0.02


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "text").mkdir()
    for n in range(40):
        (tmp_path / "text" / f"{n:02}.txt").write_text(chr(200 + n) * (5 + n))
    return tmp_path


def text_of(folder: Path, **fields) -> Text:
    fields = {} if "mixture" in fields else {"path": str(folder / "text")} | fields
    config = DataConfig(cache=str(folder / "cache"), **fields)
    return Text(prepare(config), config)


def tokens_of(rows: PackedRows) -> Counter:
    return Counter(t for row in range(len(rows)) for t in rows.load(row, np.arange(rows.seq_len))[0].tolist() if t)


def test_what_is_held_out_is_never_trained_on(folder):
    text = text_of(folder, held_out=0.1)
    everything = Counter(text.corpora[0].tokens.tolist())
    for seq_len, seed in ((16, 0), (100, 1)):
        train, held = text.rows(seq_len, seed), text.held_out(seq_len)
        assert tokens_of(train) + tokens_of(held) == everything
        assert sum(tokens_of(held).values()) <= 0.1 * sum(everything.values())
    assert tokens_of(text.held_out(16)) == tokens_of(text.held_out(100))
    assert text_of(folder).held_out(16) is None


def test_bytes_of_what_is_held_out_are_counted(folder):
    text = text_of(folder, held_out=0.5)
    held = text.held[0]
    raw = sum(len((chr(200 + n) * (5 + n)).encode()) for n in np.flatnonzero(held))
    assert text.tokens_per_byte() == pytest.approx((raw + held.sum()) / raw)
    (folder / "ids.jsonl").write_text('{"text": [1, 2]}\n{"text": [3, 4]}')
    assert text_of(folder, path=str(folder / "ids.jsonl"), held_out=0.5).tokens_per_byte() is None


def test_sources_are_mixed_by_their_shares(folder):
    (folder / "other.txt").write_text("x" * 999)
    config = DataConfig(
        mixture={str(folder / "text"): 3, str(folder / "other.txt"): 1}, cache=str(folder / "cache"), needles=0.2
    )
    text = Text(prepare(config), config)
    rows = text.rows(64, 0)
    assert text.vocab_size == 257 + IDS
    assert text.name == "text (bytes) + other.txt (bytes)"
    assert text.tokens == sum(len(corpus.tokens) for corpus in text.corpora)
    kinds = Counter()
    for row in rows.order(0, 100):
        tokens = rows.load(row, np.arange(64))[0]
        kinds["needles" if tokens.max() > 256 else "other" if ord("x") in tokens else "text"] += 1
    assert kinds == {"text": 60, "other": 20, "needles": 20}
    entropies = [corpus.unigram_entropy for corpus in text.corpora]
    assert text.unigram_entropy == pytest.approx(0.75 * entropies[0] + 0.25 * entropies[1])
    assert packing_facts(rows)["cuts"] > 0
    assert 0 < packing_facts(rows)["padding"] < 1


def test_sources_of_two_tokenizers_are_refused(folder, tmp_path):
    write(tmp_path / "a"), write(tmp_path / "b", tokenizer=WideTokenizer)
    config = DataConfig(mixture={str(tmp_path / "a"): 1, str(tmp_path / "b"): 1})
    with pytest.raises(ValueError, match=r"data\.mixture: some text and some text are not of one tokenizer"):
        Text([tmp_path / "a", tmp_path / "b"], config)


HAY = Joined([np.arange(1, 500, dtype=np.uint16)])


def check_document(tokens: np.ndarray, labels: np.ndarray) -> list[int]:
    """Of one document: each question has the needle's answer. Returns the depth of the needle each asks for."""
    n = min(NEEDLES, len(tokens) // 4)
    asked = np.flatnonzero(labels != IGNORE)
    assert asked.tolist() == list(range(len(tokens) - 2 * n, len(tokens), 2))
    hay, depths = tokens[: len(tokens) - 2 * n], []
    for question in asked:
        key, value = tokens[question] - 1000, tokens[question + 1] - 1000 - KEYS
        assert 0 <= key < KEYS
        assert 0 <= value < VALUES
        assert labels[question] == tokens[question + 1]
        (place,) = np.flatnonzero(hay == 1000 + KEYS + VALUES + VALUES * key + value)
        depths.append(int(np.searchsorted(np.arange(n) * len(hay) // n, place, side="right")) - 1)
    assert sorted(depths) == list(range(n))  # one in each eighth
    assert (hay < 1000).sum() == len(hay) - n
    return depths


@pytest.mark.parametrize(("seq_len", "length"), [(1000, 1000), (999, 77), (100, SHORTEST)])
def test_a_needle_to_measure_is_where_its_question_says(seq_len, length):
    rows = NeedleRows(HAY, 1000, seq_len, seed=3, length=length)
    for row in rows.order(5, 50):
        tokens, labels, positions = rows.load(row, np.arange(seq_len))
        assert rows.lengths(row) == [x for x in (length, seq_len - length) if x]
        assert positions.tolist() == [*range(length), *range(seq_len - length)]
        assert check_document(tokens[:length], labels[:length]) == DEPTHS.tolist()
        assert (tokens[length:] == 0).all()
        assert (labels[length:] == IGNORE).all()


@pytest.mark.parametrize("seq_len", [SHORTEST, 256, 999])
def test_a_row_to_train_on_has_documents_of_one_size_each_with_its_needles(seq_len):
    rows, sizes, orders = NeedleRows(HAY, 1000, seq_len, seed=3), Counter(), Counter()
    for row in rows.order(5, 60):
        tokens, labels, positions = rows.load(row, np.arange(seq_len))
        lengths = rows.lengths(row)
        size = lengths[0]
        assert sum(lengths) == seq_len
        assert set(lengths[:-1]) <= {size}
        assert lengths[-1] <= size
        for start, n in zip(np.cumsum([0, *lengths]).tolist(), lengths, strict=False):
            assert positions[start : start + n].tolist() == list(range(n))
            document = slice(start, start + n)
            if n == size:
                orders[tuple(check_document(tokens[document], labels[document]))] += 1
            else:
                assert not tokens[document].any()
                assert (labels[document] == IGNORE).all()
        sizes[size] += 1
    assert sorted(sizes) == sorted(seq_len >> k for k in range((seq_len // SMALLEST).bit_length()))
    assert max(sizes.values()) <= 3 * 60 / len(sizes)
    assert len({order for order in orders if len(order) == NEEDLES}) > 30
    again = NeedleRows(HAY, 1000, seq_len, seed=3)
    assert np.array_equal(again.load(9, np.arange(seq_len)), rows.load(9, np.arange(seq_len)))
    assert not np.array_equal(again.load(9, np.arange(seq_len)), rows.load(10, np.arange(seq_len)))


@pytest.mark.parametrize("length", [None, 200])
def test_any_positions_of_a_needle_row_load_as_in_the_whole_row(length):
    rows = NeedleRows(HAY, 1000, 300, seed=0, length=length)
    rng = np.random.default_rng(0)
    for row in range(20):
        positions = np.concatenate([rng.integers(-1, 300, 100), [-1, -1], np.arange(150, 230), [-1]])
        for values, part, outside in zip(
            rows.load(row, np.arange(300)), rows.load(row, positions), [0, IGNORE, 0], strict=True
        ):
            assert part.tolist() == [values[p] if p >= 0 else outside for p in positions]


def test_a_row_too_short_for_needles_is_refused():
    with pytest.raises(ValueError, match=rf"seq_len={SHORTEST - 1}: rows with needles \(data\.needles\) have"):
        NeedleRows(HAY, 1000, SHORTEST - 1, seed=0)


def test_needles_alone(folder):
    text = text_of(folder, needles=1.0)
    rows = text.rows(64, 0)
    assert isinstance(rows, NeedleRows)
    assert text.unigram_entropy == np.log(VALUES)
    assert packing_facts(rows) == {}


def test_corpora_are_opened_by_every_rank(folder):
    text = text_of(folder)
    assert text.digest == Corpus(prepare(text.config)[0]).digest
    assert text.n_skipped == 0
