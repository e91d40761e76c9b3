"""What a rank's plan says against the whole mask, pair by pair."""

import itertools
import random

import pytest
import torch

from ringspan.kernels.spans import Spans
from ringspan.parallel.layout import LAYOUTS, Layout
from ringspan.parallel.ring_plan import RingPlan, Runs, Step, plan_ring, read_steps

MASKS = {
    "causal": Spans.causal(1009),
    "full": Spans.full(600, 600),
    "window": Spans.causal(1500, window=90),
    "packed": Spans.packed([[3, 710, 1, 286], [500, 0, 0, 500]]),
    "blocks": Spans.causal(700).with_blocks([(100, 400)]),
    "padded": Spans.causal(640).padded(300, 310),
    "one": Spans.causal(1),
}


def seen(spans: Spans) -> torch.Tensor:
    """(rows, queries, queries) bool."""
    key = torch.arange(spans.queries)
    return (key >= spans.lo[:, :, None]) & (key < spans.hi[:, :, None])


def steps_of(ring_plan: RingPlan, layout: Layout, rank: int, parts: int = 1) -> list[Step]:
    q = torch.empty(int(ring_plan.table[1]), layout.part_rows(parts) * parts)
    return read_steps(ring_plan.table, ring_plan.data, q, rank, layout.ranks)


def rows_of(runs: Runs) -> torch.Tensor:
    return torch.cat([torch.arange(*run) for run in runs.edges] or [torch.arange(0)])


def random_layout(length: int, ranks: int, draw: random.Random) -> Layout:
    """Chunks of any size to any rank: shards of unequal lengths, some empty."""
    edges = sorted({0, length, *(draw.randrange(length + 1) for _ in range(6 * ranks))})
    owners = [draw.randrange(ranks) for _ in edges[1:]]
    held: list[list[tuple[int, int]]] = [[(0, 0)] for _ in range(ranks)]
    for chunk, owner in zip(itertools.pairwise(edges), owners, strict=True):
        held[owner].append(chunk)
    return Layout(length, tuple(map(tuple, held)))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("ranks, parts", [(1, 1), (2, 1), (4, 3), (5, 1)])
def test_the_steps_hold_every_pair_once_and_both_ends_agree(mask, ranks, parts):
    spans = MASKS[mask]
    pairs, draw = seen(spans), random.Random(0)
    layouts = [make(spans.queries, ranks) for make in LAYOUTS.values()]
    for layout in [*layouts, *(random_layout(spans.queries, ranks, draw) for _ in range(3))]:
        plans = [steps_of(plan_ring(spans, layout, r, parts=parts), layout, r, parts) for r in range(ranks)]
        assert len({tuple((s.owner - r) % ranks for s in steps) for r, steps in enumerate(plans)}) == 1
        found = torch.zeros_like(pairs, dtype=torch.int32)
        for rank, steps in enumerate(plans):
            mine = layout.positions(rank, layout.part_rows(parts) * parts)
            for number, step in enumerate(steps):
                theirs = layout.positions(step.owner, len(mine))[rows_of(step.keys)]
                key = torch.arange(len(theirs))
                local = (key >= step.plan.lo[:, :, None]) & (key < step.plan.hi[:, :, None]) if len(key) else None
                if local is not None:
                    row, q, k = local.nonzero(as_tuple=True)
                    assert (mine[q] >= 0).all()
                    assert (theirs[k] >= 0).all()
                    found.index_put_((row, mine[q], theirs[k]), torch.ones_like(q, dtype=torch.int32), accumulate=True)
                # what we are told to send at this step is what its reader waits for
                assert plans[step.reader][number].keys == step.sent or number == 0
        assert (found == pairs.int()).all()


def test_a_hop_that_no_rank_needs_is_no_step():
    def hops(spans, layout):
        plans = [steps_of(plan_ring(spans, layout, r), layout, r) for r in range(layout.ranks)]
        return {tuple((r - s.owner) % layout.ranks for s in steps) for r, steps in enumerate(plans)}

    assert hops(Spans.packed([256] * 4), Layout.contiguous(1024, 4)) == {(0,)}
    assert hops(Spans.causal(1024, window=100), Layout.contiguous(1024, 4)) == {(0, 1)}
    assert hops(Spans.causal(1024, window=300), Layout.contiguous(1024, 4)) == {(0, 1, 2)}
    assert hops(Spans.causal(1024), Layout.contiguous(1024, 4)) == {(0, 1, 2, 3)}


def test_keys_between_two_needed_runs_stay_where_they_are():
    """Rank 0 holds [0, 2048) and [4096, 6144), rank 1 the rest. Of rank 0's keys rank 1 needs the last 99 of each
    chunk, which rank 0 sends as two runs; rank 0 needs the last 99 of rank 1's first chunk."""
    layout = Layout(8192, (((0, 2048), (4096, 6144)), ((2048, 4096), (6144, 8192))))
    spans = Spans.causal(8192, window=100)
    first, second = (steps_of(plan_ring(spans, layout, r), layout, r)[1] for r in (0, 1))
    assert first.sent.edges == second.keys.edges == ((1949, 2048), (3997, 4096))
    assert second.sent.edges == first.keys.edges == ((1949, 2048),)


def test_runs_take_and_add_the_rows_they_name():
    x, runs = torch.arange(20.0).view(1, 10, 2), Runs(((1, 3), (7, 8)))
    part = runs.take(x)
    assert len(runs) == 3
    assert part.tolist() == x[:, [1, 2, 7]].tolist()
    assert part.is_contiguous()
    total = torch.zeros_like(x)
    runs.add(total, part)
    assert total.sum() == part.sum()
    assert (total[:, [1, 2, 7]] == part).all()
    assert runs.local(torch.tensor([0, 1, 2, 3, 7, 8, 10])).tolist() == [0, 0, 1, 2, 2, 3, 3]
    assert Runs(()).take(x).shape == (1, 0, 2)
