"""Few queries against many keys, as in decoding: the keys are split over the GPU, and the parts merge by LSE.

Flash-Decoding (Dao, Haziza, Massa and Sizov, 2023). One program holds all query heads of a kv head, so that each key
is read once; what limits it is the memory's bandwidth.
"""

import functools
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringspan.kernels.launch import launch, processors
from ringspan.kernels.plan import Plan, row_stride
from ringspan.kernels.triton_forward import FLOOR, attend, merge_weights
from ringspan.kernels.triton_tiles import LN2, coefficients, split_range

MAX_QUERIES = 16
MAX_ROWS = 128  # queries x query heads of a kv head: a program holds them all
MIN_KEYS = 1024  # below, one kernel over all keys is as quick as a kernel over parts and one to merge them
MAX_SPLITS = 128  # one program merges the parts of a row
PROGRAMS = 2  # for each multiprocessor; on an H100 4 were 5 % slower, 8 more so
BLOCKS = 4  # of keys for each program, at least


@triton.jit(do_not_specialize=["queries", "keys", "kv_heads", "group", "splits", "stride_span"])
def split_kernel(
    q, k, v, part_out, part_lse, lo, hi,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_span, queries, keys, kv_heads, group, splits, inner, outer,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One part of the keys of one kv head: part_out (B, K, splits, BLOCK_M, D), part_lse (B, K, splits, BLOCK_M).

    Row r of BLOCK_M is query r // group under query head r % group of the kv head. Strides are in elements.
    """
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, kv_head = pair // kv_heads, pair % kv_heads
    lo += batch * stride_span
    hi += batch * stride_span
    k += batch * stride_kb + kv_head * stride_kh
    v += batch * stride_vb + kv_head * stride_vh

    row = tl.arange(0, BLOCK_M)
    inside = row < queries * group
    query = tl.minimum(row // group, queries - 1)
    column = tl.arange(0, BLOCK_D)
    place = query.to(tl.int64) * stride_qs + (kv_head * group + row % group) * stride_qh
    q_mask = inside[:, None] & (column < HEAD_DIM)[None, :]
    q_tile = tl.load(q + batch * stride_qb + place[:, None] + column[None, :], mask=q_mask, other=0.0)
    lows = tl.load(lo + query)
    highs = tl.minimum(tl.load(hi + query), keys)

    begin, left, full, blocks = split_range(lo, hi, 0, queries, keys, BLOCK_M, BLOCK_N)
    size = tl.cdiv(blocks, splits)
    first = tl.minimum(split * size, blocks)
    last = tl.minimum(first + size, blocks)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.range(first, tl.minimum(last, left)):
        acc, top, total = attend(
            acc, top, total, q_tile, k, v, stride_ks, stride_vs, begin + i * BLOCK_N, keys, lows, highs, inner, outer,
            HEAD_DIM, BLOCK_D, BLOCK_N, SOFTCAP, True,
        )  # fmt: skip
    for i in tl.range(tl.maximum(first, left), tl.minimum(last, left + full)):
        acc, top, total = attend(
            acc, top, total, q_tile, k, v, stride_ks, stride_vs, begin + i * BLOCK_N, keys, lows, highs, inner, outer,
            HEAD_DIM, BLOCK_D, BLOCK_N, SOFTCAP, False,
        )  # fmt: skip
    for i in tl.range(tl.maximum(first, left + full), last):
        acc, top, total = attend(
            acc, top, total, q_tile, k, v, stride_ks, stride_vs, begin + i * BLOCK_N, keys, lows, highs, inner, outer,
            HEAD_DIM, BLOCK_D, BLOCK_N, SOFTCAP, True,
        )  # fmt: skip

    some = total > 0
    safe_total = tl.where(some, total, 1.0)
    at = (pair * splits + split) * BLOCK_M + row
    tl.store(part_lse + at, tl.where(some, (top + tl.log2(safe_total)) * LN2, float("-inf")))
    target = part_out + at[:, None] * HEAD_DIM + column[None, :]
    tl.store(target, acc / safe_total[:, None], mask=(column < HEAD_DIM)[None, :])


@triton.jit(do_not_specialize=["queries", "heads", "group", "splits"])
def merge_kernel(
    part_out, part_lse, out, lse, before, queries, heads, group, splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """One row of out (B, S, H, D) and of lse (B, H, S) from its parts; MERGE: with `before` and lse."""
    pair, query = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = pair // heads, pair % heads
    part = tl.arange(0, SPLITS)
    there = part < splits
    column = tl.arange(0, BLOCK_D)
    at = ((batch * (heads // group) + head // group) * splits + part) * BLOCK_M + query * group + head % group
    part_lse = tl.load(part_lse + at, mask=there, other=float("-inf"))
    top = tl.maximum(tl.max(part_lse, 0), FLOOR)
    weights = tl.exp(part_lse - top)
    total = tl.sum(weights, 0)
    tile = part_out + at[:, None] * HEAD_DIM + column[None, :]
    parts = tl.load(tile, mask=there[:, None] & (column < HEAD_DIM)[None, :], other=0.0)
    acc = tl.sum(parts * weights[:, None], 0)
    row_lse = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
    place = pair * queries + query
    target = ((batch * queries + query) * heads + head) * HEAD_DIM + column
    if MERGE:
        keep, share, row_lse = merge_weights(total, row_lse, tl.load(lse + place))
        acc = acc * share + tl.load(before + target, mask=column < HEAD_DIM, other=0.0) * keep
    else:
        acc = acc / tl.where(total > 0, total, 1.0)
    tl.store(lse + place, row_lse)
    tl.store(out + target, acc.to(out.dtype.element_ty), mask=column < HEAD_DIM)


def is_short(q: Tensor, k: Tensor) -> bool:
    """Whether splitting the keys pays: few queries, many keys."""
    queries, rows = q.shape[1], q.shape[1] * (q.shape[2] // k.shape[2])
    return 0 < queries <= MAX_QUERIES and rows <= MAX_ROWS and k.shape[1] >= MIN_KEYS and q.numel() > 0


@functools.cache
def pick_splits(pairs: int, places: int, most: int) -> int:
    """Into how many parts the keys of each of ``pairs`` heads go, for a GPU that runs ``places`` programs at a time.

    The fewest of at most ``most`` with which the rounds of programs are full, to a twentieth: 64 heads by 5 on 264
    places would leave four fifths of a second round empty.
    """
    full = [pairs * n / (triton.cdiv(pairs * n, places) * places) for n in range(1, most + 1)]
    return next(n for n, share in enumerate(full, 1) if share >= 0.95 * max(full))


@functools.cache
def pick_blocks(rows: int, dim: int, element: int) -> tuple[int, int, int]:
    """BLOCK_D, BLOCK_M, BLOCK_N, for so many rows of queries and bytes an element."""
    block_d = max(32, triton.next_power_of_2(dim))
    return block_d, max(16, triton.next_power_of_2(rows)), max(16, min(128, 16384 // (block_d * element)))  # 16 KiB


def split_forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, out: Tensor, lse: Tensor, before: Tensor | None, *,
    scale: float, softcap: float,
) -> None:  # fmt: skip
    """Writes out (B, S, H, D) and lse (B, H, S), merged with ``before`` and lse if it is given."""
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    block_d, block_m, block_n = pick_blocks(queries * group, dim, q.element_size())
    most = min(MAX_SPLITS, triton.cdiv(keys, BLOCKS * block_n))
    splits = pick_splits(batch * kv_heads, PROGRAMS * processors(q.get_device()), most)
    parts = (batch, kv_heads, splits, block_m)
    part_lse = torch.empty(parts, device=q.device)
    part_out = torch.empty((*parts, dim), device=q.device)
    assert prod(parts) < 2**31, parts
    sizes = {"HEAD_DIM": dim, "BLOCK_D": block_d, "BLOCK_M": block_m}
    launch(
        split_kernel,
        (batch * kv_heads, splits),
        (
            q, k, v, part_out, part_lse, plan.lo, plan.hi, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            row_stride(plan.lo), queries, keys, kv_heads, group, splits, *coefficients(scale, softcap),
        ),
        {**sizes, "BLOCK_N": block_n, "SOFTCAP": bool(softcap)},
        q.get_device(),
        num_warps=4,
        num_stages=3,
    )  # fmt: skip
    launch(
        merge_kernel,
        (batch * heads, queries),
        (part_out, part_lse, out, lse, out if before is None else before, queries, heads, group, splits),
        {**sizes, "SPLITS": triton.next_power_of_2(splits), "MERGE": before is not None},
        q.get_device(),
        num_warps=4,
    )
