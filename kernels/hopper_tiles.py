"""What the Hopper kernels share: which tile comes next, which columns it needs, and barriers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


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
def barriers(N: gl.constexpr, ARRIVALS: gl.constexpr):
    """N barriers of shared memory, each passed when ARRIVALS have arrived. Make none that no warp is given.

    The memory of such a one is taken for the arguments of the warps, which on an H100 (driver 580) read the barrier in
    their place where the GPU went to another process at that moment.
    """
    many = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(many.index(i), count=ARRIVALS)
    return many


@gluon.jit
def meet(number, threads):
    """Waits until so many threads, these among them, have come to a named barrier."""
    gl.inline_asm_elementwise(
        "bar.sync $1, $2; mov.b32 $0, 0;", "=r,r,r", [number, threads], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def pass_by(number, threads):
    """Counts these threads as come to a named barrier, and goes on."""
    gl.inline_asm_elementwise(
        "bar.arrive $1, $2; mov.b32 $0, 0;", "=r,r,r", [number, threads], dtype=gl.int32, is_pure=False, pack=1
    )
