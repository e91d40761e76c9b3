"""How evenly a layout spreads a mask over a ring, and the search for one that does: on the host, alike on all ranks.

A ring is lock-step: at every hop all ranks wait for the slowest. So what counts is the sum over hops of the slowest
rank's tiles, not each rank's total: on packed documents, 8 ranks of a zigzag differ by half in total and lose more
than half their time.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import torch

from ringspan.kernels.plan import TILE
from ringspan.kernels.spans import Spans

if TYPE_CHECKING:
    from ringspan.parallel.layout import Layout

# What a tile of keys on the wire costs, in computed tiles. Attention slowed down by 5 % beside 64 MiB from the copy
# engine on H100, which is 2.7 tiles a tile of keys for 8 kv heads of 32; on 2 H200 the fit of docs/scaling.md sees
# nothing of it. It counts for little here: of layouts about as even, the one that sends less.
WIRE = 0.5
ENOUGH = 0.02  # of the least possible cost: a layout that is so near to it is not searched on
STEADY = 0.01  # lock-step imbalance at which the search is done
ROUNDS = 40  # of exchanges, from each start; three times as many from the best
PAIRS = 2**13  # looked at in a round, times ranks squared: the round takes as long for any number of ranks


def lockstep_imbalance(spans: Spans, layout: Layout, *, steps: bool = True) -> float:
    """How much longer a ring takes than its mean rank computes: 0.03 is 3 %. ``spans`` are on the host, of whole rows.

    The sum over hops of the slowest rank's tiles, over all tiles divided by the ranks, minus 1. Tiles are TILE x TILE,
    of a rank's queries and of an owner's keys, from the first to the last key that any of its queries needs. Without
    ``steps``, which all-gather attention has not, the slowest rank's total over the mean one's, minus 1.
    """
    tiles, _ = count_tiles(spans, layout)
    total = tiles.sum()
    longest = lockstep(tiles) if steps else tiles.sum(axis=1).max()
    return float(longest * layout.ranks / total - 1) if total else 0.0


def cost(spans: Spans, layout: Layout) -> float:
    """Lock-step tiles, and what its keys on the wire cost in tiles: what the choice between layouts goes by."""
    tiles, keys = count_tiles(spans, layout)
    np.fill_diagonal(keys, 0)
    return lockstep(tiles) + WIRE * lockstep(keys)


def least_cost(spans: Spans, ranks: int) -> float:
    """What no layout over the ranks goes below: all tiles shared evenly, and no key sent."""
    first = torch.arange(0, spans.queries, TILE)
    lo, hi = spans.lo[:, first], spans.hi[:, (first + TILE - 1).clamp(max=spans.queries - 1)]
    return float((-(-hi // TILE) - lo // TILE)[hi > lo].sum()) / ranks


def count_tiles(spans: Spans, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """(tiles, tiles of keys that they need), both float64 (ranks, ranks), by queries' rank and keys' owner."""
    ranges = [_tile_rows(layout, rank) for rank in range(layout.ranks)]
    reader = np.repeat(np.arange(layout.ranks), [len(first) for first, _ in ranges])
    first, last = (torch.cat(parts) for parts in zip(*ranges, strict=True))
    los, his = spans.lo[:, first], spans.hi[:, last]
    counts = []
    for owner in range(layout.ranks):
        lo, hi = layout.below(owner, los).numpy(), layout.below(owner, his).numpy()
        start, stop = lo // TILE, np.where(hi > lo, -(-hi // TILE), lo // TILE)
        counts.append([_by_reader(reader, stop - start, layout), _by_reader(reader, _new(reader, start, stop), layout)])
    tiles, keys = np.array(counts).transpose(1, 2, 0)
    return tiles, keys


def lockstep(counts: np.ndarray) -> float:
    """Sum over hops of the largest count of a rank, of (ranks, ranks), by reader and owner."""
    ranks = np.arange(len(counts))
    owners = (ranks - ranks[:, None]) % len(ranks)  # (hops, readers)
    return float(counts[ranks, owners].max(axis=1).sum())


def _tile_rows(layout: Layout, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the first and last row of each tile of the rank's shard."""
    held = layout.held(rank)
    first = torch.arange(0, held, TILE, dtype=torch.int32)
    return layout.at(rank, first), layout.at(rank, (first + TILE - 1).clamp(max=held - 1))


def _by_reader(reader: np.ndarray, counts: np.ndarray, layout: Layout) -> np.ndarray:
    return np.bincount(reader, weights=counts.sum(axis=0), minlength=layout.ranks)


def _new(reader: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Of each range (rows, tiles), how much no earlier range of its reader has, whatever the row."""
    apart = int(stop.max(initial=0)) + 1
    start, stop = ((x + reader * apart).T for x in (start, stop))  # (tiles, rows): sorted by reader
    order = np.argsort(start.ravel(), kind="stable")
    begin, end = start.ravel()[order], np.maximum.accumulate(stop.ravel()[order])
    fresh = np.empty_like(end)
    fresh[order] = np.clip(end - np.maximum(begin, np.concatenate([[0], end[:-1]])), 0, None)
    return fresh.reshape(start.shape).T


def search(spans: Spans, ranks: int, block: int) -> list[list[tuple[int, int]]] | None:
    """Chunks of each rank in the best layout found by blocks of ``block`` positions, of which every rank gets as many;
    what they leave of the length is cut into one last piece a rank. None: there are fewer blocks than ranks."""
    blocks = _Blocks(spans, ranks, block)
    if not blocks.n:
        return None
    starts = blocks.starts()
    costs = [blocks.cost(owner) for owner in starts]
    by_cost = sorted(range(len(starts)), key=lambda i: costs[i])
    steadiest = min(by_cost, key=lambda i: lockstep(blocks.tiles(starts[i])))
    tried = {*by_cost[:2], steadiest, *([0] if costs[0] < 1.5 * costs[by_cost[0]] else [])}  # 0: contiguous, least sent
    best = min((starts[by_cost[0]], *(blocks.improve(starts[i], ROUNDS) for i in sorted(tried))), key=blocks.cost)
    return blocks.chunks(min(best, blocks.improve(best, 3 * ROUNDS), key=blocks.cost))


class _Blocks:
    """The mask between blocks. ``n`` can be given to any rank; the last ``ranks`` are the pieces that stay in order.

    A block is ``cells`` of at most TILE positions, and work is counted in pairs of cells: tiles, where all is aligned.
    """

    def __init__(self, spans: Spans, ranks: int, block: int) -> None:
        self.ranks, self.length, self.cells = ranks, spans.queries, max(1, block // TILE)
        self.n = self.length // (block * ranks) * ranks
        done = self.n * block
        tail = [done + (self.length - done) * i // ranks for i in range(ranks + 1)]
        self.edges = np.concatenate([np.arange(self.n) * block, tail])
        size = -(-block // self.cells)
        start = np.minimum(self.edges[:-1, None] + np.arange(self.cells) * size, self.edges[1:, None]).ravel()
        stop = np.append(start[1:], self.length)
        real = stop > start
        lo, hi = spans.lo.numpy(), spans.hi.numpy()
        first, last = np.minimum(start, self.length - 1), np.maximum(stop - 1, 0)
        self.lo = np.searchsorted(stop, lo[:, first], side="right")  # cells of keys that each cell of queries needs
        self.hi = np.where(real & (hi[:, last] > lo[:, first]), np.searchsorted(start, hi[:, last]), self.lo)
        self.hi = np.maximum(np.maximum.accumulate(self.hi, axis=1), self.lo)
        cell = np.arange(len(start))
        self.seen_lo = np.stack([np.searchsorted(row, cell, side="right") for row in self.hi])
        self.seen_hi = np.stack([np.searchsorted(row, cell, side="right") for row in self.lo])
        self.total = float((self.hi - self.lo).sum())

    def held(self, owner: np.ndarray) -> np.ndarray:
        """Cells of each rank before each cell: int64 (cells + 1, ranks)."""
        one = np.zeros((len(owner) * self.cells + 1, self.ranks), np.int64)
        one[np.arange(1, len(one)), np.repeat(owner, self.cells)] = 1
        return one.cumsum(axis=0)

    def between(self, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(of each block's queries: cells of each rank's keys; of its keys: cells of each rank's queries)."""
        held = self.held(owner)
        needs, needed = held[self.hi] - held[self.lo], held[self.seen_hi] - held[self.seen_lo]
        by_block = (len(owner), self.cells, self.ranks)
        return needs.sum(axis=0).reshape(by_block).sum(1), needed.sum(axis=0).reshape(by_block).sum(1)

    def tiles(self, owner: np.ndarray) -> np.ndarray:
        needs, _ = self.between(owner)
        return _rows_of(owner, needs, self.ranks)

    def cost(self, owner: np.ndarray) -> float:
        needs, needed = self.between(owner)
        keys = _rows_of(owner, (needed > 0) * self.cells, self.ranks).T
        np.fill_diagonal(keys, 0)
        return lockstep(_rows_of(owner, needs, self.ranks)) + WIRE * lockstep(keys)

    def chunks(self, owner: np.ndarray) -> list[list[tuple[int, int]]]:
        found: list[list[tuple[int, int]]] = [[] for _ in range(self.ranks)]
        for start, stop, rank in zip(self.edges[:-1].tolist(), self.edges[1:].tolist(), owner.tolist(), strict=True):
            if found[rank] and found[rank][-1][1] == start:
                found[rank][-1] = (found[rank][-1][0], stop)
            else:
                found[rank].append((start, stop))
        return found

    def starts(self) -> list[np.ndarray]:
        """Owners of the blocks to begin from: contiguous, zigzag, stripes, and documents kept whole."""
        n, ranks, block = self.n, self.ranks, np.arange(self.n)
        fold = block * 2 * ranks // n
        dealt = [block * ranks // n, np.minimum(fold, 2 * ranks - 1 - fold)]
        width = 1
        while width * ranks <= n:
            dealt.append(block // width % ranks)
            width *= 2
        whole = [self.whole(share) for share in (0.125, 0.25, 1.0)]
        return [np.append(self.even(owner), np.arange(ranks)) for owner in (*dealt, *whole)]

    def even(self, owner: np.ndarray) -> np.ndarray:
        """As many blocks to each: what a rank has too many of, from its end, goes to those that have too few."""
        share = self.n // self.ranks
        spare = np.concatenate([np.flatnonzero(owner == rank)[share:] for rank in range(self.ranks)])
        lacks = share - np.minimum(share, np.bincount(owner, minlength=self.ranks))
        owner = owner.copy()
        owner[np.sort(spare)] = np.repeat(np.arange(self.ranks), lacks)
        return owner

    def whole(self, share: float) -> np.ndarray:
        """Documents of more than ``share`` of a rank's blocks are dealt out, block by block, there and back; the
        others, the most work first, go whole to the rank with the least work that has room."""
        n, ranks = self.n, self.ranks
        last = np.arange(self.cells - 1, n * self.cells, self.cells)
        begin = self.lo[:, last] // self.cells  # where the document of a block's last query begins
        edges = np.append(np.flatnonzero((np.diff(begin, axis=1, prepend=-1) != 0).any(axis=0)), n)
        work = np.append(0, (self.hi - self.lo).sum(axis=0).reshape(-1, self.cells).sum(axis=1)[:n].cumsum())
        documents = [(int(a), int(b), float(work[b] - work[a])) for a, b in itertools.pairwise(edges)]
        owner, room, load, dealt = np.empty(n, np.int64), np.full(ranks, n // ranks), np.zeros(ranks), 0
        for a, b, done in sorted(documents, key=lambda one: (one[1] - one[0] <= share * n / ranks, -one[2])):
            if b - a > share * n / ranks:
                fold = np.arange(dealt, dealt + b - a) % (2 * ranks)
                owner[a:b], dealt = np.minimum(fold, 2 * ranks - 1 - fold), (dealt + b - a) % (2 * ranks)
                taken = np.bincount(owner[a:b], minlength=ranks)
                room, load = room - taken, load + taken * done / (b - a)
            else:
                fits = np.where(room >= min(b - a, room.max()), load, np.inf)
                rank = int(fits.argmin())
                owner[a:b] = rank
                room[rank] -= b - a
                load[rank] += done
        return owner

    def improve(self, owner: np.ndarray, rounds: int) -> np.ndarray:
        """Exchange blocks between ranks, the best of some hundred pairs at a time, until it is even enough."""
        owner, ranks = owner.copy(), self.ranks
        needs, needed = self.between(owner)
        tiles = _rows_of(owner, needs, ranks)
        now = _unevenness(tiles[:, :, None])[0]
        n = int(np.clip(PAIRS // ranks**2, 32, 256))
        for turn, drawn in enumerate(np.random.default_rng(0).integers(self.n, size=(rounds, 2, n))):
            if lockstep(tiles) * ranks <= (1 + STEADY) * self.total:
                break
            a, b = drawn if turn % 4 == 3 else (self.slowest(owner, tiles, drawn[0]), drawn[1])
            apart = owner[a] != owner[b]
            a, b = a[apart], b[apart]
            move = np.zeros((ranks, len(a)), np.int64)  # a goes from its owner to b's, and b back
            at = np.arange(len(a))
            move[owner[a], at], move[owner[b], at] = -1, 1
            gain = (needs[a] - needs[b]).T + self.own(a, b) * move
            after = tiles[:, :, None] + move[:, None] * gain + (needed[a] - needed[b]).T[:, None] * move
            scores = _unevenness(after)
            best = int(scores.argmin()) if len(scores) else -1
            if best >= 0 and scores[best] < now:
                now, tiles, (one, other) = scores[best], after[:, :, best].copy(), (a[best], b[best])
                needs += (self.column(one) - self.column(other))[:, None] * move[:, best]
                needed += (self.row(one) - self.row(other))[:, None] * move[:, best]
                owner[one], owner[other] = owner[other], owner[one]
        return owner

    def slowest(self, owner: np.ndarray, tiles: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """Blocks of the slowest reader at the most uneven hop, and of the owner whose keys it has there."""
        ranks = np.arange(self.ranks)
        hops = tiles[ranks, (ranks - ranks[:, None]) % self.ranks]
        hop = int((hops.max(axis=1) - hops.mean(axis=1)).argmax())
        slow = int(hops[hop].argmax())
        theirs = np.flatnonzero((owner[: self.n] == slow) | (owner[: self.n] == (slow - hop) % self.ranks))
        return theirs[drawn % len(theirs)]

    def own(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Of pairs of blocks: cells in a with a and in b with b, less those of a with b and of b with a."""
        queries, keys = np.concatenate([a, b, a, b]), np.concatenate([a, b, b, a])
        cells, start = queries[:, None] * self.cells + np.arange(self.cells), (keys * self.cells)[:, None]
        reach = np.minimum(self.hi[:, cells], start + self.cells) - np.maximum(self.lo[:, cells], start)
        aa, bb, ab, ba = np.maximum(reach, 0).sum(axis=(0, 2)).reshape(4, -1)
        return aa + bb - ab - ba

    def column(self, b: int) -> np.ndarray:
        """Of every block's queries, cells of the keys of b."""
        start = b * self.cells
        reach = np.minimum(self.hi, start + self.cells) - np.maximum(self.lo, start)
        return np.maximum(reach, 0).sum(axis=0).reshape(-1, self.cells).sum(axis=1)

    def row(self, a: int) -> np.ndarray:
        """Of every block's keys, cells of the queries of a."""
        start = a * self.cells
        reach = np.minimum(self.seen_hi, start + self.cells) - np.maximum(self.seen_lo, start)
        return np.maximum(reach, 0).sum(axis=0).reshape(-1, self.cells).sum(axis=1)


def _rows_of(owner: np.ndarray, counts: np.ndarray, ranks: int) -> np.ndarray:
    """(blocks, ranks) -> float64 (ranks, ranks): sums over the blocks of each owner."""
    return np.stack([np.bincount(owner, weights=column, minlength=ranks) for column in counts.T], axis=1)


def _unevenness(tiles: np.ndarray) -> np.ndarray:
    """What the search makes small, of (ranks, ranks, pairs): lock-step tiles, and a little of what they hide."""
    ranks = np.arange(len(tiles))
    hops = tiles[ranks, (ranks - ranks[:, None]) % len(ranks)]  # (hops, readers, pairs)
    return hops.max(axis=1).sum(axis=0) + 1e-3 * np.sqrt(np.einsum("ijp,ijp->p", tiles, tiles))
