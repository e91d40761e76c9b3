"""The kernel of rounded_sum: a program for a piece of a row, which is dense in all tensors."""

import triton
import triton.language as tl
from torch import Tensor

from ringspan.kernels.launch import launch

BLOCK = 2048  # elements of a program: 16 KiB of two fp32 inputs


@triton.jit(do_not_specialize=["rows"])
def rounded_sum_kernel(
    out, a, b, out_batch, out_row, a_batch, a_row, b_batch, b_row, rows, size,
    BLOCK: tl.constexpr, HAS_B: tl.constexpr,
):  # fmt: skip
    """out = a + b, or a: rows of ``size`` elements, each tensor with its strides of batch rows and rows in elements."""
    batch, row = (tl.program_id(0) // rows).to(tl.int64), (tl.program_id(0) % rows).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    total = tl.load(a + batch * a_batch + row * a_row + column, mask=inside).to(tl.float32)
    if HAS_B:
        total += tl.load(b + batch * b_batch + row * b_row + column, mask=inside).to(tl.float32)
    tl.store(out + batch * out_batch + row * out_row + column, total.to(out.dtype.element_ty), mask=inside)


def rounded_sum(out: Tensor, a: Tensor, b: Tensor | None) -> None:
    """``rounding.rounded_sum`` of tensors of at most 32 bits."""
    batch, rows, heads, dim = out.shape
    other = a if b is None else b
    for x in (out, a, other):
        assert x.shape == out.shape, f"{tuple(x.shape)} and {tuple(out.shape)}"
        dense = (heads == 1 or x.stride(2) == dim) and (dim == 1 or x.stride(3) == 1)
        assert dense, f"heads of strides {x.stride()} are not dense"
    strides = [stride for x in (out, a, other) for stride in x.stride()[:2]]
    launch(
        rounded_sum_kernel,
        (batch * rows, triton.cdiv(heads * dim, BLOCK)),
        (out, a, other, *strides, rows, heads * dim),
        {"BLOCK": BLOCK, "HAS_B": b is not None},
        out.get_device(),
    )
