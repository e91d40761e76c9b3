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
    (rows, ceil(queries / TILE)) and key_order (rows, ceil(keys / TILE)): tiles, most work first, so that no
    long tile is left alone at the end.
    """

    lo: Tensor
    hi: Tensor
    query_lo: Tensor
    query_hi: Tensor
    query_order: Tensor
    key_order: Tensor


def plan(spans: Spans, keys: int) -> Plan:
    """The plan of ``spans`` over ``keys`` keys, on the spans' device, without a host sync."""
    transposed = spans.transpose(keys)
    lo, hi = spans.lo.contiguous(), spans.hi.contiguous()
    return Plan(lo, hi, transposed.lo, transposed.hi, _order(lo, hi), _order(transposed.lo, transposed.hi))


def row_stride(plan_rows: Tensor) -> int:
    """Elements from one batch row of a plan's tensor to the next: 0 where one row serves all."""
    return 0 if plan_rows.shape[0] == 1 else plan_rows.stride(0)


def heads_in_cache(walked_bytes: int, sharing: int, heads: int) -> int:
    """Of all ``heads`` (times batch) those to run side by side: as many as fit the L2 cache with what they walk along.

    ``sharing`` heads in a row walk along the same ``walked_bytes``.
    """
    return max(1, min(heads, sharing * max(1, CACHE_BYTES // max(1, walked_bytes))))


def _order(lo: Tensor, hi: Tensor) -> Tensor:
    """Tiles by the length of the range that any of their rows needs, longest first."""
    n = lo.shape[1]
    first = torch.arange(0, n, TILE, device=lo.device)
    last = (first + TILE - 1).clamp(max=n - 1)
    return (hi[:, last] - lo[:, first]).argsort(dim=1, descending=True, stable=True).to(torch.int32)
