"""The online softmax of Hopper's forward kernel: tiles of scores in registers, in base 2."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# By how much, in base 2, weights may exceed 1 before the running maximum follows, as in FlashAttention-4: most tiles
# then change no older sum. Weights reach 2^8 of fp16's 2^16, and sums of n of them n 2^8 of fp32's 2^128. What it
# costs: the largest weight of a row is no longer an exact 1, but rounded like the others. Where few weights make the
# sum, as in the tests, the error of bf16's out then goes from 0.24 to 0.37 eps.
SLACK = gl.constexpr(8.0)


@gluon.jit
def softmax(scores, top, score_scale):
    """(weights, new maximum, sums of the weights, factor by which older sums shrink).

    `top` is the maximum, or up to SLACK less. A row's four threads sum their own columns each, (rows, 4): they meet
    when all keys have passed.
    """
    highest = gl.max(scores, 1) * score_scale
    new_top = gl.where(highest > top + SLACK, highest, top)
    p = gl.exp2(scores * score_scale - new_top[:, None])
    sums = gl.sum(gl.sum(p.reshape((p.shape[0], p.shape[1] // 8, 4, 2)), 3), 1)
    return p, new_top, sums, gl.exp2(top - new_top)


@gluon.jit
def rescaled(acc, shrink):
    """acc (rows, columns), sums of a product, * shrink (rows, 1). Warps all of whose factors are 1 skip it.

    In assembly: a branch of the compiler's is one of all warps, which would have to meet first.
    """
    N: gl.constexpr = acc.shape[1] // 2  # values of a thread: two rows, of which four threads share each
    shrink, acc = gl.broadcast(shrink, acc)
    return gl.inline_asm_elementwise(_products(N), _in_place(N), [acc, shrink], dtype=gl.float32, is_pure=True, pack=N)


@gluon.constexpr_function
def _products(n):
    """Assembly: n values, two of one row, two of the other and so on, times the factors of the rows."""
    products = " ".join(f"mul.f32 ${i}, ${i}, {'ab'[i // 2 % 2]};" for i in range(n))
    return (
        f"{{ .reg .pred p; .reg .f32 a, b; mov.f32 a, ${2 * n}; mov.f32 b, ${2 * n + 2}; "
        "setp.neu.f32 p, a, 0f3F800000; @!p setp.neu.f32 p, b, 0f3F800000; vote.sync.any.pred p, p, 0xffffffff; "
        f"@!p bra same; {products} same: }}"
    )


@gluon.constexpr_function
def _in_place(n):
    """n results, each in the register of its operand, and the n factors."""
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + ["f"] * n)
