"""Attention under the signatures that models know: torch's, and FlashAttention's two.

    out = scaled_dot_product_attention(q, k, v, is_causal=True)     # (batch, heads, tokens, dim), as torch's
    out = flash_attn_func(q, k, v, causal=True, window_size=(4095, 0))     # (batch, tokens, heads, dim)
    out = flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=True)     # (tokens, heads, dim)

They compute what those compute, differentiable, or raise a ValueError that says why they cannot: what is dropped out,
biased or masked by anything but spans has no other way here. A query without keys gives 0.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ringspan.kernels.attention import attention
from ringspan.kernels.plan import Plan, plan
from ringspan.kernels.spans import Spans


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional's: query (batch, heads, queries, dim), key and value (batch, kv_heads, keys, dim).

    Leading dimensions may be missing; value's dim may differ from key's. ``is_causal`` aligns the first query with the
    first key. ``attn_mask`` (..., queries, keys) is bool, or 0 and -inf in a floating dtype, and broadcasts; its rows
    must be spans, which costs a host sync, once for all layers that are given the same tensor.
    ValueError: dropout, another mask, both masks, or shapes that do not fit.
    """
    refuse_dropout(dropout_p)
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask and is_causal=True: give one; a causal mask can be part of attn_mask")
    if not 2 <= query.dim() == key.dim() == value.dim() <= 4:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}: all are (batch, heads, "
            "tokens, dim), or all are without batch, or without batch and heads; fold further dimensions into batch"
        )
    q, k, v = (x[(None,) * (4 - x.dim())] for x in (query, key, value))
    if q.shape[1] != k.shape[1] and not enable_gqa:
        raise ValueError(f"query has {q.shape[1]} heads, key {k.shape[1]}: enable_gqa=True lets query heads share keys")
    batch, heads, queries, keys = *q.shape[:3], k.shape[2]
    if attn_mask is None:
        mask = _Recognised(band(queries, keys, 0, None, 0 if is_causal else None, q.device), by_head=False)
    else:
        mask = recognised(attn_mask, batch, heads, queries, keys)
    if mask.by_head:  # each head is a batch row then
        if q.shape[1] != k.shape[1]:
            raise ValueError("attn_mask differs between heads, which enable_gqa=True lets share keys: repeat the keys")
        q, k, v = (x.flatten(0, 1).unsqueeze(1) for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = run_on_any(functools.partial(attention, spans=mask.plan), q, k, v, scale).transpose(1, 2)
    out = out.view(batch, heads, *out.shape[2:]) if mask.by_head else out
    return out.view(out.shape[4 - query.dim() :])


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """flash_attn's: q (batch, queries, heads, dim), k and v (batch, keys, kv_heads, dim).

    The last query stands at the last key; it sees ``window_size`` keys to its left and right, -1: all of them, and
    with ``causal`` none to its right. Returns out, with ``return_attn_probs`` (out, lse (batch, heads, queries), None).
    ValueError: dropout, ALiBi, or ``deterministic`` where torch is not told to be.
    """
    refuse_dropout(dropout_p)
    _refuse_what_flash_has(alibi_slopes, deterministic, q)
    left, right = _window(window_size, causal)
    mask = band(q.shape[1], k.shape[1], k.shape[1] - q.shape[1], left, right, q.device)
    out, lse = attention(q, k, v, mask, scale=softmax_scale, softcap=softcap, return_lse=True)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """flash_attn's, for documents end to end: q (queries, heads, dim), k and v (keys, kv_heads, dim).

    ``cu_seqlens`` (documents + 1,) say where each document begins, and at last where the last one ends; tokens after
    that see nothing. The longest lengths are not needed: they are taken as part of the signature. In each document all
    is as in ``flash_attn_func``; the lse is (heads, queries). Without a host sync.
    ValueError: as there, a ``block_table``, or unlike numbers of documents.
    """
    refuse_dropout(dropout_p)
    _refuse_what_flash_has(alibi_slopes, deterministic, q)
    if block_table is not None:
        raise ValueError("block_table: keys in pages are not supported; give k and v as whole tensors")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(f"cu_seqlens of {len(cu_seqlens_q) - 1} and {len(cu_seqlens_k) - 1} documents: must be one")
    spans = _documents(len(q), cu_seqlens_q, cu_seqlens_k, *_window(window_size, causal))
    out, lse = attention(
        q[None], k[None], v[None], plan(spans, len(k)), scale=softmax_scale, softcap=softcap, return_lse=True
    )
    return (out[0], lse[0], None) if return_attn_probs else out[0]


def refuse_dropout(p: float) -> None:
    if p:
        raise ValueError(f"dropout_p={p}: there is no dropout of attention weights here; give 0")


def _refuse_what_flash_has(alibi_slopes: Tensor | None, deterministic: bool, q: Tensor) -> None:
    if alibi_slopes is not None:
        raise ValueError("alibi_slopes: scores are not biased here; rotate queries and keys instead")
    if deterministic and q.device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        raise ValueError("deterministic=True: call torch.use_deterministic_algorithms(True), which backward follows")


def _window(window_size: tuple[int, int], causal: bool) -> tuple[int | None, int | None]:
    """Keys to the left and to the right that a query sees besides its own; None: all."""
    left, right = (None if size < 0 else size for size in window_size)
    return left, 0 if causal else right


@functools.lru_cache(maxsize=8)
def band(queries: int, keys: int, offset: int, left: int | None, right: int | None, device: torch.device) -> Plan:
    """Query q sees the keys from q + offset - left to q + offset + right; None: from the first, to the last."""
    with torch.inference_mode(False):  # what is made inside of it could not be saved for a later backward pass
        own = torch.arange(queries, dtype=torch.int32, device=device)[None] + offset
        lo = torch.zeros_like(own) if left is None else (own - left).clamp(0, keys)
        hi = torch.full_like(own, keys) if right is None else (own + right + 1).clamp(0, keys)
        return plan(Spans(lo, hi), keys)


def _documents(queries: int, starts_q: Tensor, starts_k: Tensor, left: int | None, right: int | None) -> Spans:
    """As ``band``, in each document, whose last query stands at its last key."""
    starts_q, starts_k = (torch.cat([starts, starts[-1:]]).to(torch.int32) for starts in (starts_q, starts_k))
    query = torch.arange(queries, dtype=torch.int32, device=starts_q.device)
    # What comes after the last document is one more, of no keys
    document = torch.searchsorted(starts_q[:-1].contiguous(), query, right=True) - 1
    first, stop = starts_k[document], starts_k[document + 1]
    own = stop - (starts_q[document + 1] - query)
    lo = first if left is None else first.maximum(own - left).minimum(stop)
    hi = stop if right is None else first.maximum(own + right + 1).minimum(stop)
    return Spans(lo[None], hi[None])


class _Recognised(NamedTuple):
    """A plan for the rows of a batch, or ``by_head`` for batch x heads."""

    plan: Plan
    by_head: bool


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def recognised(attn_mask: Tensor, batch: int, heads: int, queries: int, keys: int) -> _Recognised:
    """The spans that ``attn_mask`` is, remembered for as long as that tensor lives and is not written to."""
    key = None if attn_mask.is_inference() else (attn_mask._version, batch, heads, queries, keys)
    known, mask = _known.get(attn_mask, (None, None))
    if mask is None or known != key:
        with torch.inference_mode(False):
            mask = _read(attn_mask, batch, heads, queries, keys)
        if key is not None:  # a tensor of inference mode has no count of what is written to it
            _known[attn_mask] = key, mask
    return mask


def _read(attn_mask: Tensor, batch: int, heads: int, queries: int, keys: int) -> _Recognised:
    shape = tuple(attn_mask.shape)
    wanted = (batch, heads, queries, keys)
    seen = _as_bool(attn_mask)[(None,) * (4 - attn_mask.dim())]
    if seen.dim() != 4 or any(n not in (1, whole) for n, whole in zip(seen.shape, wanted, strict=True)):
        raise ValueError(f"attn_mask {shape} does not broadcast to (batch, heads, queries, keys) = {wanted}")
    rows, by_head = seen.shape[:2]
    spans = Spans.from_mask(seen.expand(-1, -1, queries, keys).flatten(0, 1))
    if by_head > 1:
        lo, hi = (bound.view(rows, by_head, queries) for bound in (spans.lo, spans.hi))
        if bool((lo == lo[:, :1]).all() & (hi == hi[:, :1]).all()):
            spans, by_head = Spans(lo[:, 0], hi[:, 0]), 1
        else:
            spans = Spans(*(bound.expand(batch, -1, -1).flatten(0, 1) for bound in (lo, hi)))
    return _Recognised(plan(spans, keys), by_head > 1)


def _as_bool(attn_mask: Tensor) -> Tensor:
    if attn_mask.dtype == torch.bool:
        return attn_mask
    seen = attn_mask == 0
    if attn_mask.requires_grad or not bool((seen | (attn_mask == -torch.inf)).all()):
        raise ValueError(
            f"attn_mask of {attn_mask.dtype} adds to the scores: only 0 and -inf, which hide keys, are possible here"
        )
    return seen


def run_on_any(run: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """``run(q, k, v, scale=scale)`` for inputs that `attention` does not take: q, k and v of several dtypes under
    autocast, which go on in its dtype, and values of another dim than keys, where the narrower are padded with zeros.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    kind, dim, dim_v = q.device.type, k.shape[-1], v.shape[-1]
    if kind != "meta" and torch.is_autocast_enabled(kind):
        q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))
    if dim != dim_v and q.shape[-1] == dim:
        q, k, v = (F.pad(x, (0, max(dim, dim_v) - x.shape[-1])) for x in (q, k, v))
    return run(q, k, v, scale=scale)[..., :dim_v]
