"""All-gather attention: every rank fetches all keys at once and runs one block over them (Llama 3, arXiv 2407.21783).

Nothing is computed while keys are on the wire, and a rank holds the keys of the whole sequence; but there is one
exchange and one kernel a pass, which for short shards of few kv heads costs less than the ring's steps.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ringspan.kernels.attention import (
    accumulator,
    attention_backward,
    attention_delta,
    attention_forward,
    check_inputs,
    pick_backend,
    sink_gradient,
    sink_start,
)
from ringspan.kernels.plan import Plan, plan
from ringspan.kernels.spans import Spans
from ringspan.parallel.autograd import ShardedAttention, define_sharded
from ringspan.parallel.layout import Layout
from ringspan.parallel.parts import part
from ringspan.parallel.ring_plan import check_fit, local_bounds, pack_plan, padded, to_device, unpack_plan
from ringspan.parallel.transport import agree, group_by_name
from ringspan.parallel.waiting import waiting

OPERATOR = "gather_attention"  # of torch.ops.ringspan
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name since torch 2.13, and before


class GatherPlan(NamedTuple):
    """One rank's mask over all keys in their global order; two tensors, as a ``RingPlan``.

    ``table`` int64 on the host: (ranks, rows of a shard, batch rows, keys). ``data`` int32 on the device: the row of
    the gathered shards where each key is, then the plan.
    """

    table: Tensor
    data: Tensor

    def to(self, device: torch.device | str) -> GatherPlan:
        """On ``device``, in one copy."""
        return GatherPlan(self.table, to_device(self.data, device))


def plan_gather(spans: Spans, layout: Layout, rank: int, *, parts: int = 1) -> GatherPlan:
    """For ``rank``, from host spans in global positions; ``parts``: ulysses ranks a shard is cut for.

    ValueError: spans that are not over the layout's positions.
    """
    mine = local_bounds(spans, layout, rank)
    rows, keys = layout.part_rows(parts) * parts, layout.length
    held = torch.cat([layout.positions(one, rows) for one in range(layout.ranks)])
    where = torch.empty(keys, dtype=torch.int32)
    where[held[held >= 0]] = (held >= 0).nonzero()[:, 0].int()
    data = pack_plan(where, *plan(padded(*mine, rows), keys))
    return GatherPlan(torch.tensor([layout.ranks, rows, spans.rows, keys]), data)


def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gather_plan: GatherPlan,
    group: dist.ProcessGroup,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """What ``ring_attention`` gives, by one exchange and one kernel a pass, with the memory of all keys.

    dK and dV are added in fp32, in the order of the ranks. ValueError: shapes or names that do not fit.
    """
    scale = check_inputs(q, k, v, [], sinks, scale, softcap)
    settings = group.group_name, scale, softcap, pick_backend(backend, q, k, v)
    return ShardedAttention.apply(OPERATOR, None, q, k, v, sinks, *gather_plan, *settings)[0]


def _read(table: Tensor, data: Tensor, q: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Plan]:
    ranks, rows, batch_rows, keys = table.tolist()
    check_fit(data, (ranks, batch_rows, rows), q, group.size())
    where, *tensors = unpack_plan(data, 0, batch_rows, rows, keys, first=keys)
    return where, Plan(*tensors)


def _gathered(k: Tensor, v: Tensor, where: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """All keys and values, (batch, keys, kv_heads, dim) in global order."""
    agree(group, {"k and v": (*k.shape, k.dtype)})
    sent = torch.stack((k, v))
    everyone = sent.new_empty(group.size() * 2, *k.shape)
    with part("ring"), waiting(k.device):
        all_gather(everyone, sent, group=group)
    k_all, v_all = (one.transpose(0, 1).flatten(1, 2) for one in everyone.unflatten(0, (-1, 2)).unbind(1))
    return k_all.index_select(1, where), v_all.index_select(1, where)


def _sent_home(grads: tuple[Tensor, Tensor], where: Tensor, rows: int, group: dist.ProcessGroup) -> Tensor:
    """(2, batch, rows, kv_heads, dim): dK and dV of this rank's keys, summed over the ranks in their order."""
    ranks, (batch, _, *rest) = group.size(), grads[0].shape
    parts = grads[0].new_zeros(2, batch, ranks * rows, *rest)
    for whole, grad in zip(parts, grads, strict=True):
        whole.index_copy_(1, where.long(), grad)
    sent = parts.unflatten(2, (ranks, rows)).movedim(2, 0).contiguous()
    received = torch.empty_like(sent)
    with part("ring"), waiting(sent.device):
        dist.all_to_all_single(received, sent, group=group)
    total, *others = received.unbind()
    for other in others:
        total += other
    return total


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    table: Tensor,
    data: Tensor,
    group_name: str,
    scale: float,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    group = group_by_name(group_name)
    where, mask = _read(table, data, q, group)
    k_all, v_all = _gathered(k, v, where, group)
    start = None if sinks is None else sink_start(q, sinks)
    return attention_forward(
        q, k_all, v_all, mask, scale=scale, softcap=softcap, into=start, out_dtype=q.dtype, backend=backend
    )


def _backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    table: Tensor,
    data: Tensor,
    group_name: str,
    scale: float,
    softcap: float,
    backend: str,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    group = group_by_name(group_name)
    where, mask = _read(table, data, q, group)
    k_all, v_all = _gathered(k, v, where, group)
    delta = attention_delta(dout, out, dlse)
    dk, dv = (torch.empty(x.shape, dtype=accumulator(x.dtype), device=x.device) for x in (k_all, v_all))
    run = partial(attention_backward, scale=scale, softcap=softcap, dk=dk, dv=dv, fresh=True, backend=backend)
    dq, _, _ = run(dout, q, k_all, v_all, lse, delta, mask)
    home = _sent_home((dk, dv), where, k.shape[1], group)
    dk, dv = (x.to(x.dtype if wide else k.dtype, copy=True) for x in home)  # an operator's results share no memory
    dsinks = q.new_empty(0) if sinks is None else sink_gradient(sinks, lse, delta)
    return dq, dk, dv, dsinks


define_sharded(OPERATOR, "str group_name, float scale, float softcap, str backend", _forward, _backward)
