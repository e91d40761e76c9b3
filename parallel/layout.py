"""Which positions of a sequence each rank of the ring holds: a layout is data, a short list of chunks in order."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ringspan.kernels.plan import TILE
from ringspan.kernels.spans import Spans
from ringspan.parallel import balance

Chunk = tuple[int, int]  # positions start <= p < stop


@dataclass(frozen=True)
class Layout:
    """``chunks[rank]``: the chunks of that rank in order; together they hold every position of ``length`` once.

    Shards are padded at their end to ``rows`` positions, so that any length has equal ones.
    """

    length: int
    chunks: tuple[tuple[Chunk, ...], ...]

    @staticmethod
    def contiguous(length: int, ranks: int) -> Layout:
        """One chunk a rank: the last rank does most of a causal mask's work."""
        return Layout(length, tuple((chunk,) for chunk in _cut(length, ranks)))

    @staticmethod
    def zigzag(length: int, ranks: int) -> Layout:
        """Rank r holds chunks r and 2 ranks - 1 - r of 2 ranks: equal causal work (Llama 3, arXiv 2407.21783)."""
        cuts = _cut(length, 2 * ranks)
        return Layout(length, tuple((cuts[rank], cuts[-1 - rank]) for rank in range(ranks)))

    @staticmethod
    def striped(length: int, ranks: int, block: int = 512) -> Layout:
        """Blocks of at most ``block`` positions dealt out in turn (Striped Attention, arXiv 2311.09431, in blocks).

        ValueError: ``block`` below 1.
        """
        if block < 1:
            raise ValueError(f"block={block}: a stripe holds at least 1 position")
        rounds = -(-length // (block * ranks)) or 1
        cuts = _cut(length, rounds * ranks)
        return Layout(length, tuple(tuple(cuts[rank::ranks]) for rank in range(ranks)))

    @staticmethod
    def balanced(spans: Spans, ranks: int, block: int = 256) -> Layout:
        """The one with the least lock-step work and keys on the wire for this mask (``balance.cost``): of the three
        above, or else searched for in blocks of ``block`` positions. ``spans`` are on the host, of whole rows.

        The same on every rank that asks, and never worse than the three. ValueError: ``block`` below 1.
        """
        if block < 1:
            raise ValueError(f"block={block}: a block holds at least 1 position")
        cost, n = functools.partial(balance.cost, spans), spans.queries
        if ranks == 1:
            return Layout.contiguous(n, 1)
        named = min((Layout.contiguous(n, ranks), Layout.zigzag(n, ranks), Layout.striped(n, ranks)), key=cost)
        if cost(named) <= (1 + balance.ENOUGH) * balance.least_cost(spans, ranks):
            return named
        found = balance.search(spans, ranks, block)
        return named if found is None else min(named, Layout(n, tuple(map(tuple, found))), key=cost)

    @property
    def ranks(self) -> int:
        return len(self.chunks)

    @property
    def rows(self) -> int:
        """Positions of a shard, padding included: the same on every rank."""
        return max(self.held(rank) for rank in range(self.ranks))

    def held(self, rank: int) -> int:
        """Positions of the rank's shard, without padding."""
        return self._sizes[rank]

    def positions(self, rank: int, rows: int | None = None) -> Tensor:
        """Global position of each row of the rank's shard, increasing: int64 (rows,); -1 is padding."""
        held = [torch.arange(start, stop) for start, stop in self.chunks[rank]]
        positions = torch.full((self.rows if rows is None else rows,), -1)
        positions[: self.held(rank)] = torch.cat(held)
        return positions

    def below(self, rank: int, bound: Tensor) -> Tensor:
        """How many of the rank's positions are below each bound: int32, like ``bound``, which is >= 0 and on the host.

        It makes positions local: of the keys ``lo <= k < hi``, the rank holds ``below(lo) <= row < below(hi)``.
        """
        start, size, before = self._edges[rank]
        chunk = torch.searchsorted(start, bound.contiguous(), out_int32=True) - 1
        return before[chunk] + torch.minimum(bound - start[chunk], size[chunk])

    def at(self, rank: int, row: Tensor) -> Tensor:
        """Position of each row of the rank's shard: int32, like ``row``, which is on the host."""
        start, _, before = self._edges[rank]
        chunk = torch.searchsorted(before, row, right=True, out_int32=True) - 1
        return start[chunk] + row - before[chunk]

    @functools.cached_property
    def _sizes(self) -> list[int]:
        return [sum(stop - start for start, stop in chunks) for chunks in self.chunks]

    @functools.cached_property
    def _edges(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each rank: its chunks' starts, sizes and the positions before them, int32, after one before all bounds."""
        found = []
        for chunks in self.chunks:
            edges = torch.tensor([(-1, -1), *(chunk for chunk in chunks if chunk[1] > chunk[0])], dtype=torch.int32)
            start, size = edges[:, 0].contiguous(), edges[:, 1] - edges[:, 0]
            found.append((start, size, size.cumsum(0, dtype=torch.int32) - size))
        return found

    @functools.cached_property
    def tiles(self) -> list[tuple[Tensor, Tensor]]:
        """Of each rank: (first, last) position of its shard's tiles, which end where a chunk does: int64 (tiles,)."""
        found = []
        for chunks in self.chunks:
            first = [torch.arange(start, stop, TILE) for start, stop in chunks]
            last = [(x + TILE - 1).clamp(max=stop - 1) for x, (_, stop) in zip(first, chunks, strict=True)]
            found.append((torch.cat(first), torch.cat(last)))
        return found

    def shard(self, x: Tensor, rank: int, dim: int, *, part: int = 0, parts: int = 1, fill: float = 0) -> Tensor:
        """The rank's rows of ``x`` along ``dim``, padded with ``fill``: the ``part``-th of ``parts`` slices of them."""
        if x.shape[dim] != self.length:
            raise ValueError(f"dim {dim} has {x.shape[dim]} positions, the layout {self.length}")
        mine = self.local_positions(rank, part, parts).to(x.device)
        taken = x.index_select(dim, mine.clamp(min=0)) if self.length else x.new_zeros(_sized(x, dim, len(mine)))
        padding = (mine < 0).view([-1 if d == dim % x.dim() else 1 for d in range(x.dim())])
        return taken.masked_fill(padding, fill)

    def unshard(self, shards: Sequence[Tensor], dim: int) -> Tensor:
        """The whole of what ``shard`` cut: all ranks' shards, each as its parts in order."""
        parts = len(shards) // self.ranks
        whole = shards[0].new_empty(_sized(shards[0], dim, self.length))
        for rank in range(self.ranks):
            local = torch.cat(list(shards[rank * parts : (rank + 1) * parts]), dim=dim)
            positions = self.positions(rank)
            held = positions[positions >= 0].to(local.device)
            whole.index_copy_(dim, held, local.narrow(dim, 0, len(held)))
        return whole

    def local_positions(self, rank: int, part: int = 0, parts: int = 1) -> Tensor:
        """Positions of the ``part``-th of ``parts`` equal slices of the rank's shard: int64, -1 is padding."""
        size = self.part_rows(parts)
        return self.positions(rank, size * parts)[part * size : (part + 1) * size]

    def part_rows(self, parts: int) -> int:
        """Rows of one of ``parts`` equal slices of a shard."""
        return -(-self.rows // parts)


LAYOUTS: dict[str, Callable[[int, int], Layout]] = {
    "contiguous": Layout.contiguous,
    "zigzag": Layout.zigzag,
    "striped": Layout.striped,
}


def _cut(length: int, n: int) -> list[Chunk]:
    """``n`` chunks that differ by one position at most; their edges are multiples of 256 where n * 256 divides."""
    edges = [length * i // n for i in range(n + 1)]
    return list(itertools.pairwise(edges))


def _sized(x: Tensor, dim: int, size: int) -> list[int]:
    shape = list(x.shape)
    shape[dim] = size
    return shape
