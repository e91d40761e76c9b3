"""Masks as spans: query q attends to the keys lo[q] <= k < hi[q], with lo and hi non-decreasing along the queries.

Causal, full, windowed, packed, padded and prefix masks are all of this form, and so are their transpose and every
shard of them whose queries and keys stay in order. It costs two int32 a query.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

Lengths = Sequence[int] | Sequence[Sequence[int]]
Blocks = Sequence[tuple[int, int]] | Sequence[Sequence[tuple[int, int]]]


@dataclass(frozen=True)
class Spans:
    """Keys of each query: ``lo`` and ``hi`` are int32 (rows, queries); rows is the batch, or 1 for all of it.

    A row with lo >= hi sees no key. Positions are those of the whole sequence until ``shard`` makes them local.
    """

    lo: Tensor
    hi: Tensor

    def __post_init__(self) -> None:
        for name, bound in (("lo", self.lo), ("hi", self.hi)):
            if bound.dim() != 2 or bound.dtype != torch.int32:
                raise ValueError(
                    f"{name} is {bound.dtype} of shape {tuple(bound.shape)}: spans are int32 (rows, queries)"
                )
        if self.lo.shape != self.hi.shape:
            raise ValueError(f"lo {tuple(self.lo.shape)} and hi {tuple(self.hi.shape)} differ in shape")

    @property
    def rows(self) -> int:
        return self.lo.shape[0]

    @property
    def queries(self) -> int:
        return self.lo.shape[1]

    @staticmethod
    def causal(queries: int, keys: int | None = None, window: int | None = None) -> Spans:
        """The last query sees the last key; ``window``: of those, only the last so many keys."""
        keys = queries if keys is None else keys
        hi = torch.arange(1, queries + 1) + (keys - queries)
        return _windowed(torch.zeros_like(hi)[None], hi[None], window)

    @staticmethod
    def full(queries: int, keys: int) -> Spans:
        """Every query sees every key."""
        lo = torch.zeros(1, queries, dtype=torch.int32)
        return Spans(lo, torch.full_like(lo, keys))

    @staticmethod
    def packed(lengths: Lengths, causal: bool = True, window: int | None = None) -> Spans:
        """Documents one after the other, blind to each other. Nested lists give each batch row its own documents.

        ValueError: a length below 0, rows of different sums, or a window without ``causal``.
        """
        if window is not None and not causal:
            raise ValueError(f"window={window} counts keys back from the query: it needs causal=True")
        nested = [list(cast(Sequence[int], row)) for row in lengths] if _is_nested(lengths) else [list(lengths)]
        if any(cast(int, n) < 0 for row in nested for n in row):
            raise ValueError("a document's length is below 0")
        sums = [sum(cast(list[int], row)) for row in nested]
        if len(set(sums)) != 1:
            raise ValueError(f"the documents of the rows sum to {sums}: every row needs the same number of tokens")
        bounds = [_document_bounds(torch.tensor(row, dtype=torch.int64)) for row in nested]
        start, stop = (torch.stack(parts) for parts in zip(*bounds, strict=True))
        hi = torch.arange(1, sums[0] + 1).expand_as(stop) if causal else stop
        return _windowed(start, hi, window)

    @staticmethod
    def from_mask(mask: Tensor | Iterable[Tensor]) -> Spans:
        """The spans that are exactly ``mask``: bool (rows, queries, keys), True where a query sees a key.

        It may come as blocks of queries, one after the other, so that it is never whole. Reads the values: a host sync
        on a GPU. ValueError: no spans are that mask, and of the first such query why.
        """
        edges = [_edges(block) for block in ([mask] if isinstance(mask, Tensor) else mask)]
        first, stop, seen, keys = (torch.cat(parts, dim=1) for parts in zip(*edges, strict=True))
        # The tightest bounds that never fall; a query that sees nothing takes its neighbours', which may not work out
        lo = first.where(seen > 0, keys).flip(1).cummin(dim=1).values.flip(1)
        hi = stop.where(seen > 0, 0).cummax(dim=1).values
        wrong = torch.where(seen > 0, (lo != first) | (hi != stop) | (stop - first != seen), lo < hi).nonzero()
        if len(wrong):
            row, query = wrong[0].tolist()
            raise ValueError(_why_no_span(row, query, *(int(x[row, query]) for x in (first, stop, seen))))
        return Spans(lo.to(torch.int32), hi.to(torch.int32))

    def with_blocks(self, blocks: Blocks) -> Spans:
        """Inside each block ``(start, end)`` every query sees the whole block: prefixes, images, video frames.

        Nested lists give each row its own blocks. ValueError: blocks that overlap or leave the sequence.
        """
        nested = cast(Sequence[Sequence[tuple[int, int]]], blocks if _is_nested(blocks, depth=2) else [blocks])
        if len(nested) not in (1, self.rows) and self.rows != 1:
            raise ValueError(f"blocks for {len(nested)} rows, but the spans have {self.rows}")
        rows = max(len(nested), self.rows)
        lo, hi = self.lo.expand(rows, -1).clone(), self.hi.expand(rows, -1).clone()
        for row in range(rows):
            done = 0
            for start, end in sorted(nested[row % len(nested)]):
                if not done <= start <= end <= self.queries:
                    raise ValueError(
                        f"block ({start}, {end}) overlaps another or leaves the sequence of {self.queries}"
                    )
                lo[row, start:end].clamp_(max=start)
                hi[row, start:end].clamp_(min=end)
                done = end
        return Spans(lo, hi)

    def padded(self, start: int | Sequence[int], end: int | Sequence[int]) -> Spans:
        """Keys outside ``start <= k < end`` are padding that nobody sees; a list gives each row its own bounds."""
        first, last = (torch.as_tensor(x, dtype=torch.int32, device=self.lo.device).view(-1, 1) for x in (start, end))
        return Spans(*torch.broadcast_tensors(self.lo.maximum(first), self.hi.minimum(last)))

    def __and__(self, other: Spans) -> Spans:
        """Keys that both see: a span again. ValueError: they are of unlike numbers of queries."""
        if self.queries != other.queries:
            raise ValueError(f"spans of {self.queries} and {other.queries} queries: only those of one length intersect")
        return Spans(self.lo.maximum(other.lo), self.hi.minimum(other.hi))

    def shard(self, query_positions: Tensor, key_positions: Tensor) -> Spans:
        """The same mask between some of the queries and some of the keys, in the keys' local numbering.

        Both are int64 (n,), increasing; -1 marks padding at the end: such queries see nothing, such keys are unseen.
        """
        keys = key_positions[key_positions >= 0].to(torch.int32)
        real = query_positions[query_positions >= 0]
        lo, hi = (_count_below(keys, bound[:, real]) for bound in (self.lo, self.hi))
        padding = len(query_positions) - len(real)
        # Padding rows take the last bound, so that both stay monotone and no tile grows because of them.
        last = hi[:, -1:] if len(real) else hi.new_zeros(self.rows, 1)
        return Spans(*(torch.cat([bound, last.expand(-1, padding)], dim=1) for bound in (lo.minimum(last), hi)))

    def transpose(self, keys: int) -> Spans:
        """The queries of each key, as spans over ``keys`` rows: what the backward pass walks along."""
        key = torch.arange(keys, dtype=torch.int32, device=self.lo.device).expand(self.rows, keys).contiguous()
        return Spans(
            torch.searchsorted(self.hi.contiguous(), key, right=True, out_int32=True),
            torch.searchsorted(self.lo.contiguous(), key, right=True, out_int32=True),
        )

    def check(self, keys: int) -> Spans:
        """Itself, if it is a valid mask over ``keys`` keys; else ValueError. Reads the values: a host sync on a GPU."""
        for name, bound in (("lo", self.lo), ("hi", self.hi)):
            falls = bound[:, 1:] < bound[:, :-1]
            if bool(falls.any()):
                row, query = falls.nonzero()[0].tolist()
                raise ValueError(
                    f"{name} falls after query {query} of row {row}: not a union of spans. Sort the queries, "
                    "or give disjoint spans as a list"
                )
            if bool(((bound[:, :1] < 0) | (bound[:, -1:] > keys)).any()):  # neither ever falls
                raise ValueError(f"{name} reaches from {int(bound.min())} to {int(bound.max())}: keys are 0 to {keys}")
        return self

    def within(self, keys: int) -> Spans:
        """Itself. ValueError: it is no valid mask over the keys, past which kernels would read. On a GPU, where the
        host could only tell by waiting, CUDA's own assertion ends the process; a compiler knows no values."""
        if is_known(self.hi):
            return self.check(keys)
        if self.hi.is_cuda and not torch.compiler.is_compiling():
            inside = ~((self.lo[:, :1] < 0) | (self.hi[:, -1:] > keys)).any()
            torch._assert_async(inside, f"a mask reaches past the {keys} keys")
        return self

    def pairs(self) -> Tensor:
        """Number of (query, key) pairs that are attended to: int64 (rows,)."""
        return (self.hi - self.lo).clamp(min=0).sum(dim=1, dtype=torch.int64)

    def to(self, device: torch.device | str) -> Spans:
        return Spans(self.lo.to(device), self.hi.to(device))


def is_known(bound: Tensor) -> bool:
    """Whether its values can be looked at for nothing: on a GPU only a sync could tell, and a compiler knows none."""
    return bound.device.type == "cpu" and not torch.compiler.is_compiling()


def _is_nested(values: Sequence[object], depth: int = 1) -> bool:
    return len(values) > 0 and isinstance(values[0], Sequence) and (depth == 1 or _holds_sequences(values))


def _holds_sequences(values: Sequence[object]) -> bool:
    return all(not row or isinstance(cast(Sequence[object], row)[0], Sequence) for row in values)


def _edges(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each query, int64 (rows, queries): the first key that it sees, the one after the last, how many, all keys."""
    if mask.dim() != 3 or mask.dtype != torch.bool:
        raise ValueError(f"a mask of {mask.dtype}, shape {tuple(mask.shape)}: it is bool (rows, queries, keys)")
    seen = mask.sum(dim=2)
    keys = torch.full_like(seen, mask.shape[2])
    if not mask.numel():
        return seen, seen, seen, keys
    bits = mask.to(torch.uint8)  # argmax takes the first of equals, and no bool
    return bits.argmax(dim=2), keys - bits.flip(2).argmax(dim=2), seen, keys


def _why_no_span(row: int, query: int, first: int, stop: int, seen: int) -> str:
    """What stands in the way at one query, whose keys are not those that spans would give it."""
    if not seen:
        what = "sees no key, although a query before it and one after it share some"
    elif seen < stop - first:
        what = f"sees {seen} keys between {first} and {stop - 1}, not all of them"
    else:
        what = f"sees keys {first} to {stop - 1}, and an earlier or later one reaches past that"
    return (
        f"the mask of row {row} is no span: query {query} {what}. A query sees one run of keys, whose first and last "
        "never fall from one query to the next; disjoint spans are given to `attention` as a list"
    )


def _document_bounds(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Where the document of each token starts and stops."""
    stop = lengths.cumsum(0)
    return (stop - lengths).repeat_interleave(lengths), stop.repeat_interleave(lengths)


def _windowed(lo: Tensor, hi: Tensor, window: int | None) -> Spans:
    if window is not None and window < 1:
        raise ValueError(f"window={window}: a query sees at least one key, itself")
    hi = hi.clamp(min=0)
    if window is not None:
        lo = lo.maximum(hi - window)
    return Spans(lo.to(torch.int32).contiguous(), hi.to(torch.int32).contiguous())


def _count_below(keys: Tensor, bound: Tensor) -> Tensor:
    return torch.searchsorted(keys, bound.contiguous(), out_int32=True)
