"""The warps of the backward pass on Hopper that move memory: one loads, others add dq and store dk and dv."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ringspan.kernels.gluon_compat import as_block, reinterpret, tma_add, tma_load, tma_store, tma_store_wait
from ringspan.kernels.hopper_tiles import meet, pass_by

STAGES = gl.constexpr(2)  # tiles of q and dout in flight; of dq's ds there are as many
ROWS = gl.constexpr(64)  # keys of a consumer, and of queries and of dims of the tiles of dq
# Named barriers, beside Triton's 0 to 2: each consumer's dq that is there, of even tiles and of odd ones; its turn;
# stages of q and dout that are free again; keys that nobody reads any more; and each consumer's dq that is taken.
DQ_FULL = gl.constexpr(4)
TURN = gl.constexpr(8)
FREE = gl.constexpr(10)
KEYS_DONE = gl.constexpr(12)
DQ_EMPTY = gl.constexpr(14)


@gluon.jit
def load_tiles(args, BM: gl.constexpr):
    (q_desc, dout_desc, k_desc, v_desc, stats_desc, q_s, dout_s, kv_s, lse_s, delta_s, kv_full, q_full, dout_full,
     batch, kv_head, kv_group, k0, first, n, stats_row, padded, delta_offset) = args  # fmt: skip
    if n > 0:
        mbarrier.expect(kv_full.index(0), 2 * k_desc.block_type.nbytes + 2 * v_desc.block_type.nbytes)
        for c in gl.static_range(2):
            where = [batch, k0 + c * ROWS, kv_head, 0]
            tma_load(k_desc, where, kv_full.index(0), as_block(kv_s.index(2 * c), k_desc))
            tma_load(v_desc, where, kv_full.index(0), as_block(kv_s.index(2 * c + 1), v_desc))
    for group_head in range(kv_group):
        head = kv_head * kv_group + group_head
        stats = stats_row + group_head * padded
        for t in range(n):
            i = group_head * n + t
            stage = i & 1
            row = (first + t) * BM
            if i >= STAGES:
                meet(FREE + stage, 256 + 32)
            mbarrier.expect(q_full.index(stage), q_desc.block_type.nbytes + stats_desc.block_type.nbytes)
            tma_load(stats_desc, [stats + row], q_full.index(stage), lse_s.index(stage))
            tma_load(q_desc, [batch, row, head, 0], q_full.index(stage), as_block(q_s.index(stage), q_desc))
            mbarrier.expect(dout_full.index(stage), dout_desc.block_type.nbytes + stats_desc.block_type.nbytes)
            tma_load(stats_desc, [delta_offset + stats + row], dout_full.index(stage), delta_s.index(stage))
            tma_load(dout_desc, [batch, row, head, 0], dout_full.index(stage), as_block(dout_s.index(stage), dout_desc))


@gluon.jit
def add_gradients(args, dk_desc, dv_desc, me: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, FRESH: gl.constexpr,
                  DETERMINISTIC: gl.constexpr):  # fmt: skip
    """Adds dq tile by tile, and in the end takes dk and dv from the shared memory of k and v.

    In a fixed order two warps do that, `me` 0 for even tiles and the first consumer, 1 for odd ones and the second: to
    wait for other blocks and to tell them takes longer than the products of a tile.
    """
    (dq_desc, dq_s, kv_s, dkv_full, dv_taken, batch, kv_head, kv_group, k0, first, n, TURNS, n_tiles,
     shared_from) = args  # fmt: skip
    WARPS: gl.constexpr = 2 if DETERMINISTIC else 1
    for c in gl.static_range(2):
        if WARPS == 1 or c == me:
            pass_by(DQ_EMPTY + c, 128 + 32)
    for c in gl.static_range(2):
        if me == WARPS - 1 and n > 0:  # what a consumer gives first is of no tile: it counts as -1, an odd one
            meet(DQ_FULL + 2 + c, 128 + 32)
            pass_by(DQ_EMPTY + c, 128 + 32)
    mine = k0 // BN + 2  # turns go from the last tile of keys to the first, and are never 0, with which they begin
    head = kv_head * kv_group
    t = me
    for i in range(me, kv_group * n, WARPS):
        while t >= n:
            t -= n
            head += 1
            TURNS += n_tiles
        turn = TURNS + first + t
        if DETERMINISTIC and first + t >= shared_from:
            _wait_turn(turn, mine)
        where = [batch, (first + t) * BM, head, 0]
        _add_dq(dq_desc, dq_s, where, turn, mine, i, BM, kv_s.shape[2], DETERMINISTIC)
        if DETERMINISTIC:
            _pass_turn(turn, mine - 1)
        t += WARPS
    if dk_desc.dtype != gl.float32 or FRESH or n > 0:
        for c in gl.static_range(2):
            if WARPS == 1 or c == me:
                where = [batch, k0 + c * ROWS, kv_head, 0]
                _store_dk_dv(dk_desc, dv_desc, where, kv_s, dkv_full.index(c), dv_taken.index(c), c, FRESH)
        tma_store_wait(0)


@gluon.jit
def _store_dk_dv(dk_desc, dv_desc, where, kv_s, full, dv_taken, c: gl.constexpr, FRESH: gl.constexpr):
    mbarrier.wait(full, 0)
    if dk_desc.dtype == gl.float32:
        wide = reinterpret(kv_s, gl.float32, [2, ROWS, kv_s.shape[2]], gl.NVMMASharedLayout(128, 32, rank=2)).index(c)
        _store_or_add(dv_desc, where, as_block(wide, dv_desc), FRESH)
        tma_store_wait(0)
        mbarrier.arrive(dv_taken, count=1)
        mbarrier.wait(full, 1)
        _store_or_add(dk_desc, where, as_block(wide, dk_desc), FRESH)
    else:
        tma_store(dk_desc, where, as_block(kv_s.index(2 * c), dk_desc))
        tma_store(dv_desc, where, as_block(kv_s.index(2 * c + 1), dv_desc))


@gluon.jit
def _add_dq(dq_desc, dq_s, where, turn, mine, i, BM: gl.constexpr, D: gl.constexpr, DETERMINISTIC: gl.constexpr):
    """What both consumers have of a tile of dq: half of its queries, or of its dims, or of its sum if it is 64 x 64."""
    SUMS: gl.constexpr = BM * D == ROWS * ROWS
    for c in gl.static_range(2):
        meet(DQ_FULL + (i & 1) * 2 + c, 128 + 32)
        row = where[1] + (c * ROWS if BM > ROWS else 0)
        tma_add(dq_desc, [where[0], row, where[2], c * ROWS if D > ROWS else 0], as_block(dq_s.index(c), dq_desc))
        tma_store_wait(0)
        pass_by(DQ_EMPTY + c, 128 + 32)
        if DETERMINISTIC and SUMS and c == 0:
            _pass_turn(turn, mine)  # still this block's: the second is added once the first is there


@gluon.jit
def _store_or_add(desc, where, tile, STORE: gl.constexpr):
    if STORE:
        tma_store(desc, where, tile)
    else:
        tma_add(desc, where, tile)


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
    """Sets the number at `at` to `turn` once what this warp added by TMA is there for all to see."""
    # Blocks are there when they are in global memory, not when they have left shared memory.
    gl.inline_asm_elementwise(
        "{ .reg .pred one; .reg .b32 lane; cp.async.bulk.wait_group 0; fence.proxy.async; bar.warp.sync 0xffffffff; "
        "mov.u32 lane, %laneid; setp.eq.u32 one, lane, 0; @one st.release.gpu.global.b32 [$1], $2; mov.b32 $0, $2; }",
        "=r,l,r",
        [at, turn],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
