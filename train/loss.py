"""The vocabulary projection and its cross-entropy, fused and a chunk of tokens at a time: logits are never whole.

At 128k tokens and a vocabulary of 128k, logits in bf16 would be 32 GiB; a chunk of them is at most 1 GiB, in one buffer
for all chunks, and becomes its own gradient there. The gradients are computed beside the loss, so that backward only
scales them and no chunk is projected twice.
"""

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringspan.parallel.parts import within

BYTES_OF_A_CHUNK = 2**30
ROWS_OF_A_CHUNK = 8192  # beyond this a matrix product gains nothing, whatever the vocabulary


def cross_entropy_sum(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None, z_loss: float = 0.0
) -> Tensor:
    """Sum of -log softmax(logits)[label] + z_loss logsumexp(logits)^2 over the tokens whose label is 0 or more.

    The logits are hidden weight^T: hidden (..., dim), weight (vocabulary, dim), labels (...) int64; ``chunk`` is the
    tokens projected at once. The second term keeps logits from drifting (PaLM, Chowdhery and others, arXiv 2204.02311).
    Log-softmax, the sum, and the weight's gradient over the chunks are fp32 (fp64 for fp64). Returns a scalar of
    that dtype, which is 0 with zero gradients where no token has a label.
    """
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    chunk = chunk or rows_of_chunk(len(flat), weight.shape[0], weight.element_size())
    return _FusedCrossEntropy.apply(flat, weight, wanted, chunk, z_loss, torch.is_grad_enabled())


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """(loss, whether the likeliest token is the label) of each token, as labels (...): fp32 (fp64 for fp64) and bool.

    Where there is no label they are 0 and False. Shapes and ``chunk`` as for `cross_entropy_sum`; has no gradients.
    """
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    chunk = chunk or rows_of_chunk(len(flat), weight.shape[0], weight.element_size())
    losses = torch.empty(wanted.shape, dtype=_wide(hidden.dtype), device=hidden.device)
    hits = torch.empty_like(wanted, dtype=torch.bool)
    for part, logits in _logits(flat, weight, chunk):
        hits[part] = logits.argmax(dim=-1) == wanted[part]
        losses[part] = _cross_entropy_(logits, wanted[part], 0.0, False)[0]
    return losses.view_as(labels), hits.view_as(labels)


def rows_of_chunk(rows: int, vocabulary: int, element_bytes: int) -> int:
    """Tokens projected at once, so that their logits are at most BYTES_OF_A_CHUNK: equal chunks, of whole tiles."""
    most = max(1, min(BYTES_OF_A_CHUNK // (vocabulary * element_bytes), ROWS_OF_A_CHUNK))
    chunks = max(1, -(-rows // most))
    return min(most, -(-rows // chunks // 128) * 128 or 1)


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    @within("loss")
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, z_loss: float, want_grads: bool
    ) -> Tensor:
        wants = [want_grads and need for need in ctx.needs_input_grad[:2]]
        wide = _wide(hidden.dtype)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        dhidden = torch.empty_like(hidden) if wants[0] else None
        dweight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wants[1] else None
        for part, logits in _logits(hidden, weight, chunk):
            losses, dlogits = _cross_entropy_(logits, labels[part], z_loss, any(wants))
            loss += losses.sum()
            if dhidden is not None:
                torch.mm(dlogits, weight, out=dhidden[part])
            if dweight is not None:
                _add_product(dweight, dlogits.T, hidden[part])
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    @within("loss")
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        dhidden, dweight = ctx.saved_tensors
        dhidden = None if dhidden is None else dhidden * dloss
        if dweight is not None:  # in the weight's dtype at once: in fp32 it would be another 2 GiB at 128k x 4096
            dweight = torch.mul(dweight, dloss, out=torch.empty_like(dweight, dtype=ctx.weight_dtype))
        return dhidden, dweight, None, None, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _logits(hidden: Tensor, weight: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """Of each chunk of rows: (which rows, their logits). All are the same memory, which the reader may overwrite."""
    buffer = hidden.new_empty(min(chunk, len(hidden)), weight.shape[0])
    for start in range(0, len(hidden), chunk):
        rows = hidden[start : start + chunk]
        yield slice(start, start + chunk), torch.mm(rows, weight.T, out=buffer[: len(rows)])


def _cross_entropy_(logits: Tensor, labels: Tensor, z_loss: float, gradient: bool) -> tuple[Tensor, Tensor]:
    """(losses of the rows, wide; with ``gradient``, that of the logits in their dtype); logits are overwritten."""
    if logits.device.type == "cuda" and logits.dtype != torch.float64:
        kernel = importlib.import_module("ringspan.train.triton_loss")
        return kernel.cross_entropy_(logits, labels, z_loss, gradient), logits
    wide, unlabelled, picked = logits.to(_wide(logits.dtype)), labels < 0, labels.clamp_min(0)[:, None]
    lse = wide.logsumexp(dim=-1, keepdim=True)
    losses = lse - wide.gather(-1, picked) + z_loss * lse * lse
    if gradient:
        wide.sub_(lse).exp_().mul_(1 + 2 * z_loss * lse)
        wide.scatter_add_(-1, picked, wide.new_full(picked.shape, -1)).masked_fill_(unlabelled[:, None], 0)
    return losses[:, 0].masked_fill_(unlabelled, 0), wide.to(logits.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, summed in total's dtype: rounded to bf16, a chunk would lose digits and take another pass."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
