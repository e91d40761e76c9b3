"""What each step of a ring needs, made on the host once a micro-batch and shared by all layers: whose keys, which of
them, what others need of ours, and the mask between."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ringspan.kernels.plan import TILE, Plan, plan
from ringspan.kernels.spans import Spans
from ringspan.parallel.layout import Layout

_ALIGN = 32  # int32 of data that a plan's tensors start at multiples of: 128 bytes, a line of cache
_GAP = 256  # keys that nobody needs travel along where fewer lie between two runs: a copy of its own costs more
_MOST_RUNS = 16  # of one step


class RingPlan(NamedTuple):
    """All steps of one rank's ring for one mask.

    Two tensors, so that operators take it as it is and torch.compile sees shapes, not values: ``table`` int64 on the
    host (``_Row``: a header, then the steps), and ``data`` int32 on the device, the plans of the steps end to end.
    """

    table: Tensor
    data: Tensor

    def to(self, device: torch.device | str) -> RingPlan:
        """On ``device``, in one copy."""
        return RingPlan(self.table, to_device(self.data, device))


@dataclass(frozen=True)
class Runs:
    """Rows of a shard that a step is about: runs ``start <= row < stop``, ascending and apart; few, and often one."""

    edges: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        """Rows in all."""
        return self._rows

    @cached_property
    def _rows(self) -> int:
        return sum(stop - start for start, stop in self.edges)

    def take(self, x: Tensor) -> Tensor:
        """These rows of x (batch, rows, ...), one after the other and contiguous; x itself where they are all of it."""
        parts = [x[:, start:stop] for start, stop in self.edges] or [x[:, :0]]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).contiguous()

    def add(self, total: Tensor, part: Tensor) -> None:
        """``part``, rows in the order of ``take``, is added to those rows of ``total``."""
        at = 0
        for start, stop in self.edges:
            total[:, start:stop] += part[:, at : at + stop - start]
            at += stop - start

    def local(self, bound: Tensor) -> Tensor:
        """How many of these rows are below each bound, like ``bound``: local positions of ``take``'s rows."""
        return sum((bound.clamp(start, stop) - start for start, stop in self.edges), torch.zeros_like(bound))


class Step(NamedTuple):
    """One step as the ring runs it. The first is always the rank's own keys, all of them. A hop that no rank of the
    ring needs is no step; the others are steps of every rank, in one order, also of one that needs or sends nothing."""

    owner: int  # whose keys these are
    reader: int  # who needs ours meanwhile
    keys: Runs  # of the owner's shard
    sent: Runs  # of our shard
    plan: Plan  # of our queries and ``keys.take`` of the owner's


def plan_ring(spans: Spans, layout: Layout, rank: int, *, parts: int = 1) -> RingPlan:
    """The ring's steps for ``rank``, from host spans in global positions; ``parts``: ulysses ranks a shard is cut for.

    ValueError: spans that are not over the layout's positions.
    """
    mine, size, ranks = local_bounds(spans, layout, rank), layout.part_rows(parts) * parts, layout.ranks
    needs = _Needs(spans, layout)
    steps, runs, data, offset = [], [], [], 0
    for hop in needs.hops():
        owner, reader = (rank - hop) % ranks, (rank + hop) % ranks
        keys = Runs(((0, size),)) if hop == 0 else needs.runs(rank, owner)  # our own keys are here anyway
        sent = Runs(()) if hop == 0 else needs.runs(reader, rank)
        steps.append(_Row(hop, len(keys.edges), len(sent.edges), offset))
        runs += [*keys.edges, *sent.edges]
        if len(keys):
            lo, hi = (keys.local(layout.below(owner, bound)) for bound in mine)
            packed = pack_plan(*plan(padded(lo, hi, size), len(keys)))
            data.append(packed)
            offset += len(packed)
    table = [ranks, spans.rows, len(steps), *(x for row in steps for x in row), *(x for run in runs for x in run)]
    return RingPlan(torch.tensor(table, dtype=torch.int64), torch.cat(data))


def check_fit(data: Tensor, planned: tuple[int, int, int], q: Tensor, ranks: int) -> None:
    """ValueError: the plan is for so many other (ranks, batch rows, rows of a shard), or not where q is."""
    of_ranks, batch_rows, rows = planned
    if of_ranks != ranks:
        raise ValueError(f"the plan is for a ring of {of_ranks} ranks, the group has {ranks}")
    if rows != q.shape[1]:
        raise ValueError(f"the plan is for shards of {rows} rows, these have {q.shape[1]}")
    if batch_rows not in (1, len(q)):
        raise ValueError(
            f"the plan is for a batch of {batch_rows}, and this one of {len(q)}: give each its mask, or all one"
        )
    if data.device != q.device:
        raise ValueError(f"the plan is on {data.device} and q on {q.device}: give plan.to(q.device)")


def read_steps(table: Tensor, data: Tensor, q: Tensor, rank: int, ranks: int) -> list[Step]:
    """The steps of a plan for shards like q, their plans views of ``data``. ValueError: as of `check_fit`."""
    planned, batch_rows, n, *rest = table.tolist()
    width = len(_Row._fields)
    flat = rest[n * width :]
    edges = list(zip(flat[::2], flat[1::2], strict=True))
    queries = edges[0][1]  # the rank's own keys come first, all of them
    check_fit(data, (planned, batch_rows, queries), q, ranks)
    steps = []
    for row in (_Row(*rest[i * width : (i + 1) * width]) for i in range(n)):
        keys, edges = Runs(tuple(edges[: row.keys])), edges[row.keys :]
        sent, edges = Runs(tuple(edges[: row.sent])), edges[row.sent :]
        one = unpack_plan(data, row.offset, batch_rows, queries, len(keys)) if len(keys) else [data[:0]] * 6
        steps.append(Step((rank - row.hop) % ranks, (rank + row.hop) % ranks, keys, sent, Plan(*one)))
    return steps


class _Row(NamedTuple):
    """A step in ``table``, after its header (ranks, batch rows, steps) and before all steps' runs, end to end."""

    hop: int  # owner is rank - hop, reader rank + hop
    keys: int  # runs
    sent: int  # runs
    offset: int  # of the step's plan in ``data``


class _Needs:
    """Which keys each rank needs of each other, by tiles of queries: computed alike on all ranks, from 1/128 of the
    mask. What a tile needs is the range from its first row's ``lo`` to its last row's ``hi``, as kernels walk it."""

    def __init__(self, spans: Spans, layout: Layout) -> None:
        self.layout = layout
        self.bounds = [(spans.lo[:, first], spans.hi[:, last]) for first, last in layout.tiles]

    def runs(self, reader: int, owner: int) -> Runs:
        """Rows of the owner's shard that the reader needs."""
        lo, hi = (self.layout.below(owner, bound).flatten() for bound in self.bounds[reader])
        seen = (hi > lo).nonzero()[:, 0]
        lo, order = lo[seen].sort(stable=True)
        if not len(lo):
            return Runs(())
        reach = hi[seen][order].cummax(0).values
        gaps = lo[1:] - reach[:-1]
        widest = gaps.sort(descending=True).values[: _MOST_RUNS - 1]
        least = max(_GAP, int(widest[-1])) if len(widest) else _GAP
        cuts = (gaps >= least).nonzero()[:, 0][: _MOST_RUNS - 1]
        starts, stops = torch.cat([lo[:1], lo[cuts + 1]]), torch.cat([reach[cuts], reach[-1:]])
        return Runs(tuple(zip(starts.tolist(), stops.tolist(), strict=True)))

    def hops(self) -> list[int]:
        """Those that some rank needs, and 0, where the rank's own keys are."""
        ranks = self.layout.ranks
        reader = torch.arange(ranks).repeat_interleave(torch.tensor([lo.shape[1] for lo, _ in self.bounds]))
        lo, hi = (torch.cat(parts, dim=1) for parts in zip(*self.bounds, strict=True))
        needed = torch.zeros(ranks, dtype=torch.bool)
        needed[0] = True
        for owner in range(ranks):
            seen = (self.layout.below(owner, hi) > self.layout.below(owner, lo)).any(dim=0)
            needed[(reader[seen] - owner) % ranks] = True
        return needed.nonzero()[:, 0].tolist()


def local_bounds(spans: Spans, layout: Layout, rank: int) -> tuple[Tensor, Tensor]:
    """(lo, hi) of the rank's queries, in global positions. ValueError: spans that are no mask over the layout's."""
    if spans.queries != layout.length:
        raise ValueError(f"the spans have {spans.queries} queries, the layout {layout.length} positions")
    spans.check(layout.length)
    lo, hi = (torch.cat([x[:, a:b] for a, b in layout.chunks[rank]], dim=1) for x in (spans.lo, spans.hi))
    return lo, hi


def padded(lo: Tensor, hi: Tensor, size: int) -> Spans:
    """Spans of ``size`` rows: those of padding take the last bound, so that both stay monotone and no tile grows."""
    last = hi[:, -1:] if hi.shape[1] else hi.new_zeros(len(hi), 1)
    padding = last.expand(-1, size - hi.shape[1])
    return Spans(torch.cat([lo.minimum(last), padding], dim=1), torch.cat([hi, padding], dim=1))


def pack_plan(*tensors: Tensor) -> Tensor:
    """One flat tensor, in which each starts at a multiple of _ALIGN."""
    return torch.cat([torch.nn.functional.pad(x.flatten(), (0, -x.numel() % _ALIGN)) for x in tensors])


def unpack_plan(data: Tensor, at: int, batch_rows: int, queries: int, keys: int, first: int = 0) -> list[Tensor]:
    """The tensors of the plan at an offset, after one of ``first`` numbers if there is one: views of data."""
    tensors = [data[at : at + first]] if first else []
    at += first + -first % _ALIGN
    for n in (queries, queries, keys, keys, -(-queries // TILE), -(-keys // TILE)):
        tensors.append(data[at : at + batch_rows * n].view(batch_rows, n))
        at += batch_rows * n + (-batch_rows * n) % _ALIGN
    return tensors


def to_device(data: Tensor, device: torch.device | str) -> Tensor:
    """A copy that the host does not wait for."""
    pinned = data.pin_memory() if torch.device(device).type == "cuda" else data
    return pinned.to(device, non_blocking=True)
