"""What a backward pass needs of each query row: delta, and lse as its kernels take it.

delta = rowsum(dout * out) - dlse in one pass: in plain PyTorch its fp32 products would be two copies of out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringspan.kernels.launch import launch
from ringspan.kernels.plan import TILE
from ringspan.kernels.triton_tiles import LOG2E

ROWS = 64  # of a program: 16 KiB of each input at head dim 128


@triton.jit
def delta_kernel(
    dout, out, dlse, delta, stride_db, stride_ds, stride_dh, queries, heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """delta and dlse (B, H, S) fp32; out (B, S, H, D) contiguous, dout with its strides in elements."""
    tiles = tl.cdiv(queries, ROWS)
    pair = tl.program_id(0) // tiles
    batch, head = pair // heads, pair % heads
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    inside = (row < queries)[:, None] & (column < HEAD_DIM)[None, :]
    wide = row.to(tl.int64)[:, None]
    dout += batch.to(tl.int64) * stride_db + head.to(tl.int64) * stride_dh
    out += (batch.to(tl.int64) * queries * heads + head) * HEAD_DIM
    x = tl.load(dout + wide * stride_ds + column[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(out + wide * heads * HEAD_DIM + column[None, :], mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(x * y, 1)
    place = (batch.to(tl.int64) * heads + head) * queries + row
    if HAS_DLSE:
        total -= tl.load(dlse + place, mask=row < queries, other=0.0)
    tl.store(delta + place, total, mask=row < queries)


def delta(dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    """``attention_delta`` for CUDA tensors of at most 32 bits."""
    batch, queries, heads, head_dim = out.shape
    result = torch.empty(batch, heads, queries, device=out.device)
    if result.numel() == 0:
        return result
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "ROWS": ROWS, "HAS_DLSE": dlse is not None,
    }  # fmt: skip
    arguments = (
        dout, out.contiguous(), result if dlse is None else dlse, result, *dout.stride()[:3], queries, heads,
    )  # fmt: skip
    launch(delta_kernel, (triton.cdiv(queries, ROWS) * batch * heads,), arguments, constants, out.get_device())
    return result


@triton.jit(do_not_specialize=["queries", "padded", "factor", "stride_head", "stride_row", "to_delta"])
def statistics_kernel(lse, delta, out, queries, padded, factor, stride_head, stride_row, to_delta, BLOCK: tl.constexpr):
    """See `statistics`. Strides of out are in elements; `to_delta`: from a row's lse to its delta."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = row < queries
    row_lse = tl.load(lse + head * queries + row, mask=real, other=float("-inf"))
    row_delta = tl.load(delta + head * queries + row, mask=real, other=0.0)
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2E)
    out += head * stride_head + row * stride_row
    tl.store(out, row_lse, mask=row < padded)
    tl.store(out + to_delta, row_delta * factor, mask=row < padded)


def statistics(lse: Tensor, delta: Tensor, factor: float, *, pairs: bool) -> Tensor:
    """(B * H, S, 2) of lse and delta (B, H, S) if ``pairs``, else (2, B * H, S); S is filled up to whole tiles.

    lse * log2(e), +inf where p must be 0 (a row has no key, or does not exist); and delta * ``factor``.
    """
    batch, heads, queries = lse.shape
    padded, all_heads = triton.cdiv(queries, TILE) * TILE, batch * heads
    shape = (all_heads, padded, 2) if pairs else (2, all_heads, padded)
    strides = (2 * padded, 2, 1) if pairs else (padded, 1, all_heads * padded)
    result = torch.empty(shape, device=lse.device)
    arguments = (lse, delta, result, queries, padded, factor, *strides)
    if result.numel() > 0:
        launch(statistics_kernel, (all_heads, triton.cdiv(padded, 1024)), arguments, {"BLOCK": 1024}, lse.get_device())
    return result
