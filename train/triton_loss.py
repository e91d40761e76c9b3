"""Cross-entropy of rows of logits, which become their own gradient in place: two reads and one write of a row.

In plain PyTorch it is a copy in fp32 and seven passes. A row of 128k logits in bf16 on each of 132 multiprocessors is
34 MB, so that the second read comes from an H100's 50 MB of cache. CUDA devices of compute capability 8.0 and newer,
and Triton's interpreter; bf16, fp16 and fp32, sums in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringspan.kernels.launch import launch

BLOCK, WARPS = 4096, 8  # logits a program holds at a time: 16 a thread


@triton.jit
def cross_entropy_kernel(
    logits, labels, losses, stride, vocabulary, z_loss,
    BLOCK: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """A program a row: losses[row] = lse - logits[label] + z_loss lse^2, and 0 where the label is negative.

    With GRADIENT a row becomes its gradient, softmax (1 + 2 z_loss lse) - onehot(label), or 0 without a label.
    logits (rows, vocabulary) with ``stride`` elements from row to row, labels (rows,) int64, losses (rows,) fp32.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    logits += row * stride
    columns = tl.arange(0, BLOCK)
    if label < 0:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            for start in range(0, vocabulary, BLOCK):
                tl.store(logits + start + columns, 0.0, mask=start + columns < vocabulary)
    else:
        # Before any store: the reductions below are a barrier between. A label that is no token has a loss of NaN.
        picked = tl.load(logits + label, mask=label < vocabulary, other=float("nan")).to(tl.float32)
        # Each thread has a maximum and a sum of its own, so that no block of the row waits for a reduction. The first
        # maximum is finite: of a row's end and of logits of -inf there would else be inf - inf.
        largest = tl.full([BLOCK], -3.0e38, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocabulary, BLOCK):
            inside = start + columns < vocabulary
            x = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
            larger = tl.maximum(largest, x)
            total = total * tl.exp(largest - larger) + tl.exp(x - larger)
            largest = larger
        most = tl.max(largest, 0)
        lse = most + tl.log(tl.sum(total * tl.exp(largest - most), 0))
        tl.store(losses + row, lse - picked + z_loss * lse * lse)
        if GRADIENT:
            slope = 1.0 + 2.0 * z_loss * lse
            for start in range(0, vocabulary, BLOCK):
                inside = start + columns < vocabulary
                x = tl.load(logits + start + columns, mask=inside, other=0.0).to(tl.float32)
                gradient = slope * tl.exp(x - lse) - tl.where(start + columns == label, 1.0, 0.0)
                tl.store(logits + start + columns, gradient, mask=inside)


def cross_entropy_(logits: Tensor, labels: Tensor, z_loss: float, gradient: bool) -> Tensor:
    """Losses (rows,) in fp32 of logits (rows, vocabulary); with ``gradient``, logits become it in their own dtype."""
    losses = torch.empty(len(logits), device=logits.device)
    if len(logits):
        arguments = logits, labels, losses, logits.stride(0), logits.shape[1], float(z_loss)
        constants = {"BLOCK": min(BLOCK, triton.next_power_of_2(logits.shape[1])), "GRADIENT": gradient}
        launch(cross_entropy_kernel, (len(logits),), arguments, constants, logits.get_device(), num_warps=WARPS)
    return losses
