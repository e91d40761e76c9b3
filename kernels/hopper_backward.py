"""The backward pass on Hopper (sm_90): a tile of keys stays in shared memory, the queries that see it pass by.

One warp loads tiles of q and dout by TMA, two warpgroups do the five matrix products, one more warp adds dq to global
memory by TMA in fp32. All query heads of a kv head pass the same tile of keys, so dk and dv are summed in registers, in
a fixed order. Scores are computed transposed (keys along rows): p' and ds' then are in registers what the products for
dv and dk take (FlashAttention-3, arXiv 2407.08608), and the mask is a span of queries for each key row.

The loop is rotated: its body is the second half of one tile of queries (dv, dq, dk) and the first half of the next
(scores, p, ds), so that the tensor cores have the next scores to do while dq leaves. It begins where nothing is in
flight anyway: products that cross a loop's end are serialised by the compiler (its warning C7514).
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
from ringspan.kernels.hopper_tiles import barriers, place_of, tile_range

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
def _wait_turn(at, turn):
    """Until other blocks have brought the number at `at` to `turn`: all they added before is seen by what follows."""
    gl.inline_asm_elementwise(
        "{ .reg .pred done; again: ld.acquire.gpu.global.b32 $0, [$1]; setp.eq.u32 done, $0, $2; @!done bra again; "
        "fence.proxy.async; }",
        "=&r,l,r",
        [at, turn],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _pass_turn(at, turn):
    """Sets the number at `at` once all that this warp added by TMA is in global memory, not only on its way."""
    gl.inline_asm_elementwise(
        "{ .reg .pred one; .reg .b32 lane; cp.async.bulk.wait_group 0; fence.proxy.async; bar.warp.sync 0xffffffff; "
        "mov.u32 lane, %laneid; setp.eq.u32 one, lane, 0; @one st.release.gpu.global.b32 [$1], $2; mov.b32 $0, $2; }",
        "=r,l,r",
        [at, turn],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


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
def _write(args, dk_desc, dv_desc, BM: gl.constexpr, BN: gl.constexpr, FRESH: gl.constexpr,
           DETERMINISTIC: gl.constexpr):  # fmt: skip
    """The writing warp: adds dq tile by tile, and in the end takes dk and dv from the shared memory of k and v."""
    (dq_desc, dq_s, kv_s, dq_full, dq_empty, dkv_full, dv_taken, batch, kv_head, kv_group, k0, first, n, TURN, n_tiles,
     shared_to) = args  # fmt: skip
    for group_head in range(kv_group):
        for t in range(n):
            mbarrier.wait(dq_full.index(0), (group_head * n + t) & 1)
            head = kv_head * kv_group + group_head
            if DETERMINISTIC and first + t < shared_to:
                _wait_turn(TURN + first + t, k0 // BN)
            tma_add(dq_desc, [batch, (first + t) * BM, head, 0], as_block(dq_s, dq_desc))
            tma_store_wait(0)
            mbarrier.arrive(dq_empty.index(0), count=1)
            if DETERMINISTIC:
                _pass_turn(TURN + first + t, k0 // BN + 1)
        TURN += n_tiles
    WIDE: gl.constexpr = dk_desc.dtype == gl.float32
    if WIDE:
        if FRESH or n > 0:
            wide = reinterpret(kv_s, gl.float32, [BN, kv_s.shape[2]], gl.NVMMASharedLayout(128, 32, rank=2))
            mbarrier.wait(dkv_full.index(0), 0)
            _store_or_add(dv_desc, [batch, k0, kv_head, 0], as_block(wide, dv_desc), FRESH)
            tma_store_wait(0)
            mbarrier.arrive(dv_taken.index(0), count=1)
            mbarrier.wait(dkv_full.index(0), 1)
            _store_or_add(dk_desc, [batch, k0, kv_head, 0], as_block(wide, dk_desc), FRESH)
    else:
        mbarrier.wait(dkv_full.index(0), 0)
        tma_store(dk_desc, [batch, k0, kv_head, 0], as_block(kv_s.index(0), dk_desc))
        tma_store(dv_desc, [batch, k0, kv_head, 0], as_block(kv_s.index(1), dv_desc))
    tma_store_wait(0)


@gluon.jit
def _store_or_add(desc, where, tile, STORE: gl.constexpr):
    if STORE:
        tma_store(desc, where, tile)
    else:
        tma_add(desc, where, tile)


@gluon.jit
def _scores(i, args, STAGES: gl.constexpr):
    """The product k q' of tile i, issued and not waited for."""
    q_s, kv_s, q_full = args
    BM: gl.constexpr = q_s.shape[1]
    BN: gl.constexpr = kv_s.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 16])
    zero = gl.zeros([BN, BM], gl.float32, layout=layout)
    stage = i % STAGES
    mbarrier.wait(q_full.index(stage), i // STAGES & 1)
    k = kv_s.index(i >> 30)  # 0, see `_step`
    return warpgroup_mma(k, q_s.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _weights(i, t, s_future, args, STAGES: gl.constexpr, SOFTCAP: gl.constexpr, FOLD: gl.constexpr):
    """(p, ds), in 16 bits, of the i-th tile of queries, which is tile t of its head. Leaves no product in flight."""
    (dout_s, kv_s, lse_s, delta_s, dout_full, query_lo, query_hi, full_from, full_to, score_scale, bend,
     scale) = args  # fmt: skip
    BM: gl.constexpr = dout_s.shape[1]
    BN: gl.constexpr = kv_s.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 16])
    columns: gl.constexpr = gl.SliceLayout(0, layout)
    zero = gl.zeros([BN, BM], gl.float32, layout=layout)
    stage = i % STAGES
    v = kv_s.index((i >> 30) + 1)  # 1, see `_step`
    dout = dout_s.index(stage)
    mbarrier.wait(dout_full.index(stage), i // STAGES & 1)
    if SOFTCAP:
        # Its derivative needs s for longer: dp then waits, as the registers do not hold all three.
        s = warpgroup_mma_wait(0, deps=(s_future,))
        s = 1.0 - 2.0 / (gl.exp2(s * bend) + 1.0)  # tanh
    else:
        dp_future = warpgroup_mma(v, dout.permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s_future,))
    p = gl.exp2(s * score_scale - lse_s.index(stage).load(columns)[None, :])
    if (t < full_from) | (t >= full_to):
        p = _masked(p, query_lo, query_hi, t * BM, layout)
    slope = p
    if SOFTCAP:
        slope = p * (1.0 - s * s)
        dp_future = warpgroup_mma(v, dout.permute((1, 0)), zero, use_acc=False, is_async=True)
    dp = warpgroup_mma_wait(0, deps=(dp_future,))
    delta = delta_s.index(stage).load(columns)
    dp = dp * scale - delta[None, :] if FOLD else dp - delta[None, :]
    return _rounded(p, slope, dp, kv_s)


@gluon.constexpr_function
def _column_layout(columns):
    """Columns of a tile of scores as (group of 8, place in it), to the threads that hold them."""
    groups = [[1 << i, 0] for i in range((columns // 8).bit_length() - 1)]
    lanes = [[0, 2], [0, 4], [0, 0], [0, 0], [0, 0]]
    return gl.DistributedLinearLayout([[0, 1], *groups], lanes, [[0, 0]] * 3, [], [columns // 8, 8])


@gluon.jit
def _masked(p, query_lo, query_hi, row0, layout: gl.constexpr):
    BM: gl.constexpr = p.shape[1]
    pairs: gl.constexpr = _column_layout(BM)
    # Numbers of rows as (this tile's and this thread's) + (a constant), in that order: the other way round the compiler
    # takes this thread's + a constant out of the loop, and keeps them in 32 registers.
    near = row0 + gl.arange(0, 8, layout=gl.SliceLayout(0, pairs))
    row = near[None, :] + 8 * gl.arange(0, BM // 8, layout=gl.SliceLayout(1, pairs))[:, None]
    row = gl.convert_layout(row.reshape([BM]), gl.SliceLayout(0, layout), assert_trivial=True)
    keep = (row[None, :] >= query_lo[:, None]) & (row[None, :] < query_hi[:, None])
    return gl.where(keep, p, 0.0)


@gluon.jit
def _rounded(p, slope, dp, like):
    """(p, slope * dp) in the 16 bits of `like`. Pair by pair, in assembly: else all products wait in registers."""
    ROUND: gl.constexpr = "cvt.rn.bf16x2.f32" if like.dtype == gl.bfloat16 else "cvt.rn.f16x2.f32"
    return gl.inline_asm_elementwise(
        "{ .reg .f32 x, y; mul.f32 x, $4, $6; mul.f32 y, $5, $7; " + ROUND + " $0, $3, $2; " + ROUND + " $1, y, x; }",
        "=&r,=&r,f,f,f,f,f,f",
        [p, slope, dp],
        dtype=(like.dtype, like.dtype),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _step(i, t_next, p, ds, dk, dv, args, NEXT: gl.constexpr, STAGES: gl.constexpr, SOFTCAP: gl.constexpr,
          FOLD: gl.constexpr):  # fmt: skip
    """What (p, ds) of tile i give to dv, dq and dk; dq goes to the warp that adds it up. If NEXT, p and ds of i + 1."""
    (q_s, dout_s, kv_s, ds_s, dq_s, q_empty, dout_empty, dq_full, dq_empty, scale, score_args,
     weight_args) = args  # fmt: skip
    BM: gl.constexpr = q_s.shape[1]
    D: gl.constexpr = kv_s.shape[2]
    # Queries of 64 rows fill one warpgroup's instruction: then the two halve dq along its columns.
    ACROSS: gl.constexpr = WARPS * 16 // BM if BM < WARPS * 16 else 1
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS // ACROSS, ACROSS], [16, D // ACROSS, 16])
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=kv_layout, k_width=2)
    stage = i % STAGES
    q = q_s.index(stage)
    # i >> 30 is 0, which the compiler cannot know: else it keeps the addresses of k, v and ds for every instruction in
    # registers throughout the loop, and spills 70 others.
    k = kv_s.index(i >> 30)
    ds_t = ds_s.index(i >> 30)

    dv_future = warpgroup_mma(gl.convert_layout(p, left), dout_s.index(stage), dv, is_async=True)
    ds_t.store(ds)
    ds_left = gl.convert_layout(ds, left)
    fence_async_shared()
    dq_zero = gl.zeros([BM, D], gl.float32, layout=dq_layout)
    dq_future = warpgroup_mma(ds_t.permute((1, 0)), k, dq_zero, use_acc=False, is_async=True)
    dk_future = warpgroup_mma(ds_left, q, dk, is_async=True)
    dv = warpgroup_mma_wait(2, deps=(dv_future,))
    mbarrier.arrive(dout_empty.index(stage), count=1)
    dq = warpgroup_mma_wait(1, deps=(dq_future,))
    mbarrier.wait(dq_empty.index(0), (i & 1) ^ 1)
    dq_s.store(dq if FOLD else dq * scale)
    fence_async_shared()
    mbarrier.arrive(dq_full.index(0), count=1)
    if NEXT:
        s_future = _scores(i + 1, score_args, STAGES)
    dk = warpgroup_mma_wait(1 if NEXT else 0, deps=(dk_future,))
    mbarrier.arrive(q_empty.index(stage), count=1)
    if NEXT:
        p, ds = _weights(i + 1, t_next, s_future, weight_args, STAGES, SOFTCAP, FOLD)
    return p, ds, dk, dv


@gluon.jit
def _consume(args, STAGES: gl.constexpr, WIDE: gl.constexpr, FRESH: gl.constexpr, SOFTCAP: gl.constexpr,
             FOLD: gl.constexpr):  # fmt: skip
    (q_s, dout_s, kv_s, ds_s, dq_s, lse_s, delta_s, kv_full, q_full, q_empty, dout_full, dout_empty, dq_full,
     dq_empty, dkv_full, dv_taken, QUERY_LO, QUERY_HI, kv_group, k0, n_keys, first, n, full_from, full_to, score_scale,
     bend, scale) = args  # fmt: skip
    BM: gl.constexpr = q_s.shape[1]
    BN: gl.constexpr = kv_s.shape[1]
    D: gl.constexpr = kv_s.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 16])
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    key = k0 + gl.arange(0, BN, layout=gl.SliceLayout(1, s_layout))
    # Rows past the last key are seen by nobody. Were they not masked, exp2(0 - lse) might be inf, and inf * 0 is NaN.
    query_lo = gl.load(QUERY_LO + key, mask=key < n_keys, other=0)
    query_hi = gl.load(QUERY_HI + key, mask=key < n_keys, other=0)
    score_args = (q_s, kv_s, q_full)
    weight_args = (dout_s, kv_s, lse_s, delta_s, dout_full, query_lo, query_hi, first + full_from, first + full_to,
                   score_scale, bend, scale)  # fmt: skip
    step_args = (q_s, dout_s, kv_s, ds_s, dq_s, q_empty, dout_empty, dq_full, dq_empty, scale, score_args, weight_args)
    dk = gl.zeros([BN, D], gl.float32, layout=kv_layout)
    dv = gl.zeros([BN, D], gl.float32, layout=kv_layout)
    if n > 0:
        last = kv_group * n - 1
        mbarrier.wait(kv_full.index(0), 0)
        s_future = _scores(0, score_args, STAGES)
        p, ds = _weights(0, first, s_future, weight_args, STAGES, SOFTCAP, FOLD)
        # k0 >> 30 is 0, unknown to the compiler: where it can, it makes loops of their own for masked tiles and others,
        # which head dim 64 has no registers for.
        t = first + (k0 >> 30) if D == 64 and not SOFTCAP else first
        for i in range(last):
            t = gl.where(t + 1 == first + n, first, t + 1)
            p, ds, dk, dv = _step(i, t, p, ds, dk, dv, step_args, True, STAGES, SOFTCAP, FOLD)
        p, ds, dk, dv = _step(last, 0, p, ds, dk, dv, step_args, False, STAGES, SOFTCAP, FOLD)
    if not FOLD:
        dk = dk * scale
    # k and v are done with, and their shared memory carries the results out: 2 tiles of 16 bits, or 1 of 32.
    if WIDE:
        if FRESH or n > 0:
            wide = reinterpret(kv_s, gl.float32, [BN, D], gl.NVMMASharedLayout(128, 32, rank=2))
            wide.store(dv)
            fence_async_shared()
            mbarrier.arrive(dkv_full.index(0), count=1)
            mbarrier.wait(dv_taken.index(0), 0)
            wide.store(dk)
            fence_async_shared()
            mbarrier.arrive(dkv_full.index(0), count=1)
    else:
        kv_s.index(0).store(dk.to(kv_s.dtype))
        kv_s.index(1).store(dv.to(kv_s.dtype))
        fence_async_shared()
        mbarrier.arrive(dkv_full.index(0), count=1)


@gluon.jit(do_not_specialize=["plan_stride", "order_stride", "n_queries", "n_keys", "n_kv_heads", "kv_group",
                              "n_all_heads", "section", "padded", "score_scale", "bend", "scale"])  # fmt: skip
def backward_kernel(q_desc, dout_desc, k_desc, v_desc, stats_desc, dq_desc, dk_desc, dv_desc,
                    QUERY_LO, QUERY_HI, ORDER, TURN, plan_stride, order_stride, n_queries, n_keys, n_kv_heads, kv_group,
                    n_all_heads, section, padded, score_scale, bend, scale,
                    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, SOFTCAP: gl.constexpr,
                    FOLD: gl.constexpr, FRESH: gl.constexpr, DETERMINISTIC: gl.constexpr):  # fmt: skip
    """One tile of BN keys of one kv head: dk and dv whole, and its share of the dq of all queries that see it.

    dq_desc is fp32 and added to; dk_desc and dv_desc are fp32 and added to, or if FRESH written, or of 16 bits and
    written. stats_desc is what `statistics_kernel` made, flat. FOLD: ds carries the scale (free, but fp16 would lose
    small values), and so does delta in the statistics. n_all_heads counts kv heads times batch; `section` of them are
    worked on at a time.
    DETERMINISTIC: tiles of keys add to a tile of dq in their order, by TURN (batch, heads, tiles of queries) int32,
    which must be zeros; else it is not touched.
    """
    n_tiles = (n_keys + BN - 1) // BN
    n_query_tiles = (n_queries + BM - 1) // BM
    flat_head, place = place_of(gl.program_id(0), n_tiles, n_all_heads, section)
    batch = flat_head // n_kv_heads
    kv_head = flat_head % n_kv_heads
    QUERY_LO += batch.to(gl.int64) * plan_stride
    QUERY_HI += batch.to(gl.int64) * plan_stride
    # Blocks start in the order of their number. By turns, each waits for lower tiles only: those that started before.
    k0 = (place if DETERMINISTIC else gl.load(ORDER + batch.to(gl.int64) * order_stride + place)) * BN
    first, n, full_from, full_to = tile_range(QUERY_LO, QUERY_HI, k0, BN, BM, n_keys, n_queries)
    full_to = gl.where(k0 + BN > n_keys, 0, full_to)  # rows past the last key need the mask everywhere
    shared_to = 0
    if DETERMINISTIC:
        # A tile that nobody sees takes part with no weight, so that who adds to a tile of dq is one run of tiles: the
        # turn comes from the tile before, if that one's queries reach so far.
        n = gl.maximum(_end(QUERY_HI, k0 + BN, n_keys, n_queries, BM) - first, 0)
        TURN += flat_head.to(gl.int64) * kv_group * n_query_tiles
        if k0 > 0:
            shared_to = _end(QUERY_HI, k0, n_keys, n_queries, BM)
    stats_row = flat_head * kv_group * padded
    delta_offset = n_all_heads * kv_group * padded

    dtype: gl.constexpr = q_desc.dtype
    operand: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    flat: gl.constexpr = gl.NVMMASharedLayout(0, 32, rank=1)
    q_s = gl.allocate_shared_memory(dtype, [STAGES, BM, D], operand)
    dout_s = gl.allocate_shared_memory(dtype, [STAGES, BM, D], operand)
    kv_s = gl.allocate_shared_memory(dtype, [2, BN, D], operand)
    ds_s = gl.allocate_shared_memory(dtype, [1, BN, BM], operand)
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
    write_args = (dq_desc, dq_s, kv_s, dq_full, dq_empty, dkv_full, dv_taken, batch, kv_head, kv_group, k0, first, n,
                  TURN, n_query_tiles, shared_to)  # fmt: skip
    args = (q_s, dout_s, kv_s, ds_s, dq_s, lse_s, delta_s, kv_full, q_full, q_empty, dout_full, dout_empty, dq_full,
            dq_empty, dkv_full, dv_taken, QUERY_LO, QUERY_HI, kv_group, k0, n_keys, first, n, full_from, full_to,
            score_scale, bend, scale)  # fmt: skip
    gl.warp_specialize(
        [
            (_consume, (args, STAGES, dk_desc.dtype == gl.float32, FRESH, SOFTCAP, FOLD)),
            (_produce, (load_args, BM, STAGES)),
            (_write, (write_args, dk_desc, dv_desc, BM, BN, FRESH, DETERMINISTIC)),
        ],
        [1, 1],
        [24, 24],
    )


@gluon.jit
def _end(QUERY_HI, key, n_keys, n_queries, BM: gl.constexpr):
    """The tile of queries after the last that any key before `key` sees."""
    return (gl.minimum(gl.load(QUERY_HI + gl.minimum(key, n_keys) - 1), n_queries) + BM - 1) // BM
