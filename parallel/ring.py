"""Ring attention: queries stay, keys come from their owners a shard at a time, blocks merge by log-sum-exp.

Liu et al., Ring Attention with Blockwise Transformers (arXiv 2310.01889), with three differences: the mask is a span,
so any layout is one kernel call a step; every shard is fetched from its owner, only the keys that the step needs, while
the block before it is computed; and blocks merge inside the kernels, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringspan.kernels.attention import (
    accumulator,
    attention_backward,
    attention_delta,
    attention_forward,
    check_shapes,
    define_operator,
    fake_backward,
    fake_forward,
    pick_backend,
    sink_gradient,
    sink_start,
)
from ringspan.kernels.plan import TILE, Plan, plan
from ringspan.kernels.spans import Spans
from ringspan.parallel.layout import Layout
from ringspan.parallel.transport import TRANSPORTS, Transport, group_by_name, pick_transport


class RingPlan(NamedTuple):
    """All steps of one rank's ring for one mask, made on the host beside the data and shared by all layers.

    Two tensors, so that operators take it as it is and torch.compile sees shapes, not values: ``table`` int64 on the
    host, a row a step (``_Row``), and ``data`` int32 on the device, the plans of the steps end to end.
    """

    table: Tensor
    data: Tensor

    def to(self, device: torch.device | str) -> RingPlan:
        """On ``device``, in one copy."""
        pinned = self.data.pin_memory() if torch.device(device).type == "cuda" else self.data
        return RingPlan(self.table, pinned.to(device, non_blocking=True))


class _Row(NamedTuple):
    """Step j of rank r: keys start <= k < stop of rank r - j's shard come in, send_start <= k < send_stop of ours
    go to rank r + j. The step's plan lies at ``offset`` of data, for ``rows`` batch rows."""

    start: int
    stop: int
    send_start: int
    send_stop: int
    offset: int
    rows: int


class _Step(NamedTuple):
    owner: int  # whose keys these are
    reader: int  # who needs ours meanwhile
    keys: slice  # of the owner's shard
    sent: slice  # of our shard
    plan: Plan

    @property
    def has_keys(self) -> bool:
        return self.keys.stop > self.keys.start


def plan_ring(spans: Spans, layout: Layout, rank: int, *, parts: int = 1) -> RingPlan:
    """The ring's steps for ``rank``, from host spans in global positions; ``parts``: ulysses ranks a shard is cut for.

    ValueError: spans that are not over the layout's positions.
    """
    if spans.queries != layout.length:
        raise ValueError(f"the spans have {spans.queries} queries, the layout {layout.length} positions")
    size = layout.part_rows(parts) * parts
    positions = [layout.positions(one, size) for one in range(layout.ranks)]
    table, data, offset = [], [], 0
    for step in range(layout.ranks):
        owner, reader = (rank - step) % layout.ranks, (rank + step) % layout.ranks
        local = spans.shard(positions[rank], positions[owner])
        keys = slice(0, size) if step == 0 else _needed(local)  # our own keys are here anyway: whole, and contiguous
        sent = slice(0, 0) if step == 0 else _needed(spans.shard(positions[reader], positions[rank]))
        table.append(_Row(keys.start, keys.stop, sent.start, sent.stop, offset, spans.rows))
        if keys.stop > keys.start:
            packed = _pack(plan(_within(local, keys), keys.stop - keys.start))
            data.append(packed)
            offset += len(packed)
    return RingPlan(torch.tensor(table, dtype=torch.int64), torch.cat(data))


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring_plan: RingPlan,
    group: dist.ProcessGroup,
    *,
    transport: str = "auto",
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention over the whole sequence from local shards: differentiable, compile-able, exact.

    q (batch, rows, heads, dim), k and v (batch, rows, kv_heads, dim) are this rank's shards in the layout that
    ``ring_plan`` was made for; all ranks of ``group`` call it together. Returns out like q. ``scale``, ``softcap`` and
    ``sinks`` are those of ``attention``. dK and dV come home in fp32 and are added in a fixed order.
    ValueError: shapes or names that do not fit.
    """
    check_shapes(q, k, v, [], sinks)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, _ = _RingAttention.apply(
        q,
        k,
        v,
        sinks,
        ring_plan.table,
        ring_plan.data,
        group.group_name,
        pick_transport(transport),
        scale,
        softcap,
        pick_backend(backend, q, k, v),
    )
    return out


def _needed(local: Spans) -> slice:
    """The run of keys that holds all that any query needs: empty where none needs any."""
    seen = (local.hi > local.lo).any(dim=0).nonzero()
    if not len(seen):
        return slice(0, 0)
    first, last = int(seen[0]), int(seen[-1])
    return slice(int(local.lo[:, first].min()), int(local.hi[:, last].max()))


def _within(local: Spans, keys: slice) -> Spans:
    """The same mask over a run of the keys that holds all that is needed."""
    return Spans(*(bound.clamp(keys.start, keys.stop) - keys.start for bound in (local.lo, local.hi)))


_ALIGN = 32  # int32 of data that a plan's tensors start at multiples of: 128 bytes, a line of cache


def _pack(one: Plan) -> Tensor:
    flat = [tensor.flatten() for tensor in one]
    return torch.cat([torch.nn.functional.pad(x, (0, -len(x) % _ALIGN)) for x in flat])


def _unpack(data: Tensor, row: _Row, queries: int) -> Plan:
    """The plan at a row's offset: views of data."""
    keys = row.stop - row.start
    tensors, at = [], row.offset
    for n in (queries, queries, keys, keys, -(-queries // TILE), -(-keys // TILE)):
        tensors.append(data[at : at + row.rows * n].view(row.rows, n))
        at += row.rows * n + (-row.rows * n) % _ALIGN
    return Plan(*tensors)


def _steps(table: Tensor, data: Tensor, queries: int, group: dist.ProcessGroup) -> list[_Step]:
    rank, ranks = group.rank(), group.size()
    if len(table) != ranks:
        raise ValueError(f"the plan is for a ring of {len(table)} ranks, the group has {ranks}")
    rows = [_Row(*row) for row in table.tolist()]
    if rows[0].stop != queries:
        raise ValueError(f"the plan is for shards of {rows[0].stop} rows, these have {queries}")
    return [
        _Step(
            owner=(rank - step) % ranks,
            reader=(rank + step) % ranks,
            keys=slice(row.start, row.stop),
            sent=slice(row.send_start, row.send_stop),
            plan=_unpack(data, row, queries) if row.stop > row.start else Plan(*[data[:0]] * len(Plan._fields)),
        )
        for step, row in enumerate(rows)
    ]


def _travelling(k: Tensor, v: Tensor, steps: list[_Step], wire: Transport) -> Iterator[tuple[Tensor, Tensor]]:
    """The keys and values of each step, the next ones on the wire meanwhile.

    Steps without keys come too, empty: all ranks must start their exchanges in one order, or parcels would be mixed up.
    """
    arriving = k[:, steps[0].keys], v[:, steps[0].keys]
    for following in steps[1:]:
        here = arriving
        sends = [(x[:, following.sent].contiguous(), following.reader) for x in (k, v)]
        arriving = _room(k, following.keys), _room(v, following.keys)
        on_the_wire = wire.exchange(sends, [(x, following.owner) for x in arriving])
        yield here
        on_the_wire.wait()
    yield arriving


def _room(x: Tensor, keys: slice) -> Tensor:
    return torch.empty((x.shape[0], keys.stop - keys.start, *x.shape[2:]), dtype=x.dtype, device=x.device)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    table: Tensor,
    data: Tensor,
    group_name: str,
    transport: str,
    scale: float,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    group = group_by_name(group_name)
    steps = _steps(table, data, q.shape[1], group)
    last = max(number for number, step in enumerate(steps) if step.has_keys)
    result = None if sinks is None else sink_start(q, sinks)
    for number, (k_part, v_part) in enumerate(_travelling(k, v, steps, TRANSPORTS[transport](group))):
        step = steps[number]
        if not step.has_keys:
            continue
        out_dtype = q.dtype if number == last else accumulator(q.dtype)
        result = attention_forward(
            q,
            k_part,
            v_part,
            step.plan,
            scale=scale,
            softcap=softcap,
            into=result,
            out_dtype=out_dtype,
            backend=backend,
        )
    assert result is not None, "step 0 holds the rank's own keys, at least one row of padding"
    return result


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
    transport: str,
    scale: float,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    group = group_by_name(group_name)
    steps = _steps(table, data, q.shape[1], group)
    wire = TRANSPORTS[transport](group)
    delta = attention_delta(dout, out, dlse)
    dq, dk, dv = (torch.zeros(x.shape, dtype=accumulator(x.dtype), device=x.device) for x in (q, k, v))
    homeward = _Homeward(wire, dk, dv)
    for number, (k_part, v_part) in enumerate(_travelling(k, v, steps, wire)):
        step = steps[number]
        part = (dk, dv) if number == 0 else (_room(dk, step.keys).zero_(), _room(dv, step.keys).zero_())
        if step.has_keys:
            attention_backward(
                dout,
                q,
                k_part,
                v_part,
                lse,
                delta,
                step.plan,
                scale=scale,
                softcap=softcap,
                dq=dq,
                dk=part[0],
                dv=part[1],
                backend=backend,
            )
        if number > 0:
            homeward.send(step, part)
    homeward.finish()
    dsinks = q.new_empty(0) if sinks is None else sink_gradient(sinks, lse, delta)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks


class _Homeward:
    """Gradients of other ranks' keys on their way home, one step behind the computation, added in step order."""

    def __init__(self, wire: Transport, dk: Tensor, dv: Tensor) -> None:
        self.wire, self.home = wire, (dk, dv)
        self.finish: Callable[[], None] = lambda: None

    def send(self, step: _Step, part: tuple[Tensor, Tensor]) -> None:
        """What ``step`` has computed goes to its owner; what its reader has for us starts to come in."""
        arriving = [_room(x, step.sent) for x in self.home]
        on_the_wire = self.wire.exchange([(x, step.owner) for x in part], [(x, step.reader) for x in arriving])
        self.finish()  # the step before: it has had a block's time

        def finish() -> None:
            on_the_wire.wait()
            for total, x in zip(self.home, arriving, strict=True):
                total[:, step.sent] += x

        self.finish = finish


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, table, data, *settings):  # type: ignore[no-untyped-def]
        out, lse = torch.ops.ringspan.ring_attention(q, k, v, sinks, table, data, *settings)
        ctx.save_for_backward(q, k, v, sinks, out, lse, table, data)
        ctx.settings = settings
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):  # type: ignore[no-untyped-def]
        *saved, sinks, out, lse, table, data = ctx.saved_tensors
        dq, dk, dv, dsinks = torch.ops.ringspan.ring_attention_backward(
            dout, dlse, *saved, sinks, out, lse, table, data, *ctx.settings
        )
        return dq, dk, dv, None if sinks is None else dsinks, None, None, *[None] * len(ctx.settings)


_SETTINGS = "Tensor table, Tensor data, str group_name, str transport, float scale, float softcap, str backend"
define_operator(
    f"ring_attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, {_SETTINGS}) -> (Tensor, Tensor)",
    _forward,
    fake_forward,
)
define_operator(
    "ring_attention_backward(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor out, "
    f"Tensor lse, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    fake_backward,
)
