"""The forward pass on Hopper (sm_90): one warp moves tiles by TMA, two or three warpgroups multiply and do the softmax.

The grid is as large as the GPU: a program takes the next tile of queries whenever it has room for one, in the plan's
order, so that the first keys of a tile are there before the tile before it is finished, and all end together.

Each consumer warpgroup owns 64 query rows. While its tensor cores run P V of one key tile and Q K' of the next, its
other units do the softmax of the tile between, and the warpgroups take turns at the tensor cores. This is the
structure of FlashAttention-3 (Shah et al., arXiv 2407.08608); the mask is a span of keys per query, and the epilogue
merges with what earlier blocks of keys gave.

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
from ringspan.kernels.hopper_softmax import FLOOR, declare_exceeded, exceeded, rounded, softmax, weights_of
from ringspan.kernels.hopper_tiles import barriers, meet, pass_by, place_of, tile_range

ROWS = gl.constexpr(64)  # query rows of a consumer: what one warpgroup's matrix instruction takes
LN2 = gl.constexpr(0.6931471805599453)
SLOTS = gl.constexpr(2)  # tiles of queries that are announced ahead
FIELDS = gl.constexpr(8)  # int32 that say what a tile is, a power of two:
N_KEY_TILES = gl.constexpr(0)
Q0 = gl.constexpr(1)  # its first row
BATCH = gl.constexpr(2)
HEAD = gl.constexpr(3)
COLUMN = gl.constexpr(4)  # its first key
FULL_FROM = gl.constexpr(5)  # key tiles that need no mask
FULL_TO = gl.constexpr(6)
FLAT_HEAD = gl.constexpr(7)  # counted over the batch
# Named barriers, beside Triton's 0 to 3: of each consumer's warps, which compare their sums; of its turn; of each stage
# of k and of v that is free again. An mbarrier's arrival would make the warpgroup meet first, three times a tile.
CHECK = gl.constexpr(4)
TURN = gl.constexpr(7)
K_FREE = gl.constexpr(10)
V_FREE = gl.constexpr(13)


@gluon.jit
def _field(tile, number: gl.constexpr):
    """One of what `_announce` has said of a tile."""
    # Each thread holds all of them: picking one takes no shuffle.
    layout: gl.constexpr = gl.BlockedLayout([FIELDS], [32], [4], [0])
    return gl.sum(gl.where(gl.arange(0, FIELDS, layout=layout) == number, tile.load(layout), 0), 0)


@gluon.jit
def _announce(slot, tile_s, tile_full, tile_empty, n, q0, batch, head, column0, full_from, full_to, flat_head):
    """Tells the consumers of the next tile of queries; n < 0: there is none."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    field = gl.arange(0, FIELDS, layout=layout)
    values = gl.where(field == N_KEY_TILES, n, q0)
    values = gl.where(field == BATCH, batch, values)
    values = gl.where(field == HEAD, head, values)
    values = gl.where(field == COLUMN, column0, values)
    values = gl.where(field == FULL_FROM, full_from, values)
    values = gl.where(field == FULL_TO, full_to, values)
    values = gl.where(field == FLAT_HEAD, flat_head, values)
    tile_s.index(slot % SLOTS).store(values)
    mbarrier.arrive(tile_full.index(slot % SLOTS), count=1)


@gluon.jit
def _produce(args, NC: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, MERGE: gl.constexpr,
             IN_PLACE: gl.constexpr, ORDERED: gl.constexpr):  # fmt: skip
    """The loading warp: takes tiles of work as they come, tells the consumers, and keeps their memory filled."""
    (q_desc, k_desc, v_desc, old_desc, q_s, k_s, v_s, out_s, tile_s, bounds_s, q_full, q_empty, k_full, v_full,
     old_full, old_empty, tile_full, tile_empty, LO, HI, ORDER, TAKEN, plan_stride, order_stride, n_queries, n_keys,
     n_heads, kv_group, n_all_heads, section) = args  # fmt: skip
    BM: gl.constexpr = NC * ROWS
    HELD: gl.constexpr = q_s.shape[0] // NC
    of_rows: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    n_tiles = (n_queries + BM - 1) // BM
    base = 0  # tiles of keys, for all tiles of queries so far
    slot = 0
    work = gl.atomic_add(TAKEN, 1)  # the first as well: where two kernels overlap, programs start late
    while work < n_tiles * n_all_heads:
        flat_head, place = place_of(work, n_tiles, n_all_heads, section)
        batch = flat_head // n_heads
        head = flat_head % n_heads
        plan_row = batch.to(gl.int64) * plan_stride
        tile = gl.load(ORDER + batch.to(gl.int64) * order_stride + place) if ORDERED else n_tiles - 1 - place
        q0 = tile * BM
        first, n, full_from, full_to = tile_range(LO + plan_row, HI + plan_row, q0, BM, BN, n_queries, n_keys)
        work = gl.atomic_add(TAKEN, 1)  # a tile ahead, so that nobody waits for the answer
        if (n > 0) | (not IN_PLACE):  # no key here, and nothing to convert: old and lse stay as they are
            mbarrier.wait(tile_empty.index(slot % SLOTS), (slot // SLOTS & 1) ^ 1)
            for c in gl.static_range(NC):
                # Of 64 rows at a time: the warp has 24 registers a thread
                row = gl.minimum(q0 + c * ROWS + gl.arange(0, ROWS, layout=of_rows), n_queries - 1)
                place = (slot % SLOTS * NC + c) * 2
                bounds_s.index(place).store(gl.load(LO + plan_row + row))
                bounds_s.index(place + 1).store(gl.load(HI + plan_row + row))
            _announce(slot, tile_s, tile_full, tile_empty, n, q0, batch, head, first * BN, full_from, full_to,
                      flat_head)  # fmt: skip
            for c in gl.static_range(NC):
                # Fresh barriers let a wait for parity 1 pass: all start empty
                held = slot % HELD * NC + c
                mbarrier.wait(q_empty.index(held), (slot // HELD & 1) ^ 1)
                mbarrier.expect(q_full.index(held), q_desc.block_type.nbytes)
                tma_load(q_desc, [batch, q0 + c * ROWS, head, 0], q_full.index(held), as_block(q_s.index(held), q_desc))
            kv_head = head // kv_group
            begin = _first_of(n, full_from, full_to, NC)
            for j in range(n):
                stage = (base + j) % STAGES
                at = (first + _wrapped(begin + j, n)) * BN
                if base + j >= STAGES:
                    meet(K_FREE + stage, NC * 128 + 32)
                mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
                tma_load(k_desc, [batch, at, kv_head, 0], k_full.index(stage), as_block(k_s.index(stage), k_desc))
                if base + j >= STAGES:
                    meet(V_FREE + stage, NC * 128 + 32)
                mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
                tma_load(v_desc, [batch, at, kv_head, 0], v_full.index(stage), as_block(v_s.index(stage), v_desc))
            if MERGE:
                # Last, so that it delays no key: the consumers are a tile or two behind, which hides it.
                for c in gl.static_range(NC):
                    old = as_block(out_s.index(c), old_desc)
                    mbarrier.wait(old_empty.index(c), (slot & 1) ^ 1)
                    mbarrier.expect(old_full.index(c), old_desc.block_type.nbytes)
                    tma_load(old_desc, [batch, q0 + c * ROWS, head, 0], old_full.index(c), old)
            base += n
            slot += 1
    mbarrier.wait(tile_empty.index(slot % SLOTS), (slot // SLOTS & 1) ^ 1)
    _announce(slot, tile_s, tile_full, tile_empty, -1, 0, 0, 0, 0, 0, 0, 0)


@gluon.jit
def _first_of(n, full_from, full_to, NC: gl.constexpr):
    """The tile of keys to begin with: the first one without a mask, or else the last. Those before come at the end.

    In others some rows may see few keys or none: a low maximum, after which the next tile were multiplied twice. In
    causal windows of 1,024 that was one tile in 20 at head dim 128, one in 11 at 64.
    """
    if NC == 3:
        full_from = gl.minimum(full_from, full_to)  # of 192 rows the first may see nothing of the last tile of keys
    return gl.maximum(gl.minimum(full_from, n - 1), 0)


@gluon.jit
def _wrapped(j, n):
    return gl.where(j < n, j, j - n)


@gluon.jit
def _scores(scores, j, full_from, full_to, mask_args, SOFTCAP: gl.constexpr):
    """Softcap and mask of the j-th tile of raw products; what is masked becomes -inf."""
    if SOFTCAP:
        # tanh by exp2, exact to fp32: the hardware's tanh is good to 11 bits. An infinite exponent gives 1.
        tile, lo_s, hi_s, bend = mask_args
        scores = 1.0 - 2.0 / (gl.exp2(scores * bend) + 1.0)
    # Bounds are monotone: below full_to every row has all of a tile's keys below its hi, and so for lo.
    if j < full_from:
        scores = _masked(scores, j, mask_args, False)
    if j >= full_to:
        scores = _masked(scores, j, mask_args, True)
    return scores


@gluon.jit
def _masked(scores, j, mask_args, HIGH: gl.constexpr):
    """Keys at or above hi become -inf, or those below lo."""
    # The bounds are read again for each masked tile: they are near, and would cost registers in the whole loop.
    tile, lo_s, hi_s, bend = mask_args
    layout: gl.constexpr = scores.type.layout
    # A thread's columns are 8 apart from each other, but for two neighbours. Parted so, what is compared is a constant
    # of the instruction; else there were a register for each column, in the whole loop.
    column = gl.arange(0, scores.shape[1], layout=gl.SliceLayout(0, layout))
    eight = (column & -8)[None, :]
    offset = _field(tile, COLUMN) + j * scores.shape[1] + (column & 7)[None, :]
    if HIGH:
        keep = eight < hi_s.load(gl.SliceLayout(1, layout))[:, None] - offset
    else:
        keep = eight >= lo_s.load(gl.SliceLayout(1, layout))[:, None] - offset
    return gl.where(keep, scores, float("-inf"))


@gluon.jit
def _step(i, j, base, p, acc, top, total, full_from, full_to, loop_args, mask_args, cid: gl.constexpr, NC: gl.constexpr,
          STAGES: gl.constexpr, SOFTCAP: gl.constexpr):  # fmt: skip
    """Q K' of the i-th tile, which is tile j, and P V of the one before together, and beside that its softmax."""
    q, k_s, v_s, k_full, v_full, score_scale = loop_args
    BN: gl.constexpr = k_s.shape[1]
    D: gl.constexpr = k_s.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    zero = gl.zeros([ROWS, BN], gl.float32, layout=s_layout)
    at = base + i
    stage = at % STAGES
    older = (at - 1) % STAGES
    mbarrier.wait(k_full.index(stage), at // STAGES & 1)
    meet(TURN + cid, 256)
    s_future = warpgroup_mma(q, k_s.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(older), (at - 1) // STAGES & 1)
    o_future = warpgroup_mma(p, v_s.index(older), acc, is_async=True)
    pass_by(TURN + (cid + 1) % NC, 256)
    scores = warpgroup_mma_wait(1, deps=(s_future,))
    scores = _scores(scores, j, full_from, full_to, mask_args, SOFTCAP)
    weights, sums = weights_of(scores, top, score_scale)
    over = exceeded(sums, CHECK + cid)
    acc = warpgroup_mma_wait(0, deps=(o_future,))
    pass_by(V_FREE + older, NC * 128 + 32)
    p = gl.convert_layout(rounded(weights, v_s), p_layout)
    if over != 0:  # the keys are still held
        again = warpgroup_mma(q, k_s.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(again,))
        scores = _scores(scores, j, full_from, full_to, mask_args, SOFTCAP)
        weights, top, sums, shrink = softmax(scores, top, score_scale)
        p = gl.convert_layout(rounded(weights, v_s), p_layout)
        own_rows: gl.constexpr = gl.SliceLayout(1, sums.type.layout)
        total = total * gl.convert_layout(shrink, own_rows, assert_trivial=True)[:, None]
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))[:, None]
    pass_by(K_FREE + stage, NC * 128 + 32)
    return p, acc, top, total + sums


@gluon.jit
def _walk(n, base, full_from, full_to, loop_args, mask_args, cid: gl.constexpr, NC: gl.constexpr, STAGES: gl.constexpr,
          SOFTCAP: gl.constexpr):  # fmt: skip
    """64 queries past n > 0 tiles of keys: (sum of weighted values, running maximum, sum of weights)."""
    q, k_s, v_s, k_full, v_full, score_scale = loop_args
    BN: gl.constexpr = k_s.shape[1]
    D: gl.constexpr = k_s.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    acc = gl.zeros([ROWS, D], gl.float32, layout=o_layout)
    top = gl.full([ROWS], FLOOR, gl.float32, layout=s_rows)
    zero = gl.zeros([ROWS, BN], gl.float32, layout=s_layout)
    stage = base % STAGES
    mbarrier.wait(k_full.index(stage), base // STAGES & 1)
    meet(TURN + cid, 256)
    s_future = warpgroup_mma(q, k_s.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    pass_by(TURN + (cid + 1) % NC, 256)
    scores = warpgroup_mma_wait(0, deps=(s_future,))
    pass_by(K_FREE + stage, NC * 128 + 32)
    j = _first_of(n, full_from, full_to, NC)
    scores = _scores(scores, j, full_from, full_to, mask_args, SOFTCAP)
    weights, top, total, _ = softmax(scores, top, score_scale)
    p = gl.convert_layout(weights.to(v_s.dtype), p_layout)
    for i in range(1, n):
        j = _wrapped(j + 1, n)
        p, acc, top, total = _step(i, j, base, p, acc, top, total, full_from, full_to, loop_args, mask_args, cid, NC,
                                   STAGES, SOFTCAP)  # fmt: skip
    last = base + n - 1
    mbarrier.wait(v_full.index(last % STAGES), last // STAGES & 1)
    o_future = warpgroup_mma(p, v_s.index(last % STAGES), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(o_future,))
    pass_by(V_FREE + last % STAGES, NC * 128 + 32)
    return acc, top, gl.convert_layout(gl.sum(total, 1), s_rows)


@gluon.jit
def _consume(args, cid: gl.constexpr, NC: gl.constexpr, STAGES: gl.constexpr,
             MERGE: gl.constexpr, SOFTCAP: gl.constexpr):  # fmt: skip
    (out_desc, q_s, k_s, v_s, out_s, tile_s, bounds_s, q_full, q_empty, k_full, v_full, old_full, old_empty,
     tile_full, tile_empty, LSE, n_queries, score_scale, bend) = args  # fmt: skip
    BN: gl.constexpr = k_s.shape[1]
    D: gl.constexpr = k_s.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    HELD: gl.constexpr = q_s.shape[0] // NC
    base = 0  # tiles of keys, for all tiles of queries so far
    slot = 0
    if cid == NC - 1:
        pass_by(TURN, 256)  # the first turn is the first consumer's
    mbarrier.wait(tile_full.index(0), 0)
    n = _field(tile_s.index(0), N_KEY_TILES)
    while n >= 0:
        tile = tile_s.index(slot % SLOTS)
        at = (slot % SLOTS * NC + cid) * 2
        mask_args = (tile, bounds_s.index(at), bounds_s.index(at + 1), bend)
        acc = gl.zeros([ROWS, D], gl.float32, layout=o_layout)
        top = gl.full([ROWS], FLOOR, gl.float32, layout=s_rows)
        total = gl.full([ROWS], 0.0, gl.float32, layout=s_rows)
        held = slot % HELD * NC + cid
        q = q_s.index(held)
        mbarrier.wait(q_full.index(held), slot // HELD & 1)
        if HELD == 1:
            q = q.load(gl.DotOperandLayout(operand_index=0, parent=s_layout, k_width=2))
            mbarrier.arrive(q_empty.index(held), count=1)
        if n > 0:
            full_from = _field(tile, FULL_FROM)
            full_to = _field(tile, FULL_TO)
            loop_args = (q, k_s, v_s, k_full, v_full, score_scale)
            acc, top, total = _walk(n, base, full_from, full_to, loop_args, mask_args, cid, NC, STAGES, SOFTCAP)
            base += n
        if HELD == 2:
            mbarrier.arrive(q_empty.index(held), count=1)
        _write(acc, top, total, tile, LSE, n_queries, slot, out_desc, out_s.index(cid), old_full.index(cid),
               old_empty.index(cid), cid, MERGE)  # fmt: skip
        mbarrier.arrive(tile_empty.index(slot % SLOTS), count=1)
        slot += 1
        mbarrier.wait(tile_full.index(slot % SLOTS), slot // SLOTS & 1)
        n = _field(tile_s.index(slot % SLOTS), N_KEY_TILES)
    tma_store_wait(0)


@gluon.jit
def _write(acc, top, total, tile, LSE, n_queries, slot, out_desc, out, old_full, old_empty, cid: gl.constexpr,
           MERGE: gl.constexpr):  # fmt: skip
    """Normalizes, merges with what was there, and starts the stores of out and lse."""
    D: gl.constexpr = acc.shape[1]
    row0 = _field(tile, Q0) + cid * ROWS
    row = row0 + gl.arange(0, ROWS, layout=top.type.layout)
    inside = row < n_queries
    lse_at = LSE + _field(tile, FLAT_HEAD).to(gl.int64) * n_queries + row
    o_rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    empty = total == 0.0
    lse = gl.where(empty, float("-inf"), top * LN2 + gl.log(gl.where(empty, 1.0, total)))
    share = 1.0 / gl.where(empty, 1.0, total)
    if MERGE:
        # out = old * exp(before - lse') + new * exp(lse - lse'), lse' the log of both sums
        before = gl.load(lse_at, mask=inside, other=float("-inf"))
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
        gl.store(lse_at, lse, mask=inside)
        mbarrier.wait(old_full, slot & 1)
        acc = out.load(acc.type.layout) * kept[:, None] + acc * gl.convert_layout(share, o_rows)[:, None]
        if out_desc.dtype != gl.float32:
            # Triton 3.8 takes no view of half the memory: both halves, and the first of them
            out = reinterpret(out, out_desc.dtype, [2, ROWS, D], gl.NVMMASharedLayout(128, 16, rank=2)).index(0)
    else:
        acc = acc * gl.convert_layout(share, o_rows)[:, None]
        gl.store(lse_at, lse, mask=inside)
        tma_store_wait(0)  # of the tile before
    out.store(acc.to(out_desc.dtype))
    fence_async_shared()
    where = [_field(tile, BATCH), _field(tile, Q0) + cid * ROWS, _field(tile, HEAD), 0]
    tma_store(out_desc, where, as_block(out, out_desc))
    if MERGE:
        tma_store_wait(0)
        mbarrier.arrive(old_empty, count=1)


@gluon.jit(do_not_specialize=["plan_stride", "order_stride", "n_queries", "n_keys", "n_heads", "kv_group",
                              "n_all_heads", "section", "score_scale", "bend"])  # fmt: skip
def forward_kernel(q_desc, k_desc, v_desc, out_desc, old_desc, LSE, LO, HI, ORDER, TAKEN, plan_stride, order_stride,
                   n_queries, n_keys, n_heads, kv_group, n_all_heads, section, score_scale, bend,
                   NC: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
                   MERGE: gl.constexpr, SOFTCAP: gl.constexpr, ORDERED: gl.constexpr,
                   REGISTERS: gl.constexpr):  # fmt: skip
    """Tiles of NC * 64 queries of one head each: out and lse, merged with old and lse if MERGE.

    LSE (batch, heads, queries) fp32; LO, HI (1 or batch, queries); ORDER (1 or batch, tiles) if ORDERED, else the
    tiles run from the last one down; TAKEN (1,) int32 is 0 at the start: tiles taken.
    `section` heads are worked on at a time. score_scale is scale * log2(e), or softcap * log2(e) with SOFTCAP, whose
    `bend` is 2 * scale * log2(e) / softcap. REGISTERS: of a consumer's thread.
    """
    declare_exceeded()
    dtype: gl.constexpr = q_desc.dtype
    wide: gl.constexpr = gl.float32 if MERGE else out_desc.dtype
    # The next tile's queries come in while this one's are multiplied. Two consumers have these in registers, which also
    # spares shared memory a third of what Q K' reads; three have no room for them, but shared memory has, twice.
    HELD: gl.constexpr = NC - 1
    q_s = gl.allocate_shared_memory(dtype, [HELD * NC, ROWS, D], gl.NVMMASharedLayout(128, 16, rank=2))
    k_s = gl.allocate_shared_memory(dtype, [STAGES, BN, D], gl.NVMMASharedLayout(128, 16, rank=2))
    v_s = gl.allocate_shared_memory(dtype, [STAGES, BN, D], gl.NVMMASharedLayout(128, 16, rank=2))
    out_s = gl.allocate_shared_memory(wide, [NC, ROWS, D], gl.NVMMASharedLayout(128, wide.primitive_bitwidth, rank=2))
    tile_s = gl.allocate_shared_memory(gl.int32, [SLOTS, FIELDS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bounds_s = gl.allocate_shared_memory(gl.int32, [SLOTS * NC * 2, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = barriers(HELD * NC, 1)
    q_empty = barriers(HELD * NC, 1)
    old_full = barriers(NC, 1) if MERGE else q_full  # of which no use is made
    old_empty = barriers(NC, 1) if MERGE else q_empty
    k_full = barriers(STAGES, 1)
    v_full = barriers(STAGES, 1)
    tile_full = barriers(SLOTS, 1)
    tile_empty = barriers(SLOTS, NC)
    fence_async_shared()
    load_args = (q_desc, k_desc, v_desc, old_desc, q_s, k_s, v_s, out_s, tile_s, bounds_s, q_full, q_empty, k_full,
                 v_full, old_full, old_empty, tile_full, tile_empty, LO, HI, ORDER, TAKEN, plan_stride,
                 order_stride, n_queries, n_keys, n_heads, kv_group, n_all_heads, section)  # fmt: skip
    args = (out_desc, q_s, k_s, v_s, out_s, tile_s, bounds_s, q_full, q_empty, k_full, v_full, old_full, old_empty,
            tile_full, tile_empty, LSE, n_queries, score_scale, bend)  # fmt: skip
    # The constexprs stand in every list: a tuple bound to a name would turn them into tensors. The loading warp has
    # what 504 registers leave: given more, the compiler takes it from the consumers, and serialises their products.
    if NC == 2:
        gl.warp_specialize(
            [
                (_consume, (args, 0, NC, STAGES, MERGE, SOFTCAP)),
                (_consume, (args, 1, NC, STAGES, MERGE, SOFTCAP)),
                (_produce, (load_args, NC, BN, STAGES, MERGE, MERGE and out_desc.dtype == gl.float32, ORDERED)),
            ],
            [4, 1],
            [REGISTERS, 504 - NC * REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (args, 0, NC, STAGES, MERGE, SOFTCAP)),
                (_consume, (args, 1, NC, STAGES, MERGE, SOFTCAP)),
                (_consume, (args, 2, NC, STAGES, MERGE, SOFTCAP)),
                (_produce, (load_args, NC, BN, STAGES, MERGE, MERGE and out_desc.dtype == gl.float32, ORDERED)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 504 - NC * REGISTERS],
        )
