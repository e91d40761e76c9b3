"""The forward kernel: one program a block of query rows of one head; online softmax over the keys that they need.

Dao, FlashAttention-2 (arXiv 2307.08691). Merging with earlier blocks happens in the epilogue, in fp32.
"""

import triton
import triton.language as tl

from ringspan.kernels.triton_tiles import (
    LN2,
    LOG2E,
    dot,
    load_spans,
    load_tile,
    locate,
    split_range,
    tanh,
    tile_mask,
    tile_pointers,
)

# The running maximum starts here, not at -inf: -inf - -inf is NaN, and a masked score's exp2(-inf - FLOOR) is 0.
FLOOR: tl.constexpr = tl.constexpr(-1.0e30)


@triton.jit
def attend(
    acc, top, total, q, k, v, stride_ks, stride_vs, key, keys, lows, highs, inner, outer,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    KEEP_OFFSETS: tl.constexpr = False,
):  # fmt: skip
    """One block of keys: rescale what is there, add the block's share."""
    k_tile = load_tile(k, stride_ks, key, keys, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED, KEEP_OFFSETS)
    scores = dot(q, tl.trans(k_tile), None)
    if SOFTCAP:
        scores = tanh(scores * inner, q.dtype == tl.float32)
    if MASKED:
        index = key + tl.arange(0, BLOCK_N)
        seen = (index[None, :] >= lows[:, None]) & (index[None, :] < highs[:, None])
        scores = tl.where(seen, scores * outer, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
    else:
        new_top = tl.maximum(top, tl.max(scores, 1) * outer)  # outer >= 0: one fused multiply-add an element
        p = tl.exp2(scores * outer - new_top[:, None])
    rescale = tl.exp2(top - new_top)
    total = total * rescale + tl.sum(p, 1)
    v_tile = load_tile(v, stride_vs, key, keys, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED, KEEP_OFFSETS)
    acc = dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None])
    return acc, new_top, total


@triton.jit
def merge_weights(total, block_lse, before_lse):
    """(weight of what was there, weight of acc, lse of both); rows without keys stay what they were, to the bit."""
    some = total > 0
    top = tl.maximum(before_lse, block_lse)
    top = tl.where(top == float("-inf"), 0.0, top)
    before = tl.exp2((before_lse - top) * LOG2E)
    block = tl.exp2((block_lse - top) * LOG2E)
    both = tl.where(some, before + block, 1.0)
    lse = tl.where(some, top + tl.log(both), before_lse)
    return tl.where(some, before / both, 1.0), block / (both * tl.where(some, total, 1.0)), lse


@triton.jit(do_not_specialize=["queries", "keys", "pairs", "heads", "group", "chunk", "stride_span", "stride_order"])
def forward_kernel(
    q, k, v, out, lse, before, lo, hi, order,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_span, stride_order, queries, keys, pairs, heads, group, chunk, inner, outer,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KEEP_OFFSETS: tl.constexpr, SOFTCAP: tl.constexpr, MERGE: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """out (B, S, H, D) contiguous, lse (B, H, S); MERGE: with `before` and lse, where `before` is out if IN_PLACE.

    queries are S, pairs B * H, heads H, group H / kv heads. Strides are in elements, by batch, position and head;
    stride_span and stride_order are 0 where one row of the plan serves all of the batch.
    """
    row, batch, head = locate(order, stride_order, queries, pairs, heads, chunk, BLOCK_M)
    if row >= queries:
        return
    wide_batch = batch.to(tl.int64)
    lo += wide_batch * stride_span
    hi += wide_batch * stride_span
    begin, left, full, blocks = split_range(lo, hi, row, queries, keys, BLOCK_M, BLOCK_N)
    if IN_PLACE and blocks == 0:
        return  # a ring's block that has no key for these rows: nothing to read or write
    q += wide_batch * stride_qb + head.to(tl.int64) * stride_qh
    k += wide_batch * stride_kb + (head // group).to(tl.int64) * stride_kh
    v += wide_batch * stride_vb + (head // group).to(tl.int64) * stride_vh

    q_tile = load_tile(q, stride_qs, row, queries, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    lows, highs = load_spans(lo, hi, row, queries, keys, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.range(0, blocks - full):
        key = begin + tl.where(i < left, i, i + full) * BLOCK_N
        acc, top, total = attend(
            acc, top, total, q_tile, k, v, stride_ks, stride_vs, key, keys, lows, highs, inner, outer,
            HEAD_DIM, BLOCK_D, BLOCK_N, SOFTCAP, True, KEEP_OFFSETS,
        )  # fmt: skip
    for i in tl.range(0, full):
        key = begin + (left + i) * BLOCK_N
        acc, top, total = attend(
            acc, top, total, q_tile, k, v, stride_ks, stride_vs, key, keys, lows, highs, inner, outer,
            HEAD_DIM, BLOCK_D, BLOCK_N, SOFTCAP, False, KEEP_OFFSETS,
        )  # fmt: skip

    index = row + tl.arange(0, BLOCK_M)
    lse += (wide_batch * heads + head) * queries + index
    offset = (wide_batch * queries * heads + head) * HEAD_DIM
    inside = tile_mask(row, queries, BLOCK_M, HEAD_DIM, BLOCK_D)
    safe_total = tl.where(total > 0, total, 1.0)
    row_lse = tl.where(total > 0, (top + tl.log2(safe_total)) * LN2, float("-inf"))
    if MERGE:
        before_lse = tl.load(lse, mask=index < queries, other=float("-inf"))
        keep, share, row_lse = merge_weights(total, row_lse, before_lse)
        old = tl.load(tile_pointers(before + offset, heads * HEAD_DIM, row, BLOCK_M, BLOCK_D), mask=inside, other=0.0)
        acc = acc * share[:, None] + old * keep[:, None]
    else:
        acc = acc / safe_total[:, None]
    tl.store(lse, row_lse, mask=index < queries)
    target = tile_pointers(out + offset, heads * HEAD_DIM, row, BLOCK_M, BLOCK_D)
    tl.store(target, acc.to(out.dtype.element_ty), mask=inside)
