"""The backward kernels: dq by blocks of query rows, dk and dv by blocks of key rows; no atomics, so deterministic.

Both recompute p = exp(s - lse) and form ds = p * (dout.v - delta), Dao, FlashAttention-2 (arXiv 2307.08691).
"""

import triton
import triton.language as tl

from ringspan.kernels.triton_tiles import (
    TILE,
    dot,
    load_spans,
    load_tile,
    locate,
    split_range,
    tanh,
    tile_mask,
    tile_pointers,
)

_UNSPECIALIZED = ["queries", "keys", "pairs", "heads", "group", "chunk", "stride_span", "stride_order"]


@triton.jit
def _load_statistics(both, row, BLOCK_M: tl.constexpr):
    """(lse in base 2, delta) of query rows, see `statistics`: as pairs, for a thread needs both of a few rows."""
    return tl.load(both + row * 2 + tl.arange(0, 2 * BLOCK_M)).reshape(BLOCK_M, 2).split()


@triton.jit
def _add(target, tile, row, limit, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr):
    pointers = tile_pointers(target, stride, row, ROWS, BLOCK_D)
    inside = tile_mask(row, limit, ROWS, COLUMNS, BLOCK_D)
    tl.store(pointers, tile + tl.load(pointers, mask=inside, other=0.0), mask=inside)


@triton.jit
def _store(target, tile, row, limit, stride, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
           ACCUMULATE: tl.constexpr):  # fmt: skip
    """Write rows [row, row + ROWS) of a gradient, or add to them: in halves, or what is loaded would spill."""
    if ACCUMULATE:
        HALF: tl.constexpr = BLOCK_D // 2
        left, right = tile.reshape(ROWS, 2, HALF).permute(0, 2, 1).split()
        _add(target, left, row, limit, stride, ROWS, HEAD_DIM, HALF)
        _add(target + HALF, right, row, limit, stride, ROWS, HEAD_DIM - HALF, HALF)
    else:
        pointers = tile_pointers(target, stride, row, ROWS, BLOCK_D)
        inside = tile_mask(row, limit, ROWS, HEAD_DIM, BLOCK_D)
        tl.store(pointers, tile.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _add_keys(
    acc, q, dout, row_lse, row_delta, k, v, stride_ks, stride_vs, key, keys, lows, highs, inner, outer,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    KEEP_OFFSETS: tl.constexpr,
):  # fmt: skip
    """acc + ds @ k over one block of keys."""
    k_tile = load_tile(k, stride_ks, key, keys, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED, KEEP_OFFSETS)
    scores = dot(q, tl.trans(k_tile), None)
    if SOFTCAP:
        scores = tanh(scores * inner, q.dtype == tl.float32)
    exponent = scores * outer - row_lse[:, None]
    if MASKED:
        index = key + tl.arange(0, BLOCK_N)
        seen = (index[None, :] >= lows[:, None]) & (index[None, :] < highs[:, None])
        exponent = tl.where(seen, exponent, float("-inf"))
    p = tl.exp2(exponent)
    v_tile = load_tile(v, stride_vs, key, keys, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED, KEEP_OFFSETS)
    ds = p * (dot(dout, tl.trans(v_tile), None) - row_delta[:, None])
    if SOFTCAP:
        ds *= 1.0 - scores * scores
    return dot(ds.to(k_tile.dtype), k_tile, acc)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def dq_kernel(
    dout, q, k, v, statistics, dq, lo, hi, order,
    stride_db, stride_ds, stride_dh, stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_span, stride_order, queries, keys, pairs, heads, group, chunk, inner, outer, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KEEP_OFFSETS: tl.constexpr, SOFTCAP: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """dq (B, S, H, D) contiguous, added to if ACCUMULATE. Names as in `forward_kernel`; stride_d* are dout's."""
    row, batch, head = locate(order, stride_order, queries, pairs, heads, chunk, BLOCK_M)
    if row >= queries:
        return
    wide_batch, wide_head = batch.to(tl.int64), head.to(tl.int64)
    lo += wide_batch * stride_span
    hi += wide_batch * stride_span
    begin, left, full, blocks = split_range(lo, hi, row, queries, keys, BLOCK_M, BLOCK_N)
    if ACCUMULATE and blocks == 0:
        return
    q += wide_batch * stride_qb + wide_head * stride_qh
    dout += wide_batch * stride_db + wide_head * stride_dh
    k += wide_batch * stride_kb + wide_head // group * stride_kh
    v += wide_batch * stride_vb + wide_head // group * stride_vh
    statistics += (wide_batch * heads + head) * tl.cdiv(queries, TILE) * TILE * 2

    q_tile = load_tile(q, stride_qs, row, queries, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    dout_tile = load_tile(dout, stride_ds, row, queries, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    row_lse, row_delta = _load_statistics(statistics, row, BLOCK_M)
    lows, highs = load_spans(lo, hi, row, queries, keys, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in tl.range(0, blocks - full):
        key = begin + tl.where(i < left, i, i + full) * BLOCK_N
        acc = _add_keys(
            acc, q_tile, dout_tile, row_lse, row_delta, k, v, stride_ks, stride_vs, key, keys, lows, highs,
            inner, outer, HEAD_DIM, BLOCK_D, BLOCK_N, SOFTCAP, True, KEEP_OFFSETS,
        )  # fmt: skip
    for i in tl.range(0, full):
        key = begin + (left + i) * BLOCK_N
        acc = _add_keys(
            acc, q_tile, dout_tile, row_lse, row_delta, k, v, stride_ks, stride_vs, key, keys, lows, highs,
            inner, outer, HEAD_DIM, BLOCK_D, BLOCK_N, SOFTCAP, False, KEEP_OFFSETS,
        )  # fmt: skip
    dq += (wide_batch * queries * heads + head) * HEAD_DIM
    _store(dq, acc * scale, row, queries, heads * HEAD_DIM, BLOCK_M, HEAD_DIM, BLOCK_D, ACCUMULATE)


@triton.jit
def _add_queries(
    dk, dv, k, v, q, dout, statistics, stride_qs, stride_ds, row, queries, lows, highs, inner, outer,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    KEEP_OFFSETS: tl.constexpr,
):  # fmt: skip
    """(dk + ds^T @ q, dv + p^T @ dout) over one block of queries; scores have keys as rows, so p^T needs no turning."""
    q_tile = load_tile(q, stride_qs, row, queries, BLOCK_M, HEAD_DIM, BLOCK_D, MASKED, KEEP_OFFSETS)
    row_lse, row_delta = _load_statistics(statistics, row, BLOCK_M)
    scores = dot(k, tl.trans(q_tile), None)
    if SOFTCAP:
        scores = tanh(scores * inner, k.dtype == tl.float32)
    exponent = scores * outer - row_lse[None, :]
    if MASKED:
        index = row + tl.arange(0, BLOCK_M)
        seen = (index[None, :] >= lows[:, None]) & (index[None, :] < highs[:, None])
        exponent = tl.where(seen, exponent, float("-inf"))
    p = tl.exp2(exponent)
    dout_tile = load_tile(dout, stride_ds, row, queries, BLOCK_M, HEAD_DIM, BLOCK_D, MASKED, KEEP_OFFSETS)
    dv = dot(p.to(dout_tile.dtype), dout_tile, dv)
    dp = dot(v, tl.trans(dout_tile), None)
    ds = p * (dp - row_delta[None, :])
    if SOFTCAP:
        ds *= 1.0 - scores * scores
    return dot(ds.to(q_tile.dtype), q_tile, dk), dv


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def dkdv_kernel(
    dout, q, k, v, statistics, dk, dv, query_lo, query_hi, order,
    stride_db, stride_ds, stride_dh, stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_span, stride_order, queries, keys, pairs, heads, group, chunk, inner, outer, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KEEP_OFFSETS: tl.constexpr, SOFTCAP: tl.constexpr, ADD_DK: tl.constexpr, ADD_DV: tl.constexpr,
):  # fmt: skip
    """dk, dv (B, T, K, D) contiguous, added to if ADD_DK, ADD_DV; heads are kv heads here, of `group` query heads."""
    row, batch, head = locate(order, stride_order, keys, pairs, heads, chunk, BLOCK_N)
    if row >= keys:
        return
    wide_batch, wide_head = batch.to(tl.int64), head.to(tl.int64)
    query_lo += wide_batch * stride_span
    query_hi += wide_batch * stride_span
    begin, left, full, blocks = split_range(query_lo, query_hi, row, keys, queries, BLOCK_N, BLOCK_M)
    if ADD_DK and ADD_DV and blocks == 0:
        return
    k += wide_batch * stride_kb + wide_head * stride_kh
    v += wide_batch * stride_vb + wide_head * stride_vh
    q += wide_batch * stride_qb + wide_head * group * stride_qh
    dout += wide_batch * stride_db + wide_head * group * stride_dh
    padded = tl.cdiv(queries, TILE) * TILE
    statistics += (wide_batch * heads + wide_head) * group * padded * 2

    k_tile = load_tile(k, stride_ks, row, keys, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    v_tile = load_tile(v, stride_vs, row, keys, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    lows, highs = load_spans(query_lo, query_hi, row, keys, queries, BLOCK_N)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # The heads of the group one after the other in one loop: its loads run ahead across them.
    masked = blocks - full
    for i in tl.range(0, group * masked):
        member = (i // masked).to(tl.int64)
        j = i % masked
        dk_tile, dv_tile = _add_queries(
            dk_tile, dv_tile, k_tile, v_tile, q + member * stride_qh, dout + member * stride_dh,
            statistics + member * padded * 2, stride_qs, stride_ds,
            begin + tl.where(j < left, j, j + full) * BLOCK_M, queries, lows, highs, inner, outer,
            HEAD_DIM, BLOCK_D, BLOCK_M, SOFTCAP, True, KEEP_OFFSETS,
        )  # fmt: skip
    for i in tl.range(0, group * full):
        member = (i // full).to(tl.int64)
        dk_tile, dv_tile = _add_queries(
            dk_tile, dv_tile, k_tile, v_tile, q + member * stride_qh, dout + member * stride_dh,
            statistics + member * padded * 2, stride_qs, stride_ds,
            begin + (left + i % full) * BLOCK_M, queries, lows, highs, inner, outer,
            HEAD_DIM, BLOCK_D, BLOCK_M, SOFTCAP, False, KEEP_OFFSETS,
        )  # fmt: skip
    offset = (wide_batch * keys * heads + head) * HEAD_DIM
    _store(dk + offset, dk_tile * scale, row, keys, heads * HEAD_DIM, BLOCK_N, HEAD_DIM, BLOCK_D, ADD_DK)
    _store(dv + offset, dv_tile, row, keys, heads * HEAD_DIM, BLOCK_N, HEAD_DIM, BLOCK_D, ADD_DV)
