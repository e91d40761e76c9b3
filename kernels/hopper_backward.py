"""The backward pass on Hopper (sm_90): a tile of keys stays in shared memory, the queries that see it pass by.

One warp loads tiles of q and dout by TMA, two warpgroups do the five matrix products, one more warp adds dq to global
memory by TMA in fp32. All query heads of a kv head pass the same tile of keys, so dk and dv are summed in registers, in
a fixed order. Scores are computed transposed (keys along rows): p' and ds' then are in registers what the products for
dv and dk take (FlashAttention-3, arXiv 2407.08608), and the mask is a span of queries for each key row.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ringspan.kernels.gluon_compat import as_block, reinterpret, tma_add, tma_load, tma_store, tma_store_wait
from ringspan.kernels.hopper_forward import barriers, place_of, tile_range

WARPS = gl.constexpr(8)  # two warpgroups that share every product


@triton.jit(do_not_specialize=["n_queries", "padded", "factor"])
def statistics_kernel(LSE, DELTA, OUT, n_queries, padded, factor, BLOCK: tl.constexpr):
    """OUT (2, heads, padded) = lse * log2(e), +inf where p must be 0 (no keys, no such row); and delta * factor."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = row < n_queries
    lse = tl.load(LSE + head * n_queries + row, mask=real, other=float("-inf"))
    delta = tl.load(DELTA + head * n_queries + row, mask=real, other=0.0)
    lse = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    tl.store(OUT + head * padded + row, lse, mask=row < padded)
    tl.store(OUT + (tl.num_programs(0) + head) * padded + row, delta * factor, mask=row < padded)


@gluon.jit
def _produce(args, BM: gl.constexpr, STAGES: gl.constexpr):
    (q_desc, dout_desc, k_desc, v_desc, stats_desc, q_s, dout_s, kv_s, lse_s, delta_s, kv_full, q_full, q_empty,
     dout_full, dout_empty, batch, kv_head, kv_group, k0, first, n, stats_row, padded, delta_offset) = args  # fmt: skip
    if n > 0:
        mbarrier.expect(kv_full.index(0), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        tma_load(k_desc, [batch, k0, kv_head, 0], kv_full.index(0), as_block(kv_s.index(0), k_desc))
        tma_load(v_desc, [batch, k0, kv_head, 0], kv_full.index(0), as_block(kv_s.index(1), v_desc))
    for group_head in range(kv_group):
        head = kv_head * kv_group + group_head
        stats = stats_row + group_head * padded
        for t in range(n):
            i = group_head * n + t
            stage = i % STAGES
            free = (i // STAGES & 1) ^ 1  # a fresh barrier lets a wait for parity 1 pass: every stage starts empty
            row = (first + t) * BM
            mbarrier.wait(q_empty.index(stage), free)
            mbarrier.expect(q_full.index(stage), q_desc.block_type.nbytes + stats_desc.block_type.nbytes)
            tma_load(stats_desc, [stats + row], q_full.index(stage), lse_s.index(stage))
            tma_load(q_desc, [batch, row, head, 0], q_full.index(stage), as_block(q_s.index(stage), q_desc))
            mbarrier.wait(dout_empty.index(stage), free)
            mbarrier.expect(dout_full.index(stage), dout_desc.block_type.nbytes + stats_desc.block_type.nbytes)
            tma_load(stats_desc, [delta_offset + stats + row], dout_full.index(stage), delta_s.index(stage))
            tma_load(dout_desc, [batch, row, head, 0], dout_full.index(stage), as_block(dout_s.index(stage), dout_desc))


@gluon.jit
def _write(args, dk_desc, dv_desc, BM: gl.constexpr, BN: gl.constexpr):
    """The writing warp: adds dq tile by tile, and in the end takes dk and dv from the shared memory of k and v."""
    dq_desc, dq_s, kv_s, dq_full, dq_empty, dkv_full, dv_taken, batch, kv_head, kv_group, k0, first, n = args
    for group_head in range(kv_group):
        for t in range(n):
            mbarrier.wait(dq_full.index(0), (group_head * n + t) & 1)
            head = kv_head * kv_group + group_head
            tma_add(dq_desc, [batch, (first + t) * BM, head, 0], as_block(dq_s, dq_desc))
            tma_store_wait(0)
            mbarrier.arrive(dq_empty.index(0), count=1)
    ADD: gl.constexpr = dk_desc.dtype == gl.float32
    if ADD:
        if n > 0:
            wide = reinterpret(kv_s, gl.float32, [BN, kv_s.shape[2]], gl.NVMMASharedLayout(128, 32, rank=2))
            mbarrier.wait(dkv_full.index(0), 0)
            tma_add(dv_desc, [batch, k0, kv_head, 0], as_block(wide, dv_desc))
            tma_store_wait(0)
            mbarrier.arrive(dv_taken.index(0), count=1)
            mbarrier.wait(dkv_full.index(0), 1)
            tma_add(dk_desc, [batch, k0, kv_head, 0], as_block(wide, dk_desc))
    else:
        mbarrier.wait(dkv_full.index(0), 0)
        tma_store(dk_desc, [batch, k0, kv_head, 0], as_block(kv_s.index(0), dk_desc))
        tma_store(dv_desc, [batch, k0, kv_head, 0], as_block(kv_s.index(1), dv_desc))
    tma_store_wait(0)


@gluon.jit
def _step(  # noqa: PLR0915
    i, t, dk, dv, args, STAGES: gl.constexpr, SOFTCAP: gl.constexpr, FOLD: gl.constexpr
):
    """One tile of queries: dk and dv grow by its share, dq goes to the warp that adds it up."""
    (q_s, dout_s, k, v, ds_s, dq_s, lse_s, delta_s, q_full, q_empty, dout_full, dout_empty, dq_full, dq_empty,
     query_lo, query_hi, first, full_from, full_to, score_scale, bend, scale) = args  # fmt: skip
    BM: gl.constexpr = q_s.shape[1]
    BN: gl.constexpr = k.shape[0]
    D: gl.constexpr = k.shape[1]
    dtype: gl.constexpr = k.dtype
    # Queries of 64 rows fill one warpgroup's instruction: then the two halve dq along its columns.
    ACROSS: gl.constexpr = WARPS * 16 // BM if BM < WARPS * 16 else 1
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 16])
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS // ACROSS, ACROSS], [16, D // ACROSS, 16])
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=kv_layout, k_width=2)
    columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    zero = gl.zeros([BN, BM], gl.float32, layout=s_layout)
    stage = i % STAGES
    phase = i // STAGES & 1
    q = q_s.index(stage)
    dout = dout_s.index(stage)

    mbarrier.wait(q_full.index(stage), phase)
    s_future = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(dout_full.index(stage), phase)
    if SOFTCAP:
        # Its derivative needs s for longer: dp then waits, as the registers do not hold all three.
        s = warpgroup_mma_wait(0, deps=(s_future,))
        s = 1.0 - 2.0 / (gl.exp2(s * bend) + 1.0)  # tanh
    else:
        dp_future = warpgroup_mma(v, dout.permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s_future,))
    p = gl.exp2(s * score_scale - lse_s.index(stage).load(columns)[None, :])
    if (t < full_from) | (t >= full_to):
        p = _masked(p, query_lo, query_hi, (first + t) * BM, s_layout)
    p_left = gl.convert_layout(p.to(dtype), left)
    if SOFTCAP:
        p = p * (1.0 - s * s)
        dp_future = warpgroup_mma(v, dout.permute((1, 0)), zero, use_acc=False, is_async=True)
    dp = warpgroup_mma_wait(0, deps=(dp_future,))
    dv_future = warpgroup_mma(p_left, dout, dv, is_async=True)
    delta = delta_s.index(stage).load(columns)
    dp = dp * scale - delta[None, :] if FOLD else dp - delta[None, :]
    ds = (p * dp).to(dtype)
    ds_s.store(ds)
    ds_left = gl.convert_layout(ds, left)
    fence_async_shared()
    dq_zero = gl.zeros([BM, D], gl.float32, layout=dq_layout)
    dq_future = warpgroup_mma(ds_s.permute((1, 0)), k, dq_zero, use_acc=False, is_async=True)
    dk_future = warpgroup_mma(ds_left, q, dk, is_async=True)
    dv = warpgroup_mma_wait(2, deps=(dv_future,))
    mbarrier.arrive(dout_empty.index(stage), count=1)
    dq = warpgroup_mma_wait(1, deps=(dq_future,))
    mbarrier.wait(dq_empty.index(0), (i & 1) ^ 1)
    dq_s.store(dq if FOLD else dq * scale)
    fence_async_shared()
    mbarrier.arrive(dq_full.index(0), count=1)
    dk = warpgroup_mma_wait(0, deps=(dk_future,))
    mbarrier.arrive(q_empty.index(stage), count=1)
    return dk, dv


@gluon.jit
def _masked(p, query_lo, query_hi, row0, layout: gl.constexpr):
    row = row0 + gl.arange(0, p.shape[1], layout=gl.SliceLayout(0, layout))
    keep = (row[None, :] >= query_lo[:, None]) & (row[None, :] < query_hi[:, None])
    return gl.where(keep, p, 0.0)


@gluon.jit
def _consume(args, STAGES: gl.constexpr, ADD: gl.constexpr, SOFTCAP: gl.constexpr, FOLD: gl.constexpr):
    (q_s, dout_s, kv_s, ds_s, dq_s, lse_s, delta_s, kv_full, q_full, q_empty, dout_full, dout_empty, dq_full,
     dq_empty, dkv_full, dv_taken, QUERY_LO, QUERY_HI, kv_group, k0, n_keys, first, n, full_from, full_to, score_scale,
     bend, scale) = args  # fmt: skip
    BM: gl.constexpr = q_s.shape[1]
    BN: gl.constexpr = kv_s.shape[1]
    D: gl.constexpr = kv_s.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 16])
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    k = kv_s.index(0)
    v = kv_s.index(1)
    key = k0 + gl.arange(0, BN, layout=gl.SliceLayout(1, s_layout))
    # Rows past the last key are seen by nobody. Were they not masked, exp2(0 - lse) might be inf, and inf * 0 is NaN.
    query_lo = gl.load(QUERY_LO + key, mask=key < n_keys, other=0)
    query_hi = gl.load(QUERY_HI + key, mask=key < n_keys, other=0)
    step_args = (q_s, dout_s, k, v, ds_s, dq_s, lse_s, delta_s, q_full, q_empty, dout_full, dout_empty, dq_full,
                 dq_empty, query_lo, query_hi, first, full_from, full_to, score_scale, bend, scale)  # fmt: skip
    dk = gl.zeros([BN, D], gl.float32, layout=kv_layout)
    dv = gl.zeros([BN, D], gl.float32, layout=kv_layout)
    if n > 0:
        mbarrier.wait(kv_full.index(0), 0)
    t = 0
    for i in range(kv_group * n):
        dk, dv = _step(i, t, dk, dv, step_args, STAGES, SOFTCAP, FOLD)
        t = gl.where(t + 1 == n, 0, t + 1)
    if not FOLD:
        dk = dk * scale
    # k and v are done with, and their shared memory carries the results out: 2 tiles of 16 bits, or 1 of 32.
    if ADD:
        if n > 0:
            wide = reinterpret(kv_s, gl.float32, [BN, D], gl.NVMMASharedLayout(128, 32, rank=2))
            wide.store(dv)
            fence_async_shared()
            mbarrier.arrive(dkv_full.index(0), count=1)
            mbarrier.wait(dv_taken.index(0), 0)
            wide.store(dk)
            fence_async_shared()
            mbarrier.arrive(dkv_full.index(0), count=1)
    else:
        k.store(dk.to(k.dtype))
        v.store(dv.to(v.dtype))
        fence_async_shared()
        mbarrier.arrive(dkv_full.index(0), count=1)


@gluon.jit(do_not_specialize=["plan_stride", "order_stride", "n_queries", "n_keys", "n_kv_heads", "kv_group",
                              "n_all_heads", "section", "padded", "score_scale", "bend", "scale"])  # fmt: skip
def backward_kernel(q_desc, dout_desc, k_desc, v_desc, stats_desc, dq_desc, dk_desc, dv_desc,
                    QUERY_LO, QUERY_HI, ORDER, plan_stride, order_stride, n_queries, n_keys, n_kv_heads, kv_group,
                    n_all_heads, section, padded, score_scale, bend, scale,
                    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, SOFTCAP: gl.constexpr,
                    FOLD: gl.constexpr):  # fmt: skip
    """One tile of BN keys of one kv head: dk and dv whole, and its share of the dq of all queries that see it.

    dq_desc is fp32 and added to; dk_desc and dv_desc are fp32 and added to, or of 16 bits and written. stats_desc is
    what `statistics_kernel` made, flat. FOLD: ds carries the scale (free, but fp16 would lose small values), and so
    does delta in the statistics. n_all_heads counts kv heads times batch; `section` of them are worked on at a time.
    """
    n_tiles = (n_keys + BN - 1) // BN
    flat_head, place = place_of(gl.program_id(0), n_tiles, n_all_heads, section)
    batch = flat_head // n_kv_heads
    kv_head = flat_head % n_kv_heads
    QUERY_LO += batch.to(gl.int64) * plan_stride
    QUERY_HI += batch.to(gl.int64) * plan_stride
    k0 = gl.load(ORDER + batch.to(gl.int64) * order_stride + place) * BN
    first, n, full_from, full_to = tile_range(QUERY_LO, QUERY_HI, k0, BN, BM, n_keys, n_queries)
    full_to = gl.where(k0 + BN > n_keys, 0, full_to)  # rows past the last key need the mask everywhere
    stats_row = flat_head * kv_group * padded
    delta_offset = n_all_heads * kv_group * padded

    dtype: gl.constexpr = q_desc.dtype
    operand: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    flat: gl.constexpr = gl.NVMMASharedLayout(0, 32, rank=1)
    q_s = gl.allocate_shared_memory(dtype, [STAGES, BM, D], operand)
    dout_s = gl.allocate_shared_memory(dtype, [STAGES, BM, D], operand)
    kv_s = gl.allocate_shared_memory(dtype, [2, BN, D], operand)
    ds_s = gl.allocate_shared_memory(dtype, [BN, BM], operand)
    dq_s = gl.allocate_shared_memory(gl.float32, [BM, D], gl.NVMMASharedLayout(128, 32, rank=2))
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, BM], flat)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, BM], flat)
    kv_full = barriers(1, 1)
    dq_full = barriers(1, 1)
    dq_empty = barriers(1, 1)
    dkv_full = barriers(1, 1)
    dv_taken = barriers(1, 1)
    q_full = barriers(STAGES, 1)
    q_empty = barriers(STAGES, 1)
    dout_full = barriers(STAGES, 1)
    dout_empty = barriers(STAGES, 1)
    fence_async_shared()
    load_args = (q_desc, dout_desc, k_desc, v_desc, stats_desc, q_s, dout_s, kv_s, lse_s, delta_s, kv_full, q_full,
                 q_empty, dout_full, dout_empty, batch, kv_head, kv_group, k0, first, n, stats_row, padded,
                 delta_offset)  # fmt: skip
    write_args = (dq_desc, dq_s, kv_s, dq_full, dq_empty, dkv_full, dv_taken, batch, kv_head, kv_group, k0, first, n)
    args = (q_s, dout_s, kv_s, ds_s, dq_s, lse_s, delta_s, kv_full, q_full, q_empty, dout_full, dout_empty, dq_full,
            dq_empty, dkv_full, dv_taken, QUERY_LO, QUERY_HI, kv_group, k0, n_keys, first, n, full_from, full_to,
            score_scale, bend, scale)  # fmt: skip
    gl.warp_specialize(
        [
            (_consume, (args, STAGES, dk_desc.dtype == gl.float32, SOFTCAP, FOLD)),
            (_produce, (load_args, BM, STAGES)),
            (_write, (write_args, dk_desc, dv_desc, BM, BN)),
        ],
        [1, 1],
        [24, 24],
    )
