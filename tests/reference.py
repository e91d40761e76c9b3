"""Attention by its definition, independent of the product: whole score matrices, float64, gradients from autograd.

B batch, S queries, T keys, H query heads, K kv heads, D head dim.
"""

import torch
from torch import Tensor


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (out (B, S, H, D), lse (B, H, S)) in float64; query s sees keys lo[s] <= t < hi[s].

    q is (B, S, H, D), k and v are (B, T, K, D), lo and hi (B or 1, S). `sinks` (H,) are logits of one more key per head
    whose value is zero; `into` is an (out, lse) over other keys to merge with. A row with no key has out 0, lse -inf.
    """
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bshd,bthd->bhst", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    key = torch.arange(k.shape[1], device=q.device)
    seen = (key >= lo[:, :, None]) & (key < hi[:, :, None])
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    parts = [torch.logsumexp(scores, -1)] if k.shape[1] else [q.new_full(scores.shape[:-1], -torch.inf)]
    if sinks is not None:
        parts.append(sinks.double()[:, None].expand_as(parts[0]))
    if into is not None:
        parts.append(into[1].double())
    lse = torch.stack(parts).logsumexp(0)
    finite = lse.masked_fill(lse == -torch.inf, 0.0)  # -inf minus -inf would be NaN in rows without keys
    out = torch.einsum("bhst,bthd->bshd", torch.exp(scores - finite[..., None]), v)
    if into is not None:
        out = out + into[0].double() * torch.exp(into[1].double() - finite).transpose(1, 2)[..., None]
    return out, lse


def naive_attention(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, scale: float, softcap: float = 0.0
) -> Tensor:
    """Plain PyTorch attention in the dtype of its inputs, out (B, S, H, D): its error sets the tolerance of ours."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    key = torch.arange(k.shape[1], device=q.device)
    seen = (key >= lo[:, :, None]) & (key < hi[:, :, None])
    scores = scores.masked_fill(~seen[:, None], torch.finfo(q.dtype).min)
    weights = torch.softmax(scores, -1) * seen.any(-1)[:, None, :, None]
    return (weights @ v.transpose(1, 2)).transpose(1, 2)
