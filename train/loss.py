"""The vocabulary projection and its cross-entropy, fused and a chunk of tokens at a time: logits are never whole.

At 128k tokens and a vocabulary of 128k, logits in fp32 would be 64 GiB; a chunk of them is at most 1 GiB. The
gradients are computed beside the loss, so that backward only scales them and no chunk is projected twice.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringspan.train.packing import IGNORE

LOGITS_OF_A_CHUNK = 2**28  # 1 GiB in fp32
ROWS_OF_A_CHUNK = 8192  # beyond this a matrix product gains nothing, whatever the vocabulary


def cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None) -> Tensor:
    """Sum of -log softmax(hidden weight^T)[label] over the tokens whose label is not IGNORE.

    hidden is (..., dim), weight (vocabulary, dim), labels (...) int64; ``chunk`` is the tokens projected at once.
    Log-softmax, the sum, and the weight's gradient over the chunks are fp32 (fp64 for fp64). Returns a scalar of
    that dtype, which is 0 with zero gradients where no token has a label.
    """
    if chunk is None:
        chunk = max(1, min(LOGITS_OF_A_CHUNK // weight.shape[0], ROWS_OF_A_CHUNK))
    flat = hidden.reshape(-1, hidden.shape[-1])
    return _FusedCrossEntropy.apply(flat, weight, labels.reshape(-1), chunk, torch.is_grad_enabled())


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """(loss, whether the likeliest token is the label) of each token, as labels (...): fp32 (fp64 for fp64) and bool.

    Where there is no label they are 0 and False. Shapes and ``chunk`` as for `cross_entropy_sum`; has no gradients.
    """
    if chunk is None:
        chunk = max(1, min(LOGITS_OF_A_CHUNK // weight.shape[0], ROWS_OF_A_CHUNK))
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    losses = torch.empty(wanted.shape, dtype=wide, device=hidden.device)
    hits = torch.empty_like(wanted, dtype=torch.bool)
    for start in range(0, len(wanted), chunk):
        part = slice(start, start + chunk)
        logits = (flat[part] @ weight.T).to(wide)
        hits[part] = logits.argmax(dim=-1) == wanted[part]
        picked = logits.gather(-1, wanted[part].clamp_min(0)[:, None])[:, 0]
        losses[part] = (logits.logsumexp(dim=-1) - picked).masked_fill_(wanted[part] == IGNORE, 0)
    return losses.view_as(labels), hits.view_as(labels)


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, want_grads: bool) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        dhidden = torch.empty_like(hidden) if want_grads and ctx.needs_input_grad[0] else None
        dweight = (
            torch.zeros(weight.shape, dtype=wide, device=weight.device)
            if want_grads and ctx.needs_input_grad[1]
            else None
        )
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ weight.T).to(wide)
            loss += _loss_of(logits, labels[part])
            if dhidden is not None or dweight is not None:
                dlogits = _to_gradient(logits, labels[part]).to(hidden.dtype)
            if dhidden is not None:
                torch.mm(dlogits, weight, out=dhidden[part])
            if dweight is not None:
                dweight += dlogits.T @ hidden[part]
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        dhidden, dweight = ctx.saved_tensors
        return (
            None if dhidden is None else dhidden * dloss,
            None if dweight is None else (dweight * dloss).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def _loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the labelled tokens' losses; ``logits`` become log-probabilities in place."""
    logits -= logits.logsumexp(dim=-1, keepdim=True)
    picked = logits.gather(-1, labels.clamp_min(0)[:, None])[:, 0]
    return -picked.masked_fill(labels == IGNORE, 0).sum()


def _to_gradient(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """In place: softmax minus one-hot, and 0 for tokens without a label."""
    gradient = log_probabilities.exp_()
    gradient.scatter_add_(-1, labels.clamp_min(0)[:, None], gradient.new_full((len(labels), 1), -1))
    return gradient.masked_fill_((labels == IGNORE)[:, None], 0)
