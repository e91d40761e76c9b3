"""Rows against a slow second definition. Token i of these corpora is i + 1: it says where it is from; 0 is padding."""

import time
from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringspan.train.packing import IGNORE, LongDocuments, PackedRows, Packing, best_fit

CONCATENATE, BEST_FIT, WHOLE = Packing.concatenate, Packing.best_fit, Packing.whole

# documents, the longest one, seq_len: single ones, shorter and longer than rows, rows of one token, exact fits
CASES = [(1, 1, 1), (1, 5, 16), (1, 100, 7), (9, 12, 1), (50, 64, 16), (200, 9, 31), (3, 8, 8), (60, 300, 101)]
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=20)
PACKINGS = st.sampled_from(list(Packing))


def corpus_of(lengths, labelled=None):
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(1, starts[-1] + 1, dtype=np.uint32)
    return SimpleNamespace(tokens=tokens, starts=starts, labelled=labelled)


def random_corpus(n: int, longest: int):
    return corpus_of(np.random.default_rng([n, longest]).integers(1, longest + 1, n))


def make(n: int, longest: int, seq_len: int, cross_document: bool, packing=None, seed: int = 0):
    packing = packing or (CONCATENATE if cross_document else BEST_FIT)
    corpus = random_corpus(n, longest)
    rows = PackedRows(corpus, seq_len, seed, cross_document, packing=packing)
    return rows, [int(stop) for stop in corpus.starts[1:]]


def whole(rows: PackedRows, row: int) -> list[list[int]]:
    return [values.tolist() for values in rows.load(row, np.arange(rows.seq_len))]


def runs(rows: PackedRows, row: int, values: list[int]) -> list[list[int]]:
    """A row's values, cut at its lengths."""
    stops = np.cumsum(rows.lengths(row)).tolist()
    return [values[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 30), PACKINGS, st.booleans(), st.integers(0, 5))
def test_every_token_is_there_once_and_a_label_once(lengths, seq_len, packing, cross_document, seed):
    rows = PackedRows(corpus_of(lengths), seq_len, seed, cross_document, packing=packing)
    ends = np.cumsum(lengths).tolist()
    starts = {1, *(end + 1 for end in ends[:-1])}
    loaded = [whole(rows, row) for row in range(len(rows))]
    tokens = [token for tokens, _, _ in loaded for token in tokens]
    assert sorted(token for token in tokens if token) == list(range(1, ends[-1] + 1))
    assert tokens.count(0) == round(rows.waste.padding * len(rows) * seq_len)
    labels = sorted(label for _, labels, _ in loaded for label in labels if label != IGNORE)
    assert len(set(labels)) == len(labels)
    assert set(range(1, ends[-1] + 1)) - set(labels) <= starts  # the first token of a document may be none
    if not cross_document:
        assert not starts & set(labels)
    elif packing is CONCATENATE:
        assert len(labels) == ends[-1] - 1


@settings(deadline=None)
@given(LENGTHS, st.integers(2, 30), st.booleans(), st.data())
def test_overlaps_are_context_alone(lengths, seq_len, cross_document, data):
    overlap = data.draw(st.integers(1, seq_len - 1))
    packing = data.draw(st.sampled_from([BEST_FIT, WHOLE]))
    rows = PackedRows(corpus_of(lengths), seq_len, 0, cross_document, packing=packing, overlap=overlap)
    ends = np.cumsum(lengths).tolist()
    starts = {1, *(end + 1 for end in ends[:-1])}
    pieces = []
    for row in range(len(rows)):
        tokens, labels, _ = whole(rows, row)
        for token, label in zip(tokens, labels, strict=True):
            assert label in (IGNORE, token + 1) or label in starts
        pieces += [labels[at:][:n] for at, n in pieces_of(tokens)]
    labels = sorted(label for piece in pieces for label in piece if label != IGNORE)
    if cross_document:
        labels = [label for label in labels if label not in starts]
    assert labels == [token for token in range(1, ends[-1] + 1) if token not in starts]
    again = sum(-(-max(0, n - seq_len) // (seq_len - overlap)) * overlap for n in lengths)
    assert rows.waste.context * len(rows) * seq_len == pytest.approx(again)


def pieces_of(tokens: list[int]) -> list[tuple[int, int]]:
    """(where it begins, length) of each run of consecutive tokens, without padding."""
    groups = groupby(enumerate(tokens), key=lambda pair: pair[1] - pair[0] if pair[1] else None)
    found = [[at for at, _ in group] for key, group in groups if key is not None]
    return [(run[0], len(run)) for run in found]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 30), PACKINGS, st.integers(0, 40))
def test_documents_too_long_or_too_short_are_dropped_and_counted(lengths, seq_len, packing, shortest):
    kept = [n for n in lengths if shortest <= n <= seq_len]

    def rows():
        long = LongDocuments.drop
        return PackedRows(corpus_of(lengths), seq_len, 0, packing=packing, long_documents=long, shortest=shortest)

    if not kept:
        with pytest.raises(
            ValueError, match=rf"no document is left: of {len(lengths)}, .* data\.shortest={shortest} and"
        ):
            rows()
        return
    waste = rows().waste
    assert (waste.dropped_documents, waste.dropped_tokens) == (len(lengths) - len(kept), sum(lengths) - sum(kept))
    assert sum(sum(map(bool, whole(rows(), row)[0])) for row in range(len(rows()))) == sum(kept)
    assert waste.cuts == 0 or packing is CONCATENATE


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 30), PACKINGS, st.booleans(), st.data())
def test_tokens_that_are_no_labels_are_none(lengths, seq_len, packing, cross_document, data):
    n = sum(lengths)
    labelled = np.array(data.draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)), np.uint8)
    plain, masked = (
        PackedRows(corpus_of(lengths, mask), seq_len, 0, cross_document, packing=packing) for mask in (None, labelled)
    )
    for row in range(len(plain)):
        tokens, labels, positions = whole(plain, row)
        expected = [label if label != IGNORE and labelled[label - 1] else IGNORE for label in labels]
        assert whole(masked, row) == [tokens, expected, positions]


def test_a_row_of_whole_documents_has_one():
    rows = PackedRows(corpus_of([3, 9, 5]), 5, 0, packing=WHOLE)
    assert sorted(rows.lengths(row) for row in range(4)) == [[3, 2], [4, 1], [5], [5]]
    assert rows.waste.cuts == 1
    assert rows.waste.padding == pytest.approx(3 / 20)


def test_only_some_documents_are_taken():
    rows = PackedRows(corpus_of([3, 9, 5]), 8, 0, documents=np.array([0, 2]))
    assert sorted(token for row in range(len(rows)) for token in whole(rows, row)[0]) == [1, 2, 3, 13, 14, 15, 16, 17]


def test_an_overlap_of_a_whole_row_is_refused():
    with pytest.raises(ValueError, match=r"data\.overlap=8: must be below seq_len=8"):
        PackedRows(corpus_of([3]), 8, 0, overlap=8)


@pytest.mark.parametrize("cross_document", [False, True])
@pytest.mark.parametrize("packing", list(Packing))
@pytest.mark.parametrize("case", CASES)
def test_runs_fill_the_row_with_padding_in_one_at_its_end(case, packing, cross_document):
    rows, _ = make(*case, cross_document, packing)
    for row in range(len(rows)):
        lengths, (tokens, labels, positions) = rows.lengths(row), whole(rows, row)
        assert sum(lengths) == rows.seq_len
        assert min(lengths) > 0
        assert positions == [position for length in lengths for position in range(length)]
        padding = [all(token == 0 for token in run) for run in runs(rows, row, tokens)]
        assert not any(padding[:-1])
        assert tokens.count(0) == (lengths[-1] if padding[-1] else 0)
        assert all(label == IGNORE for token, label in zip(tokens, labels, strict=True) if token == 0)


@pytest.mark.parametrize("packing", [BEST_FIT, WHOLE])
@pytest.mark.parametrize("case", CASES)
def test_packed_documents_stay_whole_or_are_cut_every_seq_len(case, packing):
    rows, ends = make(*case, False, packing)
    pieces = sorted(run for row in range(len(rows)) for run in runs(rows, row, whole(rows, row)[0]) if run[0])
    expected = []
    for start, stop in zip([0, *ends], ends, strict=False):
        document = list(range(start + 1, stop + 1))
        expected += [document[at : at + rows.seq_len] for at in range(0, len(document), rows.seq_len)]
    assert pieces == expected


@pytest.mark.parametrize("packing", list(Packing))
@pytest.mark.parametrize("case", CASES)
def test_labels_are_next_tokens_and_stop_at_the_document(case, packing):
    rows, ends = make(*case, False, packing)
    for row in range(len(rows)):
        tokens, labels, _ = whole(rows, row)
        assert labels == [IGNORE if token in (0, *ends) else token + 1 for token in tokens]


@pytest.mark.parametrize("cross_document", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_concatenated_rows_cut_one_stream_of_whole_documents(case, cross_document):
    rows, ends = make(*case, cross_document, CONCATENATE)
    loaded = [whole(rows, row) for row in range(len(rows))]
    stream = [token for tokens, _, _ in loaded for token in tokens if token]
    labels = [label for tokens, labels, _ in loaded for token, label in zip(tokens, labels, strict=True) if token]
    if cross_document:
        assert labels == [*stream[1:], IGNORE]
    breaks = [stream[at + n - 1] for at, n in pieces_of(stream)]  # documents may follow each other as in the corpus
    assert set(breaks) <= set(ends)
    edges = {end for row in range(len(rows)) for end in np.cumsum(rows.lengths(row)).tolist()}
    assert (
        cross_document == (edges <= {rows.seq_len, len(stream) % rows.seq_len}) or len(ends) == 1 or rows.seq_len == 1
    )


def test_concatenated_order_is_drawn_from_the_seed():
    first, again, other = (
        [whole(rows, row) for row in range(len(rows))]
        for rows, _ in (make(50, 64, 16, True, seed=seed) for seed in (1, 1, 2))
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("cross_document", [False, True])
@pytest.mark.parametrize("packing", list(Packing))
@pytest.mark.parametrize("case", CASES)
def test_any_positions_load_as_they_do_in_the_whole_row(case, packing, cross_document):
    rows, _ = make(*case, cross_document, packing)
    rng = np.random.default_rng(0)
    for row in range(min(len(rows), 20)):
        positions = rng.integers(-1, rows.seq_len, rng.integers(0, 2 * rows.seq_len + 1))
        if row % 2:  # what layouts ask for: long runs
            positions = np.concatenate([np.arange(rows.seq_len)[-5:], [-1, -1], np.arange(rows.seq_len)[:7], [-1]])
        outside = [0, IGNORE, 0]  # what position -1 gives
        for values, part, other in zip(whole(rows, row), rows.load(row, positions), outside, strict=True):
            assert part.dtype == np.int64
            assert part.tolist() == [values[position] if position >= 0 else other for position in positions]


def test_load_reads_no_more_than_it_is_asked_for():
    class Counting:
        def __init__(self, tokens):
            self.tokens, self.read = tokens, 0

        def __getitem__(self, index):
            self.read += len(self.tokens[index])
            return self.tokens[index]

    corpus = random_corpus(20, 500)
    corpus.tokens = Counting(corpus.tokens)
    PackedRows(corpus, 1000, 0, False).load(1, np.arange(100, 120))
    assert corpus.tokens.read <= 2 * 20  # tokens and labels


@pytest.mark.parametrize("cross_document", [False, True])
def test_order_is_a_permutation_an_epoch_whatever_the_steps(cross_document):
    rows, _ = make(60, 300, 101, cross_document)
    n = len(rows)
    stream = rows.order(0, 3 * n)
    epochs = [stream[at : at + n] for at in range(0, 3 * n, n)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(n))] * 3
    assert epochs[0] != epochs[1] != epochs[2] != list(range(n))
    for rows_seen, count in [(0, 1), (n - 1, 2), (7, n), (n, 0), (5, 2 * n)]:
        fresh, _ = make(60, 300, 101, cross_document)  # resumed: nothing but the number of rows seen is left
        assert fresh.order(rows_seen, count) == stream[rows_seen : rows_seen + count]
    assert make(60, 300, 101, cross_document, seed=1)[0].order(0, n) != epochs[0]


def best_fit_one_by_one(lengths: list[int], capacity: int) -> list[int]:
    """Rooms left in rows, by the definition: longest piece first, each into the row with the least room that does."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        enough = [i for i, room in enumerate(rooms) if room >= length]
        if not enough:
            rooms.append(capacity - length)
        else:
            rooms[min(enough, key=rooms.__getitem__)] -= length
    return sorted(rooms)


@settings(deadline=None)
@given(st.sampled_from([1, 2, 10, 37, 1000]), st.integers(0, 10**6), st.integers(1, 300), st.integers(1, 4))
def test_best_fit_is_what_its_name_says(capacity, seed, n, part):
    lengths = np.random.default_rng(seed).integers(1, max(2, capacity // part + 1), n).clip(max=capacity)
    row_of = best_fit(lengths, capacity)
    used = np.bincount(row_of, weights=lengths)
    assert used.min() > 0
    assert sorted((capacity - used).astype(int).tolist()) == best_fit_one_by_one(lengths.tolist(), capacity)


def test_a_million_documents_are_packed_in_seconds():
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1.5, 1_000_000).astype(np.int64), 1, 65536)
    start = time.process_time()
    row_of = best_fit(lengths, 65536)
    assert time.process_time() - start < 10  # 0.6 s alone on one core; one bisection a piece takes 6 s, a scan hours
    assert len(np.unique(row_of)) * 65536 < 1.001 * lengths.sum()
