"""The backward pass on Hopper (sm_90): a tile of keys stays in shared memory, the queries that see it pass by.

One warp loads tiles of q and dout by TMA, two warpgroups do the five matrix products, one more warp adds dq to global
memory by TMA in fp32; two do that where its sums have a fixed order. All query heads of a kv head pass the same tile of
keys, so dk and dv are summed in registers, in a fixed order. Scores are computed transposed (keys along rows): p' and
ds' then are in registers what the products for dv and dk take (FlashAttention-3, arXiv 2407.08608), and the mask is a
span of queries for each key row.

Each warpgroup owns 64 keys, and they take turns at the tensor cores, so that one does its exponentials while products
of the other run. In its turn it issues its half of dq of the tile of queries before (dq needs ds of both, which are
stored by then), dk and dv of this tile, and passes the turn once dq is there: dk and dv keep the tensor cores busy
until the other comes, and scores and dp of its next tile follow. So a turn is all that the two wait for. A pass through
the loop ends with nothing in flight: products that cross a loop's end are serialised by the compiler (warning C7514).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ringspan.kernels.gluon_compat import reinterpret
from ringspan.kernels.hopper_backward_copies import (
    DQ_EMPTY,
    DQ_FULL,
    FREE,
    KEYS_DONE,
    ROWS,
    STAGES,
    TURN,
    add_gradients,
    load_tiles,
)
from ringspan.kernels.hopper_tiles import barriers, meet, pass_by, place_of, tile_range


@gluon.jit
def _once(x):
    """x, which the compiler then computes where it stands, and not again in every warp's part of the kernel."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def _column_layout(columns):
    """Columns of a tile of scores as (group of 8, place in it), to the threads that hold them."""
    groups = [[1 << i, 0] for i in range((columns // 8).bit_length() - 1)]
    lanes = [[0, 2], [0, 4], [0, 0], [0, 0], [0, 0]]
    return gl.DistributedLinearLayout([[0, 1], *groups], lanes, [[0, 0]] * 2, [], [columns // 8, 8])


@gluon.jit
def _masked(p, query_lo_s, query_hi_s, row0, layout: gl.constexpr):
    BM: gl.constexpr = p.shape[1]
    # The bounds are read again for each masked tile: they are near, and would cost registers in the whole loop.
    query_lo = query_lo_s.load(gl.SliceLayout(1, layout))
    query_hi = query_hi_s.load(gl.SliceLayout(1, layout))
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
def _scores(i, keys, queries_s, full, BM: gl.constexpr):
    """The product of these keys (or values) with tile i of queries (or dout), transposed: issued, not waited for."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    zero = gl.zeros([ROWS, BM], gl.float32, layout=layout)
    mbarrier.wait(full.index(i & 1), i >> 1 & 1)
    return warpgroup_mma(keys, queries_s.index(i & 1).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _of_keys(i, args, cid: gl.constexpr):
    q_s, dout_s, kv_s, q_full, dout_full = args
    return _scores(i, kv_s.index((i >> 30) + 2 * cid), q_s, q_full, q_s.shape[1])


@gluon.jit
def _of_values(i, args, cid: gl.constexpr):
    q_s, dout_s, kv_s, q_full, dout_full = args
    return _scores(i, kv_s.index((i >> 30) + 2 * cid + 1), dout_s, dout_full, q_s.shape[1])


@gluon.jit
def _weights(i, t, s_future, dp_future, args, products_args, cid: gl.constexpr, SOFTCAP: gl.constexpr,
             FOLD: gl.constexpr):  # fmt: skip
    """(p, ds), in 16 bits, of the i-th tile of queries, which is tile t of its head. Leaves no product in flight."""
    (lse_s, delta_s, bounds_s, full_from, full_to, score_scale, bend, scale, like) = args
    s = warpgroup_mma_wait(0 if SOFTCAP else 1, deps=(s_future,))
    layout: gl.constexpr = s.type.layout
    columns: gl.constexpr = gl.SliceLayout(0, layout)
    stage = i & 1
    if SOFTCAP:
        s = 1.0 - 2.0 / (gl.exp2(s * bend) + 1.0)  # tanh
    p = gl.exp2(s * score_scale - lse_s.index(stage).load(columns)[None, :])
    if (t < full_from) | (t >= full_to):
        p = _masked(p, bounds_s.index(2 * cid), bounds_s.index(2 * cid + 1), t * s.shape[1], layout)
    slope = p
    if SOFTCAP:
        # The derivative needs s for longer: dp waits, as the registers do not hold all three.
        slope = p * (1.0 - s * s)
        dp_future = _of_values(i, products_args, cid)
    dp = warpgroup_mma_wait(0, deps=(dp_future,))
    delta = delta_s.index(stage).load(columns)
    dp = dp * scale - delta[None, :] if FOLD else dp - delta[None, :]
    return _rounded(p, slope, dp, like)


@gluon.jit
def _dq_product(i, kv_s, ds_s, cid: gl.constexpr):
    """This consumer's 64 x 64 of dq of tile i, transposed: half of the dims or queries, or the sum over its keys."""
    D: gl.constexpr = kv_s.shape[2]
    BM: gl.constexpr = ds_s.shape[2]
    # Transposed, so that a store of its registers, four queries two apart by eight dims, meets every bank of shared
    # memory once. The other way round it was two rows' same 32 bytes: twice the time.
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    zero = gl.zeros([ROWS, ROWS], gl.float32, layout=layout)
    # i >> 30 is 0, which the compiler cannot know: else it keeps addresses in registers throughout the loop.
    if BM * D == ROWS * ROWS:
        k = kv_s.index((i >> 30) + 2 * cid)
        return warpgroup_mma(k.permute((1, 0)), ds_s.index((i & 1) * 2 + cid), zero, use_acc=False, is_async=True)
    k0 = _columns(kv_s.index(i >> 30), cid, D)
    k1 = _columns(kv_s.index((i >> 30) + 2), cid, D)
    ds0 = _columns(ds_s.index((i & 1) * 2), cid, BM)
    ds1 = _columns(ds_s.index((i & 1) * 2 + 1), cid, BM)
    half = warpgroup_mma(k0.permute((1, 0)), ds0, zero, use_acc=False, is_async=True)
    return warpgroup_mma(k1.permute((1, 0)), ds1, half, is_async=True)


@gluon.jit
def _columns(memory, cid: gl.constexpr, WIDTH: gl.constexpr):
    """(64, 64) of (64, WIDTH): all, or this consumer's."""
    if WIDTH > ROWS:
        memory = memory.slice(cid * ROWS, ROWS, 1)
    return memory


@gluon.jit
def _give(i, dq, dq_s, scale, cid: gl.constexpr, FOLD: gl.constexpr):
    """dq of tile i to the warp that adds it up."""
    meet(DQ_EMPTY + cid, 128 + 32)
    dq_s.index(cid).permute((1, 0)).store(dq if FOLD else dq * scale)
    fence_async_shared()
    pass_by(DQ_FULL + (i & 1) * 2 + cid, 128 + 32)


@gluon.jit
def _turn(i, t_next, p, ds, dk, dv, args, cid: gl.constexpr, NEXT: gl.constexpr, SOFTCAP: gl.constexpr,
          FOLD: gl.constexpr):  # fmt: skip
    """One turn: dq of tile i - 1, dv and dk of tile i, and if NEXT scores and dp of tile i + 1, and its p and ds."""
    ds_s, dq_s, scale, products_args, weight_args = args
    q_s, dout_s, kv_s, q_full, dout_full = products_args
    D: gl.constexpr = kv_s.shape[2]
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=kv_layout, k_width=2)
    stage = i & 1
    meet(TURN + cid, 256)
    dq_future = _dq_product(i + 1, kv_s, ds_s, cid)  # of what was left in memory if i is 0, and not added to anything
    dk_future = warpgroup_mma(gl.convert_layout(ds, left), q_s.index(stage), dk, is_async=True)
    dv_future = warpgroup_mma(gl.convert_layout(p, left), dout_s.index(stage), dv, is_async=True)
    ds_s.index((i & 1) * 2 + cid).store(ds)
    fence_async_shared()
    dq = warpgroup_mma_wait(2, deps=(dq_future,))
    pass_by(TURN + 1 - cid, 256)  # ds is there, and the other's is read: it may have the tensor cores at the same time
    _give(i + 1, dq, dq_s, scale, cid, FOLD)
    dk = warpgroup_mma_wait(1, deps=(dk_future,))
    if NEXT:
        s_future = _of_keys(i + 1, products_args, cid)
        dv = warpgroup_mma_wait(1, deps=(dv_future,))
        pass_by(FREE + stage, 256 + 32)
        dp_future = s_future if SOFTCAP else _of_values(i + 1, products_args, cid)
        p, ds = _weights(i + 1, t_next, s_future, dp_future, weight_args, products_args, cid, SOFTCAP, FOLD)
    else:
        dv = warpgroup_mma_wait(0, deps=(dv_future,))
    return p, ds, dk, dv


@gluon.jit
def _consume(args, cid: gl.constexpr, WIDE: gl.constexpr, FRESH: gl.constexpr, SOFTCAP: gl.constexpr,
             FOLD: gl.constexpr):  # fmt: skip
    (q_s, dout_s, kv_s, ds_s, dq_s, lse_s, delta_s, bounds_s, kv_full, q_full, dout_full, dkv_full, dv_taken,
     QUERY_LO, QUERY_HI, kv_group, k0, n_keys, first, n, full_from, full_to, score_scale, bend,
     scale) = args  # fmt: skip
    BM: gl.constexpr = q_s.shape[1]
    D: gl.constexpr = kv_s.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    key = k0 + cid * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
    # Rows past the last key are seen by nobody. Were they not masked, exp2(0 - lse) might be inf, and inf * 0 is NaN.
    bounds_s.index(2 * cid).store(gl.load(QUERY_LO + key, mask=key < n_keys, other=0))
    bounds_s.index(2 * cid + 1).store(gl.load(QUERY_HI + key, mask=key < n_keys, other=0))
    products_args = (q_s, dout_s, kv_s, q_full, dout_full)
    weight_args = (lse_s, delta_s, bounds_s, first + full_from, first + full_to, score_scale, bend, scale,
                   kv_s)  # fmt: skip
    turn_args = (ds_s, dq_s, scale, products_args, weight_args)
    dk = gl.zeros([ROWS, D], gl.float32, layout=kv_layout)
    dv = gl.zeros([ROWS, D], gl.float32, layout=kv_layout)
    if n > 0:
        last = kv_group * n - 1
        mbarrier.wait(kv_full.index(0), 0)
        if cid == 1:
            pass_by(TURN, 256)  # the first turn is the first consumer's
        meet(TURN + cid, 256)
        s_future = _of_keys(0, products_args, cid)
        dp_future = s_future if SOFTCAP else _of_values(0, products_args, cid)
        pass_by(TURN + 1 - cid, 256)
        p, ds = _weights(0, first, s_future, dp_future, weight_args, products_args, cid, SOFTCAP, FOLD)
        # k0 >> 30 is 0, unknown to the compiler: where it can, it makes loops of their own for masked tiles and others,
        # which head dim 64 has no registers for.
        t = first + (k0 >> 30) if D == 64 and not SOFTCAP else first
        for i in range(last):
            t = gl.where(t + 1 == first + n, first, t + 1)
            p, ds, dk, dv = _turn(i, t, p, ds, dk, dv, turn_args, cid, True, SOFTCAP, FOLD)
        p, ds, dk, dv = _turn(last, 0, p, ds, dk, dv, turn_args, cid, False, SOFTCAP, FOLD)
        meet(TURN + cid, 256)
        dq_future = _dq_product(last, kv_s, ds_s, cid)
        pass_by(TURN + 1 - cid, 256)
        dq = warpgroup_mma_wait(0, deps=(dq_future,))
        _give(last, dq, dq_s, scale, cid, FOLD)
        meet(KEYS_DONE, 256)
    if not FOLD:
        dk = dk * scale
    # k and v are done with, and their shared memory carries the results out: 2 tiles of 16 bits, or 1 of 32.
    if WIDE:
        if FRESH or n > 0:
            wide = reinterpret(kv_s, gl.float32, [2, ROWS, D], gl.NVMMASharedLayout(128, 32, rank=2)).index(cid)
            wide.store(dv)
            fence_async_shared()
            mbarrier.arrive(dkv_full.index(cid), count=1)
            mbarrier.wait(dv_taken.index(cid), 0)
            wide.store(dk)
            fence_async_shared()
            mbarrier.arrive(dkv_full.index(cid), count=1)
    else:
        kv_s.index(2 * cid).store(dk.to(kv_s.dtype))
        kv_s.index(2 * cid + 1).store(dv.to(kv_s.dtype))
        fence_async_shared()
        mbarrier.arrive(dkv_full.index(cid), count=1)


@gluon.jit(do_not_specialize=["plan_stride", "order_stride", "n_queries", "n_keys", "n_kv_heads", "kv_group",
                              "n_all_heads", "section", "padded", "score_scale", "bend", "scale"])  # fmt: skip
def backward_kernel(q_desc, dout_desc, k_desc, v_desc, stats_desc, dq_desc, dk_desc, dv_desc,
                    QUERY_LO, QUERY_HI, ORDER, TURN_OF_DQ, plan_stride, order_stride, n_queries, n_keys, n_kv_heads,
                    kv_group, n_all_heads, section, padded, score_scale, bend, scale,
                    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, SOFTCAP: gl.constexpr,
                    FOLD: gl.constexpr, FRESH: gl.constexpr, DETERMINISTIC: gl.constexpr):  # fmt: skip
    """One tile of BN keys of one kv head: dk and dv whole, and its share of the dq of all queries that see it.

    dq_desc is fp32 and added to; dk_desc and dv_desc are fp32 and added to, or if FRESH written, or of 16 bits and
    written. stats_desc is what `statistics` made, flat. FOLD: ds carries the scale (free, but fp16 would lose
    small values), and so does delta in the statistics. n_all_heads counts kv heads times batch; `section` of them are
    worked on at a time.
    DETERMINISTIC: tiles of keys add to a tile of dq from the last to the first, by TURN_OF_DQ (batch, heads, tiles of
    queries) int32, which must be zeros; else it is not touched. In a causal mask the last tile that sees some queries
    begins with them, and those before it come to them later by as many tiles: in that order nobody waits for long.
    """
    n_tiles = (n_keys + BN - 1) // BN
    n_query_tiles = (n_queries + BM - 1) // BM
    flat_head, place = place_of(gl.program_id(0), n_tiles, n_all_heads, section)
    flat_head = _once(flat_head)
    batch = flat_head // n_kv_heads
    kv_head = flat_head % n_kv_heads
    QUERY_LO += batch.to(gl.int64) * plan_stride
    QUERY_HI += batch.to(gl.int64) * plan_stride
    # Blocks start in the order of their number. By turns, each waits for later tiles only: those that started before.
    if DETERMINISTIC:
        k0 = (n_tiles - 1 - place) * BN
    else:
        k0 = gl.load(ORDER + batch.to(gl.int64) * order_stride + place) * BN
    k0 = _once(k0)
    first, n, full_from, full_to = tile_range(QUERY_LO, QUERY_HI, k0, BN, BM, n_keys, n_queries)
    full_to = gl.where(k0 + BN > n_keys, 0, full_to)  # rows past the last key need the mask everywhere
    shared_from = n_query_tiles
    if DETERMINISTIC:
        # A tile that nobody sees takes part with no weight, so that who adds to a tile of dq is one run of tiles: the
        # turn comes from the tile behind, if that one's queries begin so early.
        n = gl.maximum(_end(QUERY_HI, k0 + BN, n_keys, n_queries, BM) - first, 0)
        TURN_OF_DQ += flat_head.to(gl.int64) * kv_group * n_query_tiles
        if k0 + BN < n_keys:
            shared_from = gl.load(QUERY_LO + k0 + BN) // BM
    stats_row = flat_head * kv_group * padded
    delta_offset = _once(n_all_heads * kv_group * padded)

    dtype: gl.constexpr = q_desc.dtype
    operand: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    flat: gl.constexpr = gl.NVMMASharedLayout(0, 32, rank=1)
    q_s = gl.allocate_shared_memory(dtype, [STAGES, BM, D], operand)
    dout_s = gl.allocate_shared_memory(dtype, [STAGES, BM, D], operand)
    kv_s = gl.allocate_shared_memory(dtype, [4, ROWS, D], operand)  # k and v of the first consumer, and of the second
    ds_s = gl.allocate_shared_memory(dtype, [4, ROWS, BM], operand)  # of both consumers, and again for the next tile
    dq_s = gl.allocate_shared_memory(gl.float32, [2, ROWS, ROWS], gl.NVMMASharedLayout(128, 32, rank=2))
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, BM], flat)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, BM], flat)
    bounds_s = gl.allocate_shared_memory(gl.int32, [4, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    kv_full = barriers(1, 1)
    dkv_full = barriers(2, 1)
    dv_taken = barriers(2, 1) if dk_desc.dtype == gl.float32 else dkv_full  # of which no use is made
    q_full = barriers(STAGES, 1)
    dout_full = barriers(STAGES, 1)
    fence_async_shared()
    load_args = (q_desc, dout_desc, k_desc, v_desc, stats_desc, q_s, dout_s, kv_s, lse_s, delta_s, kv_full, q_full,
                 dout_full, batch, kv_head, kv_group, k0, first, n, stats_row, padded, delta_offset)  # fmt: skip
    add_args = (dq_desc, dq_s, kv_s, dkv_full, dv_taken, batch, kv_head, kv_group, k0, first, n, TURN_OF_DQ,
                n_query_tiles, shared_from)  # fmt: skip
    args = (q_s, dout_s, kv_s, ds_s, dq_s, lse_s, delta_s, bounds_s, kv_full, q_full, dout_full, dkv_full, dv_taken,
            QUERY_LO, QUERY_HI, kv_group, k0, n_keys, first, n, full_from, full_to, score_scale, bend,
            scale)  # fmt: skip
    # The constexprs stand in every list: a tuple bound to a name would turn them into tensors.
    if DETERMINISTIC:
        gl.warp_specialize(
            [
                (_consume, (args, 0, dk_desc.dtype == gl.float32, FRESH, SOFTCAP, FOLD)),
                (_consume, (args, 1, dk_desc.dtype == gl.float32, FRESH, SOFTCAP, FOLD)),
                (load_tiles, (load_args, BM)),
                (add_gradients, (add_args, dk_desc, dv_desc, 0, BM, BN, FRESH, True)),
                (add_gradients, (add_args, dk_desc, dv_desc, 1, BM, BN, FRESH, True)),
            ],
            [4, 1, 1, 1],
            [240, 24, 24, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (args, 0, dk_desc.dtype == gl.float32, FRESH, SOFTCAP, FOLD)),
                (_consume, (args, 1, dk_desc.dtype == gl.float32, FRESH, SOFTCAP, FOLD)),
                (load_tiles, (load_args, BM)),
                (add_gradients, (add_args, dk_desc, dv_desc, 0, BM, BN, FRESH, False)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )


@gluon.jit
def _end(QUERY_HI, key, n_keys, n_queries, BM: gl.constexpr):
    """The tile of queries after the last that any key before `key` sees."""
    return (gl.minimum(gl.load(QUERY_HI + gl.minimum(key, n_keys) - 1), n_queries) + BM - 1) // BM
