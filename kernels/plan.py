"""What a kernel needs to know of a mask, made once on the device and shared by all layers of a step."""

from typing import NamedTuple

import torch
from torch import Tensor

from ringspan.kernels.spans import Spans

# Keys and values, or queries and their gradients, that the heads in flight may hold together: an A100's L2 is 40 MiB,
# an H100's 50.
CACHE_BYTES = 32 * 2**20
TILE = 128  # rows of a tile in the work orders; block sizes of the kernels divide it or are multiples of it


class Plan(NamedTuple):
    """A mask as kernels read it: int32 tensors only. Rows are the batch, or 1 for all of it.

    lo, hi (rows, queries): keys of a query. query_lo, query_hi (rows, keys): queries of a key. query_order
    (rows, ceil(queries / TILE)) and key_order (rows, ceil(keys / TILE)): tiles in the order of work, see `_order`.
    """

    lo: Tensor
    hi: Tensor
    query_lo: Tensor
    query_hi: Tensor
    query_order: Tensor
    key_order: Tensor


def plan(spans: Spans, keys: int, device: torch.device | None = None) -> Plan:
    """The plan of ``spans`` over ``keys`` keys, on ``device`` (default: the spans'), without a host sync.

    ValueError: as of `Spans.within`.
    """
    spans = spans.within(keys)
    spans = spans if device is None else spans.to(device)
    transposed = spans.transpose(keys)
    lo, hi = spans.lo.contiguous(), spans.hi.contiguous()
    query_order = _order(*_reach(lo, hi), lo[:, ::TILE])
    first, last = _reach(transposed.lo, transposed.hi)
    return Plan(lo, hi, transposed.lo, transposed.hi, query_order, _order(first, last, last))


def row_stride(plan_rows: Tensor) -> int:
    """Elements from one batch row of a plan's tensor to the next: 0 where one row serves all."""
    return 0 if plan_rows.shape[0] == 1 else plan_rows.stride(0)


def heads_in_cache(walked_bytes: int, sharing: int, heads: int) -> int:
    """Of all ``heads`` (times batch) those to run side by side: as many as fit the L2 cache with what they walk along.

    ``sharing`` heads in a row walk along the same ``walked_bytes``.
    """
    return max(1, min(heads, sharing * max(1, CACHE_BYTES // max(1, walked_bytes))))


def _reach(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """The range that any row of a tile needs, (rows, tiles) each: bounds are monotone."""
    n = lo.shape[1]
    first = torch.arange(0, n, TILE, device=lo.device)
    return lo[:, first], hi[:, (first + TILE - 1).clamp(max=n - 1)]


def _order(lo: Tensor, hi: Tensor, document: Tensor) -> Tensor:
    """Tiles of a document together, and documents by their longest tile, longest first; so are a document's tiles.

    Neighbours are of one document where the end of their range that ``document`` gives is the same: they walk along the
    same rows, which is cheap while those are in the L2 cache. Sorted by length alone, equal documents of 1,024 tokens
    took twice the time in backward. Longest first, so that no long tile is left alone at the end.
    """
    work = (hi - lo).to(torch.int64)
    number = (document.diff(dim=1, prepend=document[:, :1]) != 0).cumsum(1)
    longest = torch.zeros_like(work).scatter_reduce(1, number, work, "amax").gather(1, number)
    by_work = work.argsort(dim=1, descending=True, stable=True)
    # Below 2^31 rows there are less than 2^24 tiles
    together = ((longest << 24) - number).gather(1, by_work).argsort(dim=1, descending=True, stable=True)
    return by_work.gather(1, together).to(torch.int32)
