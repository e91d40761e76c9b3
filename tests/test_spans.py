"""Spans against masks written out as matrices."""

import itertools

import pytest
import torch
from torch import Tensor

from ringspan.kernels.plan import TILE, plan
from ringspan.kernels.spans import Spans


def matrix(spans: Spans, keys: int) -> torch.Tensor:
    """(rows, queries, keys): who sees whom."""
    key = torch.arange(keys)
    return (key >= spans.lo[..., None]) & (key < spans.hi[..., None])


def random_spans(queries: int, keys: int, generator: torch.Generator, rows: int = 1) -> Spans:
    """Any monotone bounds: about every third row ends up without a key."""
    bounds = [torch.randint(0, keys + 1, (rows, queries), generator=generator).sort(dim=1).values for _ in range(2)]
    return Spans(*(bound.to(torch.int32) for bound in bounds))


def distance(queries: int, keys: int) -> torch.Tensor:
    """How far a key lies behind a query, the last of both side by side."""
    return torch.arange(queries)[:, None] + (keys - queries) - torch.arange(keys)


@pytest.mark.parametrize("queries, keys", [(1, 1), (7, 7), (5, 11), (11, 5), (3, 0), (0, 3)])
def test_causal_full_and_window(queries, keys):
    behind = distance(queries, keys)
    assert (matrix(Spans.causal(queries, keys), keys)[0] == (behind >= 0)).all()
    assert (matrix(Spans.full(queries, keys), keys)).all()
    windowed = matrix(Spans.causal(queries, keys, window=3), keys)[0]
    assert (windowed == ((behind >= 0) & (behind < 3))).all()


@pytest.mark.parametrize("lengths", [[5], [3, 1, 4], [1] * 7, [0, 6, 0, 2], [[3, 4], [7, 0]]])
@pytest.mark.parametrize("causal, window", [(True, None), (False, None), (True, 2)])
def test_packed(lengths, causal, window):
    nested = lengths if isinstance(lengths[0], list) else [lengths]
    spans = Spans.packed(lengths, causal=causal, window=window)
    n = sum(nested[0])
    behind = distance(n, n)
    for row, documents in enumerate(nested):
        name = torch.arange(len(documents)).repeat_interleave(torch.tensor(documents))
        expected = name[:, None] == name
        if causal:
            expected &= behind >= 0
        if window:
            expected &= behind < window
        assert (matrix(spans, n)[row] == expected).all()
    spans.check(n)


def test_blocks_are_seen_whole_and_only_from_inside():
    spans = Spans.causal(10, window=4).with_blocks([(6, 9), (0, 3)])
    expected = matrix(Spans.causal(10, window=4), 10)[0]
    expected[0:3, 0:3] = True
    expected[6:9, 6:9] = True
    # A row of a block reaches back as far as the block's first row at least, so that it stays one run.
    assert (matrix(spans, 10)[0] == expected).all()
    assert (Spans.causal(4).with_blocks([[(0, 2)], []]).hi == torch.tensor([[2, 2, 3, 4], [1, 2, 3, 4]])).all()
    spans.check(10)


def test_padding_and_intersection():
    spans = Spans.causal(6).padded([0, 2], [6, 5])
    for row, (start, end) in enumerate([(0, 6), (2, 5)]):
        key = torch.arange(6)
        assert (matrix(spans, 6)[row] == ((distance(6, 6) >= 0) & (key >= start) & (key < end))).all()
    both = Spans.packed([4, 2]) & Spans.causal(6, window=2)
    assert (matrix(both, 6) == (matrix(Spans.packed([4, 2]), 6) & matrix(Spans.causal(6, window=2), 6))).all()


@pytest.mark.parametrize("seed", range(30))
def test_transpose_shards_tiles_and_pairs_of_random_spans(seed):
    generator = torch.Generator().manual_seed(seed)
    queries, keys, rows = (int(torch.randint(1, top, (), generator=generator)) for top in (300, 300, 4))
    spans = random_spans(queries, keys, generator, rows).check(keys)
    seen = matrix(spans, keys)
    assert (matrix(spans.transpose(keys), queries) == seen.transpose(1, 2)).all()
    assert (spans.pairs() == seen.sum(dim=(1, 2))).all()

    mine = torch.randperm(queries, generator=generator)[: queries // 2].sort().values
    theirs = torch.randperm(keys, generator=generator)[: keys // 2].sort().values
    padding = torch.full((3,), -1)
    local = spans.shard(torch.cat([mine, padding]), torch.cat([theirs, padding]))
    found = matrix(local, len(theirs) + 3)
    assert (found[:, : len(mine), : len(theirs)] == seen[:, mine][:, :, theirs]).all()
    assert not found[:, len(mine) :].any()
    assert not found[:, :, len(theirs) :].any()
    local.check(len(theirs))


@pytest.mark.parametrize(
    "spans",
    [
        Spans.packed([[900, 1300, 77, 2500, 1, 222], [5000]]),
        Spans.packed([[512] * 9 + [392]]),
        Spans.causal(5000, window=700),
        random_spans(5000, 5000, torch.Generator().manual_seed(0), rows=3),
    ],
    ids=["packed", "equal", "window", "random"],
)
def test_tiles_of_a_document_are_worked_on_together(spans):
    made = plan(spans, 5000)
    ends = [min(t + TILE, 5000) - 1 for t in range(0, 5000, TILE)]
    check_order(made.query_order, made.lo, made.hi, made.lo[:, ::TILE])
    check_order(made.key_order, made.query_lo, made.query_hi, made.query_hi[:, ends])


def check_order(order: Tensor, lo: Tensor, hi: Tensor, document: Tensor) -> None:
    """Every tile once; a document's side by side, the longest first, and documents by their longest."""
    n = lo.shape[1]
    assert (order.sort(dim=1).values == torch.arange(-(-n // TILE))).all()
    work = hi[:, [min(t + TILE, n) - 1 for t in range(0, n, TILE)]] - lo[:, ::TILE]
    for tiles, length, one in zip(order.long(), work, document, strict=True):
        runs = [len(list(run)) for _, run in itertools.groupby(one[tiles].tolist())]
        assert len(runs) == len(one.unique()), "a document's tiles are apart"
        lengths = [run.tolist() for run in length[tiles].split(runs)]
        assert all(run == sorted(run, reverse=True) for run in lengths)
        assert [run[0] for run in lengths] == sorted((run[0] for run in lengths), reverse=True)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: Spans.packed([3, -1]), "below 0"),
        (lambda: Spans.packed([[3], [4]]), r"\[3, 4\]"),
        (lambda: Spans.packed([3], causal=False, window=2), "causal=True"),
        (lambda: Spans.causal(3, window=0), "window=0"),
        (lambda: Spans.causal(9).with_blocks([(0, 4), (3, 5)]), r"\(3, 5\) overlaps"),
        (lambda: Spans.causal(9).with_blocks([(5, 10)]), "leaves the sequence of 9"),
        (lambda: Spans(torch.zeros(3), torch.zeros(3)), r"int32 \(rows, queries\)"),
        (lambda: Spans.causal(9) & Spans.full(1, 9), "spans of 9 and 1 queries"),
        (lambda: Spans.full(2, 9).check(8), "keys are 0 to 8"),
        (lambda: plan(Spans.full(2, 9), 8), "keys are 0 to 8"),
        (lambda: Spans(*torch.tensor([[[1, 0]], [[2, 2]]], dtype=torch.int32)).check(2), "lo falls after query 0"),
    ],
)
def test_what_is_no_span_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
