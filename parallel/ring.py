"""Ring attention: queries stay, keys come from their owners a shard at a time, blocks merge by log-sum-exp.

Liu et al., Ring Attention with Blockwise Transformers (arXiv 2310.01889), with three differences: the mask is a span,
so any layout is one kernel call a step; every shard is fetched from its owner, only the keys that the step needs, while
the block before it is computed; and blocks merge inside the kernels, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ringspan.kernels.attention import (
    accumulator,
    attention_backward,
    attention_delta,
    attention_forward,
    check_shapes,
    pick_backend,
    sink_gradient,
    sink_start,
)
from ringspan.parallel.autograd import ShardedAttention, define_sharded
from ringspan.parallel.ring_plan import RingPlan, Runs, Step, read_steps
from ringspan.parallel.transport import (
    Lane,
    Pair,
    Transport,
    agree,
    check_transport,
    group_by_name,
    open_lane,
    pick_transport,
)

OPERATOR = "ring_attention"  # of torch.ops.ringspan


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
    settings = group.group_name, check_transport(transport), scale, softcap, pick_backend(backend, q, k, v)
    out, _ = ShardedAttention.apply(OPERATOR, None, q, k, v, sinks, *ring_plan, *settings)
    return out


_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _steps(table: Tensor, data: Tensor, queries: int, group: dist.ProcessGroup) -> list[Step]:
    """The steps of a plan, read once for all layers: to make the views of 2 steps takes the host 0.1 ms."""
    key = data, queries, group.rank(), group.size()
    known, steps = _read.get(table, ((), []))
    if len(known) != len(key) or known[0] is not data or known[1:] != key[1:]:
        steps = read_steps(table, data, queries, group.rank(), group.size())
        _read[table] = key, steps
    return steps


def _travelling(k: Tensor, v: Tensor, steps: list[Step], lane: Transport, way: str) -> Iterator[tuple[Step, Pair]]:
    """Each step with its keys and values, those of the next one on the wire meanwhile.

    Steps that only others need come too, empty: all ranks start their exchanges in one order, or parcels would mix.
    """
    here, pair = None, (k, v)
    for number, step in enumerate(steps):
        following = None
        if number + 1 < len(steps):
            owner, reader, keys, sent, _ = steps[number + 1]
            what = f"step {number + 1} of {len(steps) - 1} of the {way} pass"
            following = lane.exchange((sent.take(k), sent.take(v)), reader, len(keys), owner, what)
        yield step, pair
        if here is not None:
            here.done()
        if following is not None:
            here, pair = following, following.wait()


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
    if group.size() > 1:
        agree(group, {"q": (*q.shape, q.dtype), "k and v": (*k.shape, k.dtype), "transport": transport})
    last = [step for step in steps if len(step.keys)][-1]
    result = None if sinks is None else sink_start(q, sinks)
    lane = _open(transport, group, steps, k.device, _keys_lane(k, group.size()))
    for step, (k_part, v_part) in _travelling(k, v, steps, lane, "forward"):
        if not len(step.keys):
            continue
        result = attention_forward(
            q,
            k_part,
            v_part,
            step.plan,
            scale=scale,
            softcap=softcap,
            into=result,
            out_dtype=q.dtype if step is last else accumulator(q.dtype),
            backend=backend,
        )
    assert result is not None, "step 0 holds the rank's own keys, at least one row of padding"
    return result


def _open(transport: str, group: dist.ProcessGroup, steps: list[Step], device: torch.device, lane: Lane) -> Transport:
    """The lane; where no rank needs another's keys it is never used, and costs nothing."""
    if len(steps) == 1:
        transport = "p2p"
    return open_lane(pick_transport(transport, group, device), group, device, lane)


def _keys_lane(k: Tensor, ranks: int) -> Lane:
    """Of two pairs, of which one is read and one comes in; between two ranks there never is a next one."""
    return Lane("keys", min(2, ranks - 1), k.numel() * k.element_size())


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
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    group = group_by_name(group_name)
    steps = _steps(table, data, q.shape[1], group)
    delta = attention_delta(dout, out, dlse)
    run = partial(attention_backward, scale=scale, softcap=softcap, backend=backend)
    wide_dtype = accumulator(k.dtype)
    if len(steps) == 1:
        dk, dv = (torch.zeros(k.shape, dtype=wide_dtype, device=k.device) if wide else None for _ in range(2))
        dq, dk, dv = run(dout, q, k, v, lse, delta, steps[0].plan, dk=dk, dv=dv)
    else:
        outs = _Outs(q, k, wide_dtype if wide else k.dtype)
        n = 2 if k.shape[2] % 2 == 0 else 1
        shares = [_Share(i, n, len(steps), (dout, q, lse, delta), outs, run) for i in range(n)]
        lanes = _keys_lane(k, group.size()), Lane("gradients", 1, k.numel() // n * wide_dtype.itemsize)
        keys, gradients = (_open(transport, group, steps, k.device, lane) for lane in lanes)
        _round_trip(shares, _travelling(k, v, steps, keys, "backward"), _Homeward(gradients, len(steps) - 1))
        dq, dk, dv = outs.dq, outs.dk, outs.dv
    dsinks = q.new_empty(0) if sinks is None else sink_gradient(sinks, lse, delta)
    return dq, dk, dv, dsinks


def _round_trip(shares: list[_Share], travelling: Iterator[tuple[Step, Pair]], homeward: _Homeward) -> None:
    """All blocks of the backward pass. Of two shares of the heads, the rank's own keys come first in one and last in
    the other: so there is work while the first keys come in, and while the last gradients go home."""
    own, pair = next(travelling)
    shares[0].block(pair, own, shares[0].own)
    for number, (step, arrived) in enumerate(travelling, start=1):
        for share in shares:
            part = share.zeros(len(step.keys))
            share.block(arrived, step, part)
            homeward.send(number, step, share, part)
    for share in shares[1:]:
        share.block(pair, own, share.own)
    homeward.finish()


class _Outs:
    """The gradients that are returned, each made when something is first written to it."""

    def __init__(self, q: Tensor, k: Tensor, dtype: torch.dtype) -> None:
        self.q, self.k, self.dtype = q, k, dtype

    @cached_property
    def dq(self) -> Tensor:
        return torch.empty(self.q.shape, dtype=self.q.dtype, device=self.q.device)

    @cached_property
    def dk(self) -> Tensor:
        return torch.empty(self.k.shape, dtype=self.dtype, device=self.k.device)

    @cached_property
    def dv(self) -> Tensor:
        return torch.empty_like(self.dk)


class _Share:
    """Share ``i`` of ``n`` of the heads in the backward pass of so many steps. Its dq, and the dk and dv of the rank's
    own keys, are sums in the accumulator's dtype, which live from their first block to their last."""

    def __init__(
        self,
        i: int,
        n: int,
        steps: int,
        inputs: tuple[Tensor, Tensor, Tensor, Tensor],
        outs: _Outs,
        run: Callable[..., tuple[Tensor, Tensor, Tensor]],
    ) -> None:
        dout, q, lse, delta = inputs
        self.heads, self.kv_heads = (_slice(x.shape[2], i, n) for x in (q, outs.k))
        self.inputs = dout[:, :, self.heads], q[:, :, self.heads]
        self.statistics = lse[:, self.heads].contiguous(), delta[:, self.heads].contiguous()
        self.outs, self.run, self.blocks = outs, run, steps
        self.dq: Tensor | None = None
        self.sums: Pair | None = None

    @property
    def own(self) -> Pair:
        """dk and dv of the rank's own keys so far."""
        if self.sums is None:
            self.sums = self.zeros(self.outs.k.shape[1])
        return self.sums

    def zeros(self, rows: int) -> Pair:
        """For the gradients of so many keys and values."""
        k = self.outs.k[:, :, self.kv_heads]
        dk, dv = (
            torch.zeros((len(k), rows, *k.shape[2:]), dtype=accumulator(k.dtype), device=k.device) for _ in range(2)
        )
        return dk, dv

    def block(self, pair: Pair, step: Step, into: Pair) -> None:
        """One of the share's blocks: dk and dv are added to ``into``."""
        q = self.inputs[1]
        if self.dq is None:
            self.dq = torch.zeros(q.shape, dtype=accumulator(q.dtype), device=q.device)
        if len(step.keys):
            k, v = (x[:, :, self.kv_heads] for x in pair)
            self.run(*self.inputs, k, v, *self.statistics, step.plan, dq=self.dq, dk=into[0], dv=into[1])
        self.blocks -= 1
        if not self.blocks:
            self.outs.dq[:, :, self.heads] = self.dq
            self.dq = None

    def add(self, runs: Runs, arrived: Pair, last: bool) -> None:
        """Gradients of the rank's own keys have come home; the last ones are added and rounded in one pass."""
        if last:
            for total, x, out in zip(self.own, arrived, (self.outs.dk, self.outs.dv), strict=True):
                _settle(total, runs, x, out[:, :, self.kv_heads])
            self.sums = None
        else:
            for total, x in zip(self.own, arrived, strict=True):
                runs.add(total, x)


def _slice(heads: int, i: int, n: int) -> slice:
    return slice(heads * i // n, heads * (i + 1) // n)


class _Homeward:
    """Gradients of other ranks' keys on their way home, one block behind the computation, added in step order."""

    def __init__(self, lane: Transport, last: int) -> None:
        self.lane, self.last = lane, last
        self.finish: Callable[[], None] = lambda: None

    def send(self, number: int, step: Step, share: _Share, part: Pair) -> None:
        """What step ``number`` has computed goes to its owner; what its reader has for us starts to come in."""
        self.finish()  # the block before: it has had a block's time
        what = f"the gradients of step {number} of {self.last} of the backward pass"
        on_the_wire = self.lane.exchange(part, step.owner, len(step.sent), step.reader, what)

        def finish() -> None:
            share.add(step.sent, on_the_wire.wait(), last=number == self.last)
            on_the_wire.done()

        self.finish = finish


def _settle(total: Tensor, runs: Runs, x: Tensor, out: Tensor) -> None:
    """total, with x added to those rows of it, rounded to out: each row in one pass, as 16K tokens of 32 heads are
    1 GB a pass."""
    if len(runs) < total.shape[1]:
        out.copy_(total)
    at = 0
    for start, stop in runs.edges:
        torch.add(total[:, start:stop], x[:, at : at + stop - start], out=out[:, start:stop])
        at += stop - start


define_sharded(OPERATOR, "str group_name, str transport, float scale, float softcap, str backend", _forward, _backward)
