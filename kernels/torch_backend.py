"""Attention over spans in plain PyTorch: any device, any dtype up to fp64, memory linear in length.

The readable definition of what the other backends compute: blocks of queries against the run of keys that any of
them needs. Scores, sums and gradients are fp32, or fp64 for fp64 inputs.
Shape suffixes: B batch, K kv heads, G query heads a kv head, M queries of a block, N keys of a block, D head dim.
"""

import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from ringspan.kernels.plan import TILE, Plan

Given = ParamSpec("Given")
Result = TypeVar("Result")


def without_autocast(run: Callable[Given, Result]) -> Callable[Given, Result]:
    """Autocast would round the fp32 scores and weights to bf16 before each product."""

    @functools.wraps(run)
    def plainly(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        device = next(x.device for x in args if isinstance(x, Tensor))
        with torch.autocast(device.type, enabled=False):
            return run(*args, **kwargs)

    return plainly


@without_autocast
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    scale: float,
    softcap: float,
    into: tuple[Tensor, Tensor] | None,
    out_dtype: torch.dtype,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of ``attention_forward``, whose contract this is."""
    if into is None:
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=_wide(q), device=q.device)
        result = torch.zeros(q.shape, dtype=out_dtype, device=q.device)
    else:
        lse = into[1]
        result = into[0] if into[0].dtype == out_dtype else into[0].to(out_dtype)
    for queries, keys in _blocks(plan):
        kept = _keep(plan, queries, keys)
        scores = _scores(q[:, queries], k[:, keys], scale, softcap).masked_fill(~kept, -torch.inf)
        top = scores.amax(dim=-1, keepdim=True)
        weight = (scores - top.nan_to_num(neginf=0.0)).exp()  # a row without keys: exp(-inf), not exp(nan)
        total = weight.sum(dim=-1, keepdim=True)
        block_out = weight @ _heads_first(v[:, keys]) / total.masked_fill(total == 0, 1.0)
        block_lse = (top + total.log()).flatten(1, 2).squeeze(-1)
        if into is None:
            lse[:, :, queries] = block_lse
            result[:, queries] = _heads_last(block_out).to(out_dtype)
            continue
        # out = sum of the parts' outs weighted by exp(lse_part - lse_all); -inf - -inf is a row nobody has keys for.
        # Not by the lse of both, which is rounded: in fp32 that alone made the error of 8 parts 1.14 times that of one.
        before = lse[:, :, queries]
        merged = torch.logaddexp(before, block_lse)
        share = (block_lse - before).sigmoid().nan_to_num(nan=0.0).transpose(1, 2).unsqueeze(-1)
        old = into[0][:, queries]
        result[:, queries] = (old + share * (_heads_last(block_out) - old)).to(out_dtype)
        lse[:, :, queries] = merged
    return result if out is None else out.copy_(result), lse


@without_autocast
def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    plan: Plan,
    *,
    scale: float,
    softcap: float,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    fresh: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of ``attention_backward``, whose contract this is."""
    wide = _wide(q)
    sums = [
        torch.zeros(x.shape, dtype=wide, device=x.device) if given is None else given
        for x, given in ((q, dq), (k, dk), (v, dv))
    ]
    for total in sums[1:] if fresh else ():
        total.zero_()
    for queries, keys in _blocks(plan):
        kept = _keep(plan, queries, keys)
        q_block, k_block, v_block, dout_block = (
            _heads_first(x) for x in (q[:, queries], k[:, keys], v[:, keys], dout[:, queries])
        )
        groups = (k.shape[2], q.shape[2] // k.shape[2])
        q_block, dout_block = (x.unflatten(1, groups) for x in (q_block.squeeze(2), dout_block.squeeze(2)))
        scores = _scores(q[:, queries], k[:, keys], scale, softcap)
        row_lse, row_delta = (x[:, :, queries].unflatten(1, groups).unsqueeze(-1) for x in (lse, delta))
        p = (scores - row_lse).exp().masked_fill(~kept, 0.0)
        ds = p * (dout_block @ v_block.transpose(-1, -2) - row_delta) * scale
        if softcap:
            ds = ds * (1 - (scores / softcap).square())
        ds = ds.masked_fill(~kept, 0.0)
        sums[0][:, queries] += _heads_last(ds @ k_block)
        sums[1][:, keys] += (ds.transpose(-1, -2) @ q_block).sum(dim=2).transpose(1, 2)
        sums[2][:, keys] += (p.transpose(-1, -2) @ dout_block).sum(dim=2).transpose(1, 2)
    given = (dq, dk, dv)
    dq, dk, dv = (
        total.to(x.dtype) if target is None else total for total, x, target in zip(sums, (q, k, v), given, strict=True)
    )
    return dq, dk, dv


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _blocks(plan: Plan) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, each with the one run of keys that holds all that its rows in any batch row need."""
    n = plan.lo.shape[1]
    if n == 0:
        return
    last = torch.arange(TILE - 1, n + TILE - 1, TILE, device=plan.lo.device).clamp(max=n - 1)
    starts, stops = plan.lo[:, ::TILE].amin(dim=0).tolist(), plan.hi[:, last].amax(dim=0).tolist()
    for block, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        if start < stop:
            yield slice(block * TILE, min((block + 1) * TILE, n)), slice(start, stop)


def _keep(plan: Plan, queries: slice, keys: slice) -> Tensor:
    """(rows, 1, 1, M, N): which pairs are attended to."""
    key = torch.arange(keys.start, keys.stop, device=plan.lo.device)
    lo, hi = (bound[:, None, None, queries, None] for bound in (plan.lo, plan.hi))
    return (key >= lo) & (key < hi)


def _heads_first(x: Tensor) -> Tensor:
    """(B, N, K, D) -> wide (B, K, 1, N, D)."""
    return x.transpose(1, 2).unsqueeze(2).to(_wide(x))


def _heads_last(x: Tensor) -> Tensor:
    """(B, K, G, M, D) -> (B, M, K * G, D)."""
    return x.flatten(1, 2).transpose(1, 2)


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    """(B, K, G, M, N), softcapped."""
    grouped = _heads_first(q).squeeze(2).unflatten(1, (k.shape[2], q.shape[2] // k.shape[2]))
    scores = grouped @ _heads_first(k).transpose(-1, -2) * scale
    return softcap * (scores / softcap).tanh() if softcap else scores
