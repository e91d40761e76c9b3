"""The online softmax of Hopper's forward kernel: tiles of scores in registers, in base 2.

A tile's weights are taken against the maximum of the tiles before, with no look at its own. The sums of the weights,
needed anyway, tell whether that was too low; then the tile is multiplied once more and takes the maximum along. So most
tiles have no maximum, which is a sixth of a tile's instructions and the first half of its chain of dependent ones, and
rescale no older sums. FlashAttention-4 goes half of the way: it looks for each maximum, and follows it lazily.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# The running maximum starts at a finite floor: exp2(-inf - floor) is 0 where exp2(-inf - -inf) would be NaN.
FLOOR = gl.constexpr(-1.0e30)


@gluon.jit
def weights_of(scores, top, score_scale):
    """(weights, sums of the weights). A row's four threads sum their own columns each, (rows, 4)."""
    p = gl.exp2(scores * score_scale - top[:, None])
    return p, gl.sum(gl.sum(p.reshape((p.shape[0], p.shape[1] // 8, 4, 2)), 3), 1)


@gluon.jit
def softmax(scores, top, score_scale):
    """(weights, new maximum, sums of the weights, factor by which older sums shrink)."""
    new_top = gl.maximum(top, gl.max(scores, 1) * score_scale)
    p, sums = weights_of(scores, new_top, score_scale)
    return p, new_top, sums, gl.exp2(top - new_top)


@gluon.jit
def declare_exceeded():
    """To be called once, where a kernel begins: what `exceeded` keeps between two pieces of assembly."""
    gl.inline_asm_elementwise(
        ".reg .pred ringspan_exceeded; mov.b32 $0, 0;", "=r,r", [gl.num_programs(0)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def exceeded(sums, number):
    """Whether a sum of any of a consumer's four warps is above 2^12, or NaN: int32, the same for all of its threads.

    Weights then are at most 2^12 of fp16's 2^16, and sums of n of them n 2^12 of fp32's 2^128. `number` is of a named
    barrier that nobody else uses.
    """
    # The barrier's answer is a predicate, which outlives the first assembly: as a value it were one of every element of
    # `sums`, and making one of those takes shuffles.
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.gtu.f32 p, $2, 0f45800000; setp.gtu.or.f32 p, $3, 0f45800000, p; "
        "barrier.cta.red.or.pred ringspan_exceeded, $4, 128, p; mov.b32 $0, 0; mov.b32 $1, 0; }",
        "=r,=r,f,f,r,r",
        [sums, number],
        dtype=gl.int32,
        is_pure=False,
        pack=2,
    )
    return gl.inline_asm_elementwise(
        "selp.b32 $0, 1, 0, ringspan_exceeded;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def rounded(x, like):
    """x in the 16 bits of `like`, here and not later: else 32 bits are kept across the branch that follows."""
    ROUND: gl.constexpr = "cvt.rn.bf16x2.f32" if like.dtype == gl.bfloat16 else "cvt.rn.f16x2.f32"
    return gl.inline_asm_elementwise(ROUND + " $0, $2, $1;", "=r,f,f", [x], dtype=like.dtype, is_pure=True, pack=2)
