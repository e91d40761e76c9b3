"""What the Triton kernels share: which program does what, which keys a tile needs, loading a tile, bending a score.

Kernels work on scores in base 2: s = outer * x, where x is q.k, or tanh(inner * q.k) with a softcap; then
p = exp2(s - lse * log2(e)). `outer` is (softcap or scale) * log2(e), `inner` is scale / softcap.
"""

from math import e, log2

import triton
import triton.language as tl

TILE: tl.constexpr = tl.constexpr(128)  # of the plan's orders; a BLOCK of rows divides it
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


def coefficients(scale: float, softcap: float) -> tuple[float, float]:
    """(inner, outer) of the kernels, which need a maximum to be one before and after."""
    assert scale >= 0, f"scale={scale}"
    return (scale / softcap, softcap * log2(e)) if softcap else (1.0, scale * log2(e))


@triton.jit
def locate(order, stride_order, length, pairs, heads, chunk, BLOCK: tl.constexpr):
    """(first row, batch, head) of this program, of ceil(length / TILE) * TILE / BLOCK * pairs programs.

    `pairs` counts (batch, head) pairs. They go in chunks whose keys fit the L2 cache together; within a chunk the
    tiles with most work go first, so that no long one starts last.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(length, TILE) * (TILE // BLOCK)
    first = program // (blocks * chunk) * chunk
    within = program % (blocks * chunk)
    size = tl.minimum(chunk, pairs - first)
    batch = (first + within % size) // heads
    head = (first + within % size) % heads
    rank = within // size
    tile = tl.load(order + batch * stride_order + rank // (TILE // BLOCK))
    return tile * TILE + rank % (TILE // BLOCK) * BLOCK, batch, head


@triton.jit
def split_range(low, high, row, rows, limit, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Blocks of columns for the rows [row, row + BLOCK_ROWS): (begin, left, full, total), the last three in blocks.

    From `begin` on, `left` blocks need the mask, then `full` blocks need none, then the rest of `total` need it.
    `low` and `high` point to the spans of row 0; both are monotone, so the first and last row bound all of them.
    """
    last = tl.minimum(row + BLOCK_ROWS, rows) - 1
    begin = tl.maximum(tl.load(low + row), 0) // BLOCK * BLOCK
    end = tl.minimum(tl.load(high + last), limit)
    full_begin = tl.cdiv(tl.maximum(tl.load(low + last), 0), BLOCK) * BLOCK
    full_end = tl.minimum(tl.load(high + row), limit) // BLOCK * BLOCK
    total = tl.cdiv(tl.maximum(end - begin, 0), BLOCK)
    full = tl.maximum(full_end - full_begin, 0) // BLOCK
    left = tl.where(full > 0, (full_begin - begin) // BLOCK, total)
    return begin, left, full, total


@triton.jit
def load_spans(low, high, row, rows, limit, BLOCK: tl.constexpr):
    """Spans of rows [row, row + BLOCK), empty beyond `rows`."""
    index = row + tl.arange(0, BLOCK)
    lows = tl.load(low + index, mask=index < rows, other=0)
    highs = tl.load(high + index, mask=index < rows, other=0)
    return lows, tl.minimum(highs, limit)


@triton.jit
def tile_pointers(base, stride, row, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, KEEP_OFFSETS: tl.constexpr = False):
    """Pointers to rows [row, row + ROWS) of a matrix with that row stride; 64-bit, as row * stride can pass 2^31.

    A wide product for every row; or if KEEP_OFFSETS one for the tile, and offsets that the compiler keeps in registers
    throughout a loop, up to 70 of them.
    """
    if KEEP_OFFSETS:
        base += tl.cast(row, tl.int64) * stride
        return base + (tl.arange(0, ROWS).to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :])
    rows = (row + tl.arange(0, ROWS)).to(tl.int64)
    return base + rows[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def tile_mask(row, limit, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    inside = (row + tl.arange(0, ROWS) < limit)[:, None]
    return inside & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]


@triton.jit
def load_tile(
    base, stride, row, limit, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDED: tl.constexpr,
    KEEP_OFFSETS: tl.constexpr = False,
):  # fmt: skip
    """(ROWS, BLOCK_D) from `row` on; zeros beyond HEAD_DIM and, where BOUNDED, beyond `limit` rows."""
    pointers = tile_pointers(base, stride, row, ROWS, BLOCK_D, KEEP_OFFSETS)
    if BOUNDED:
        return tl.load(pointers, mask=tile_mask(row, limit, ROWS, HEAD_DIM, BLOCK_D), other=0.0)
    elif HEAD_DIM == BLOCK_D:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b with exact products: `ieee` keeps fp32 inputs off TF32, and means nothing to 16-bit ones."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """tanh to 1e-7 absolute, and PRECISE also relative: near 0 the formula in exponents cancels, a series does not."""
    small = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    size = (1.0 - small) / (1.0 + small)
    result = tl.where(x < 0, -size, size)
    if PRECISE:
        x2 = x * x
        series = x * (1 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835)))))
        result = tl.where(x2 < 0.09, series, result)
    return result
