"""The forward pass on Hopper (sm_90): one warp moves tiles by TMA, two or three warpgroups multiply and do the softmax.

Each consumer warpgroup owns 64 query rows. While its tensor cores run P V of one key tile and Q K' of the next, its
other units do the softmax of the tile between; with `TURNS` the warpgroups also take turns at the tensor cores. This
is the structure of FlashAttention-3 (Shah et al., arXiv 2407.08608); the mask is a span of keys per query, and the
epilogue merges with what earlier blocks of keys gave.

Every tensor is a 4-D TMA descriptor (batch, length, heads, dim), so that a tile that reaches over the end of its
sequence reads zeros and writes nothing there. Scores are kept in base 2.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ringspan.kernels.gluon_compat import as_block, reinterpret, tma_load, tma_store, tma_store_wait

ROWS = gl.constexpr(64)  # query rows of a consumer: what one warpgroup's matrix instruction takes
# The running maximum starts at a finite floor: exp2(-inf - floor) is 0 where exp2(-inf - -inf) would be NaN.
FLOOR = gl.constexpr(-1.0e30)
LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)
NEVER = gl.constexpr(0)
ALWAYS = gl.constexpr(1)
TEST = gl.constexpr(2)


@gluon.jit
def place_of(work, n_tiles, n_heads, group):
    """(head, place in its work order) of a work item: `group` heads at a time, so that their keys stay in L2."""
    section = work // (n_tiles * group)
    rest = work - section * n_tiles * group
    width = gl.minimum(group, n_heads - section * group)
    return section * group + rest % width, rest // width


@gluon.jit
def tile_range(LO, HI, start, SIZE: gl.constexpr, STEP: gl.constexpr, n_rows, n_columns):
    """(first tile, number of tiles, unmasked from, unmasked to) of the columns that rows start .. start + SIZE need.

    The last two count from the first tile, and no tile is unmasked unless from < to. Bounds are monotone: four do.
    """
    last = gl.minimum(start + SIZE, n_rows) - 1
    lo = gl.load(LO + start)
    hi = gl.minimum(gl.load(HI + last), n_columns)
    first = lo // STEP
    n = gl.where(lo < hi, (hi + STEP - 1) // STEP - first, 0)
    full_from = (gl.load(LO + last) + STEP - 1) // STEP - first
    full_to = gl.load(HI + start) // STEP - first
    return first, n, full_from, full_to


@gluon.jit
def _produce(
    args, NC: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, MERGE: gl.constexpr, IN_PLACE: gl.constexpr
):
    (q_desc, k_desc, v_desc, old_desc, q_s, k_s, v_s, out_s, q_full, k_full, k_empty, v_full, v_empty, old_full,
     batch, head, kv_head, q0, first, n) = args  # fmt: skip
    if n > 0:
        for c in gl.static_range(NC):
            mbarrier.expect(q_full.index(c), q_desc.block_type.nbytes)
            tma_load(q_desc, [batch, q0 + c * ROWS, head, 0], q_full.index(c), as_block(q_s.index(c), q_desc))
    for i in range(n):
        stage = i % STAGES
        free = (i // STAGES & 1) ^ 1  # a fresh barrier lets a wait for parity 1 pass: every stage starts empty
        row = (first + i) * BN
        mbarrier.wait(k_empty.index(stage), free)
        mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
        tma_load(k_desc, [batch, row, kv_head, 0], k_full.index(stage), as_block(k_s.index(stage), k_desc))
        mbarrier.wait(v_empty.index(stage), free)
        mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
        tma_load(v_desc, [batch, row, kv_head, 0], v_full.index(stage), as_block(v_s.index(stage), v_desc))
    if MERGE and ((n > 0) | (not IN_PLACE)):
        # Last, so that it delays no key: the consumers are a tile or two behind, which hides it.
        for c in gl.static_range(NC):
            mbarrier.expect(old_full.index(c), old_desc.block_type.nbytes)
            tma_load(old_desc, [batch, q0 + c * ROWS, head, 0], old_full.index(c), as_block(out_s.index(c), old_desc))


@gluon.jit
def _scores(scores, i, score_args, MASK: gl.constexpr, SOFTCAP: gl.constexpr):
    """Softcap and mask of one tile of raw products; what is masked becomes -inf."""
    LO, HI, row0, first, full_from, full_to, n_queries, bend = score_args
    layout: gl.constexpr = scores.type.layout
    BN: gl.constexpr = scores.shape[1]
    if SOFTCAP:
        # tanh by exp2, exact to fp32: the hardware's tanh is good to 11 bits. An infinite exponent gives 1.
        scores = 1.0 - 2.0 / (gl.exp2(scores * bend) + 1.0)
    if MASK == TEST:
        if (i < full_from) | (i >= full_to):
            scores = _masked(scores, LO, HI, row0, (first + i) * BN, n_queries, layout)
    elif MASK == ALWAYS:
        scores = _masked(scores, LO, HI, row0, (first + i) * BN, n_queries, layout)
    return scores


@gluon.jit
def _masked(scores, LO, HI, row0, column0, n_queries, layout: gl.constexpr):
    # Bounds are read again for each masked tile: they come from L1, and would cost registers in the whole loop.
    row = gl.minimum(row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout)), n_queries - 1)
    lo = gl.load(LO + row)
    hi = gl.load(HI + row)
    # column0 belongs here, not to lo and hi: without it these are constants of the loop, kept in 32 registers
    column = column0 + gl.arange(0, scores.shape[1], layout=gl.SliceLayout(0, layout))
    keep = (column[None, :] >= lo[:, None]) & (column[None, :] < hi[:, None])
    return gl.where(keep, scores, float("-inf"))


@gluon.jit
def _softmax(scores, top, total, score_scale):
    """(weights, new maximum, new sum, factor by which older sums shrink)."""
    new_top = gl.maximum(top, gl.max(scores, 1) * score_scale)
    p = gl.exp2(scores * score_scale - new_top[:, None])
    shrink = gl.exp2(top - new_top)
    return p, new_top, total * shrink + gl.sum(p, 1), shrink


@gluon.jit
def _step(i, p, acc, top, total, loop_args, cid: gl.constexpr, NC: gl.constexpr, STAGES: gl.constexpr,
          TURNS: gl.constexpr, MASK: gl.constexpr, SOFTCAP: gl.constexpr):  # fmt: skip
    """Q K' of tile i and P V of tile i - 1 together, and the softmax of tile i beside the latter."""
    q, k_s, v_s, k_full, k_empty, v_full, v_empty, turn, score_args, score_scale = loop_args
    BN: gl.constexpr = k_s.shape[1]
    D: gl.constexpr = k_s.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    zero = gl.zeros([ROWS, BN], gl.float32, layout=s_layout)
    stage = i % STAGES
    older = (i - 1) % STAGES
    mbarrier.wait(k_full.index(stage), i // STAGES & 1)
    if TURNS:
        mbarrier.wait(turn.index(cid), (i - 1 + (1 if cid == 0 else 0)) & 1)
    s_future = warpgroup_mma(q, k_s.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(older), (i - 1) // STAGES & 1)
    o_future = warpgroup_mma(p, v_s.index(older), acc, is_async=True)
    if TURNS:
        mbarrier.arrive(turn.index((cid + 1) % NC), count=1)
    scores = warpgroup_mma_wait(1, deps=(s_future,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    scores = _scores(scores, i, score_args, MASK, SOFTCAP)
    weights, top, total, shrink = _softmax(scores, top, total, score_scale)
    acc = warpgroup_mma_wait(0, deps=(o_future,))
    mbarrier.arrive(v_empty.index(older), count=1)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))[:, None]
    return gl.convert_layout(weights.to(q.dtype), p_layout), acc, top, total


@gluon.jit
def _consume(args, cid: gl.constexpr, NC: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,  # noqa: PLR0915
             PEEL: gl.constexpr, MERGE: gl.constexpr, SOFTCAP: gl.constexpr):  # fmt: skip
    (out_desc, q_s, k_s, v_s, out_s, q_full, k_full, k_empty, v_full, v_empty, old_full, turn, LSE, LO, HI,
     batch, head, q0, first, n, full_from, full_to, n_queries, score_scale, bend) = args  # fmt: skip
    BN: gl.constexpr = k_s.shape[1]
    D: gl.constexpr = k_s.shape[2]
    dtype: gl.constexpr = q_s.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    row0 = q0 + cid * ROWS
    score_args = (LO, HI, row0, first, full_from, full_to, n_queries, bend)
    q = q_s.index(cid)
    loop_args = (q, k_s, v_s, k_full, k_empty, v_full, v_empty, turn, score_args, score_scale)

    acc = gl.zeros([ROWS, D], gl.float32, layout=o_layout)
    top = gl.full([ROWS], FLOOR, gl.float32, layout=s_rows)
    total = gl.full([ROWS], 0.0, gl.float32, layout=s_rows)
    if n > 0:
        mbarrier.wait(q_full.index(cid), 0)
        mbarrier.wait(k_full.index(0), 0)
        zero = gl.zeros([ROWS, BN], gl.float32, layout=s_layout)
        s_future = warpgroup_mma(q, k_s.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(s_future,))
        mbarrier.arrive(k_empty.index(0), count=1)
        scores = _scores(scores, 0, score_args, TEST, SOFTCAP)
        weights, top, total, _ = _softmax(scores, top, total, score_scale)
        p = gl.convert_layout(weights.to(dtype), p_layout)
        if PEEL:
            masked_to = gl.minimum(gl.maximum(full_from, 1), n)
            whole_to = gl.minimum(gl.maximum(full_to, masked_to), n)
            for i in range(1, masked_to):
                p, acc, top, total = _step(i, p, acc, top, total, loop_args, cid, NC, STAGES, TURNS, ALWAYS, SOFTCAP)
            for i in range(masked_to, whole_to):
                p, acc, top, total = _step(i, p, acc, top, total, loop_args, cid, NC, STAGES, TURNS, NEVER, SOFTCAP)
            for i in range(whole_to, n):
                p, acc, top, total = _step(i, p, acc, top, total, loop_args, cid, NC, STAGES, TURNS, ALWAYS, SOFTCAP)
        else:
            for i in range(1, n):
                p, acc, top, total = _step(i, p, acc, top, total, loop_args, cid, NC, STAGES, TURNS, TEST, SOFTCAP)
        mbarrier.wait(v_full.index((n - 1) % STAGES), (n - 1) // STAGES & 1)
        o_future = warpgroup_mma(p, v_s.index((n - 1) % STAGES), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(o_future,))

    IN_PLACE: gl.constexpr = MERGE and out_desc.dtype == gl.float32
    if (n > 0) | (not IN_PLACE):  # no key here, and nothing to convert: old and lse stay as they are
        row = row0 + gl.arange(0, ROWS, layout=s_rows)
        lse_at = LSE + row
        empty = total == 0.0
        lse = gl.where(empty, float("-inf"), top * LN2 + gl.log(gl.where(empty, 1.0, total)))
        share = 1.0 / gl.where(empty, 1.0, total)
        out = out_s.index(cid)
        if MERGE:
            # out = old * exp(before - lse') + new * exp(lse - lse'), lse' the log of both sums
            before = gl.load(lse_at, mask=row < n_queries, other=float("-inf"))
            high = gl.maximum(before, lse)
            high = gl.where(high == float("-inf"), 0.0, high)
            old_weight = gl.exp(before - high)
            new_weight = gl.exp(lse - high)
            both = old_weight + new_weight
            keyless = both == 0.0  # no key here nor before: the old row stays, and so does its lse of -inf
            both = gl.where(keyless, 1.0, both)
            lse = gl.where(keyless, float("-inf"), high + gl.log(both))
            share = share * new_weight / both
            kept = gl.convert_layout(gl.where(keyless, 1.0, old_weight / both), o_rows)
            mbarrier.wait(old_full.index(cid), 0)
            acc = out.load(o_layout) * kept[:, None] + acc * gl.convert_layout(share, o_rows)[:, None]
            if out_desc.dtype != gl.float32:
                out = reinterpret(out, out_desc.dtype, [ROWS, D], gl.NVMMASharedLayout(128, 16, rank=2))
        else:
            acc = acc * gl.convert_layout(share, o_rows)[:, None]
        gl.store(lse_at, lse, mask=row < n_queries)
        out.store(acc.to(out_desc.dtype))
        fence_async_shared()
        tma_store(out_desc, [batch, row0, head, 0], as_block(out, out_desc))
        tma_store_wait(0)


@gluon.jit(do_not_specialize=["plan_stride", "order_stride", "n_queries", "n_keys", "n_heads", "kv_group",
                              "n_all_heads", "section", "score_scale", "bend"])  # fmt: skip
def forward_kernel(q_desc, k_desc, v_desc, out_desc, old_desc, LSE, LO, HI, ORDER, plan_stride, order_stride,
                   n_queries, n_keys, n_heads, kv_group, n_all_heads, section, score_scale, bend,
                   NC: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
                   PEEL: gl.constexpr, MERGE: gl.constexpr, SOFTCAP: gl.constexpr, ORDERED: gl.constexpr,
                   REGISTERS: gl.constexpr):  # fmt: skip
    """One tile of NC * 64 queries of one head: out and lse, merged with old and lse if MERGE.

    LSE (batch, heads, queries) fp32; LO, HI (1 or batch, queries); ORDER (1 or batch, tiles) if ORDERED, else the
    tiles run from the last one down. `section` heads are worked on at a time. score_scale is scale * log2(e), or
    softcap * log2(e) with SOFTCAP, whose `bend` is 2 * scale * log2(e) / softcap. REGISTERS: of a consumer's thread.
    """
    BM: gl.constexpr = NC * ROWS
    n_tiles = (n_queries + BM - 1) // BM
    flat_head, place = place_of(gl.program_id(0), n_tiles, n_all_heads, section)
    batch = flat_head // n_heads
    head = flat_head % n_heads
    LO += batch.to(gl.int64) * plan_stride
    HI += batch.to(gl.int64) * plan_stride
    LSE += flat_head.to(gl.int64) * n_queries
    tile = gl.load(ORDER + batch.to(gl.int64) * order_stride + place) if ORDERED else n_tiles - 1 - place
    q0 = tile * BM
    first, n, full_from, full_to = tile_range(LO, HI, q0, BM, BN, n_queries, n_keys)

    dtype: gl.constexpr = q_desc.dtype
    wide: gl.constexpr = gl.float32 if MERGE else out_desc.dtype
    q_s = gl.allocate_shared_memory(dtype, [NC, ROWS, D], gl.NVMMASharedLayout(128, 16, rank=2))
    k_s = gl.allocate_shared_memory(dtype, [STAGES, BN, D], gl.NVMMASharedLayout(128, 16, rank=2))
    v_s = gl.allocate_shared_memory(dtype, [STAGES, BN, D], gl.NVMMASharedLayout(128, 16, rank=2))
    out_s = gl.allocate_shared_memory(wide, [NC, ROWS, D], gl.NVMMASharedLayout(128, wide.primitive_bitwidth, rank=2))
    q_full = barriers(NC, 1)
    old_full = barriers(NC, 1)
    turn = barriers(NC, 1)
    k_full = barriers(STAGES, 1)
    v_full = barriers(STAGES, 1)
    k_empty = barriers(STAGES, NC)
    v_empty = barriers(STAGES, NC)
    fence_async_shared()
    load_args = (q_desc, k_desc, v_desc, old_desc, q_s, k_s, v_s, out_s, q_full, k_full, k_empty, v_full, v_empty,
                 old_full, batch, head, head // kv_group, q0, first, n)  # fmt: skip
    args = (out_desc, q_s, k_s, v_s, out_s, q_full, k_full, k_empty, v_full, v_empty, old_full, turn, LSE, LO, HI,
            batch, head, q0, first, n, full_from, full_to, n_queries, score_scale, bend)  # fmt: skip
    # The constexprs stand in every list: a tuple bound to a name would turn them into tensors. 24 registers for the
    # loading warp: with more the compiler takes them from the consumers, and serialises their matrix products.
    if NC == 2:
        gl.warp_specialize(
            [
                (_consume, (args, 0, NC, STAGES, TURNS, PEEL, MERGE, SOFTCAP)),
                (_consume, (args, 1, NC, STAGES, TURNS, PEEL, MERGE, SOFTCAP)),
                (_produce, (load_args, NC, BN, STAGES, MERGE, out_desc.dtype == gl.float32)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (args, 0, NC, STAGES, TURNS, PEEL, MERGE, SOFTCAP)),
                (_consume, (args, 1, NC, STAGES, TURNS, PEEL, MERGE, SOFTCAP)),
                (_consume, (args, 2, NC, STAGES, TURNS, PEEL, MERGE, SOFTCAP)),
                (_produce, (load_args, NC, BN, STAGES, MERGE, out_desc.dtype == gl.float32)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )


@gluon.jit
def barriers(N: gl.constexpr, ARRIVALS: gl.constexpr):
    """N barriers of shared memory, each passed when ARRIVALS have arrived."""
    many = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(many.index(i), count=ARRIVALS)
    return many
