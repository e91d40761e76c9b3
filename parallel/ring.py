"""Ring attention: queries stay, keys come from their owners a shard at a time, blocks merge by log-sum-exp.

Liu et al., Ring Attention with Blockwise Transformers (arXiv 2310.01889), with three differences: the mask is a span,
so any layout is one kernel call a step; every shard is fetched from its owner, only the keys that the step needs, while
the block before it is computed; and blocks merge inside the kernels, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

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
from ringspan.parallel.autograd import ShardedAttention, define_sharded
from ringspan.parallel.ring_plan import RingPlan, Runs, Step, read_steps
from ringspan.parallel.rounding import rounded_sum
from ringspan.parallel.streams import side_by_side
from ringspan.parallel.transport import (
    Exchange,
    Lane,
    Pair,
    Transport,
    agree,
    check_transport,
    group_by_name,
    open_lane,
    pick_transport,
    settled,
)

OPERATOR = "ring_attention"  # of torch.ops.ringspan
# Rows of a rank from which the shares of its heads take turns on one stream. Kernels that run beside each other share
# the L2 cache: on 2 H200 (head dim 128) two streams cost the backward pass 6 % at 256K rows and 1 % at 64K, where the
# tails of kernels that they fill are short; at 32K both ways were alike, at 16K two streams gained 1 %.
LONG_ROWS = 2**16


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
    scale = check_inputs(q, k, v, [], sinks, scale, softcap)
    settings = group.group_name, check_transport(transport), scale, softcap, pick_backend(backend, q, k, v)
    out, _ = ShardedAttention.apply(OPERATOR, None, q, k, v, sinks, *ring_plan, *settings)
    return out


_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _steps(table: Tensor, data: Tensor, q: Tensor, group: dist.ProcessGroup) -> list[Step]:
    """The steps of a plan, read once for all layers: to make the views of 2 steps takes the host 0.1 ms."""
    key = data, q.shape[:2], q.device, group.rank(), group.size()
    known, steps = _read.get(table, ((), []))
    if len(known) != len(key) or known[0] is not data or known[1:] != key[1:]:
        steps = read_steps(table, data, q, group.rank(), group.size())
        _read[table] = key, steps
    return steps


class _AtHome:
    """The rank's own keys and values, as an exchange that is over."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair

    def wait(self) -> Pair:
        return self.pair

    def done(self) -> None:
        """They stay."""


def _travelling(
    k: Tensor, v: Tensor, steps: list[Step], lane: Transport, way: str
) -> Iterator[tuple[int, Step, Exchange]]:
    """Each step with its keys and values, those of the next one on the wire meanwhile.

    Steps that only others need come too, empty: all ranks start their exchanges in one order, or parcels would mix.
    """
    here: Exchange = _AtHome((k, v))
    for number, step in enumerate(steps):
        following = None
        if number + 1 < len(steps):
            owner, reader, keys, sent, _ = steps[number + 1]
            what = f"step {number + 1} of {len(steps) - 1} of the {way} pass"
            following = lane.exchange((sent.take(k), sent.take(v)), reader, len(keys), owner, what)
        yield number, step, here
        here.done()
        if following is not None:
            here = following


class _Share(NamedTuple):
    """Some of the heads."""

    q: slice
    kv: slice


def _shares(q: Tensor, k: Tensor, steps: list[Step]) -> list[_Share]:
    """Two shares of the heads, if there are steps and heads for that. Their blocks take turns, on two streams unless
    they are long, so that where the last tiles of one leave multiprocessors idle, the first of the next run."""
    n = min(2, k.shape[2]) if len(steps) > 1 else 1
    group = q.shape[2] // k.shape[2]
    edges = [k.shape[2] * i // n for i in range(n + 1)]
    return [_Share(slice(group * a, group * b), slice(a, b)) for a, b in pairwise(edges)]


def _streams(q: Tensor, shares: int) -> int:
    """How many streams the shares take turns on."""
    return 1 if q.shape[1] >= LONG_ROWS else shares


def _turns(n: int, travelling: Iterator[tuple[int, Step, Exchange]]) -> Iterator[tuple[int, int, Step, Exchange]]:
    """(share, step's number, step, its keys) of all blocks of ``n`` shares, in the order of their issue.

    The rank's own keys come first for one share and last for the other. So there is work while the first keys come in
    and, backward, while the last gradients go home; and no block follows another of its share, for which it must wait.
    """
    own = next(travelling)
    yield 0, *own
    for step in travelling:
        for share in reversed(range(n)):
            yield share, *step
    for share in range(1, n):
        yield share, *own


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
    steps = _steps(table, data, q, group)
    if group.size() > 1:
        agree(group, {"q": (*q.shape, q.dtype), "k and v": (*k.shape, k.dtype), "transport": transport})
    lane = _open(transport, group, steps, k.device, _keys_lane(k, group.size()))
    run = partial(attention_forward, scale=scale, softcap=softcap, backend=backend)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    first, *others = _shares(q, k, steps)
    parts = [_Forward(first, steps, q, sinks, out, run)]
    parts += [_Forward(share, steps[1:] + steps[:1], q, sinks, out, run) for share in others]
    with settled(lane), side_by_side(q.device, _streams(q, len(parts))) as streams:
        for i, _, step, arriving in _turns(len(parts), _travelling(k, v, steps, lane, "forward")):
            with streams.on(i):
                parts[i].block(step, arriving.wait())
    sums = [part.lse for part in parts]
    return out, sums[0] if len(sums) == 1 else torch.cat(sums, dim=1)


class _Forward:
    """A share of the heads in the forward pass of ``steps``, in their order: partial results live from its first block
    to its last, which writes ``out``. They are made here, on the stream that has to wait for all: memory of the other
    one would be lost to everything else."""

    def __init__(
        self,
        share: _Share,
        steps: list[Step],
        q: Tensor,
        sinks: Tensor | None,
        out: Tensor,
        run: Callable[..., tuple[Tensor, Tensor]],
    ) -> None:
        self.kv, self.q, self.out, self.run = share.kv, q[:, :, share.q], out[:, :, share.q], run
        blocks = [step for step in steps if len(step.keys)]  # at least that of the rank's own keys
        self.last, self.wide = blocks[-1], accumulator(q.dtype)
        self.result = None if sinks is None else sink_start(self.q, sinks[share.q])
        if self.result is None and len(blocks) > 1:
            self.partial = torch.empty(self.q.shape, dtype=self.wide, device=q.device)

    def block(self, step: Step, pair: Pair) -> None:
        if not len(step.keys):
            return
        k, v = (x[:, :, self.kv] for x in pair)
        last, out = step is self.last, None
        if self.result is None:
            out = self.out if last else self.partial
        elif last and self.wide != self.q.dtype:  # else there is nothing wider, and what came before is merged into
            out = self.out
        dtype = self.q.dtype if last else self.wide
        self.result = self.run(self.q, k, v, step.plan, into=self.result, out_dtype=dtype, out=out)
        if last and out is None:
            self.out.copy_(self.result[0])

    @property
    def lse(self) -> Tensor:
        assert self.result is not None, "the rank's own keys are at least one row of padding"
        return self.result[1]


def _open(transport: str, group: dist.ProcessGroup, steps: list[Step], device: torch.device, lane: Lane) -> Transport:
    """The lane; where no rank needs another's keys it is never used, and costs nothing."""
    if len(steps) == 1:
        transport = "p2p"
    return open_lane(pick_transport(transport, group, device), group, device, lane)


def _keys_lane(k: Tensor, ranks: int) -> Lane:
    """Of two pairs, of which one is read and one comes in; between two ranks there never is a next one."""
    return Lane("keys", min(2, ranks - 1), k.numel() * k.element_size())


def _gradients_lane(k: Tensor) -> Lane:
    """Of one pair for each of two shares of the heads, the larger of which has the odd one."""
    size = k[:, :, : -(-k.shape[2] // 2)].numel()
    return Lane("gradients", 2, size * accumulator(k.dtype).itemsize)


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
    steps = _steps(table, data, q, group)
    delta = attention_delta(dout, out, dlse)
    run = partial(attention_backward, scale=scale, softcap=softcap, backend=backend)
    out_dtype = accumulator(k.dtype) if wide else k.dtype
    if len(steps) == 1:
        dk, dv = (torch.empty(k.shape, dtype=out_dtype, device=k.device) if wide else None for _ in range(2))
        dq, dk, dv = run(dout, q, k, v, lse, delta, steps[0].plan, dk=dk, dv=dv, fresh=wide)
    else:
        keys, gradients = (
            _open(transport, group, steps, k.device, lane) for lane in (_keys_lane(k, group.size()), _gradients_lane(k))
        )
        inputs = dout, q, lse, delta
        parts = [_Backward(share, steps, inputs, k, run, gradients) for share in _shares(q, k, steps)]
        with settled(keys, gradients), side_by_side(q.device, _streams(q, len(parts))) as streams:
            for i, number, step, arriving in _turns(len(parts), _travelling(k, v, steps, keys, "backward")):
                with streams.on(i):
                    parts[i].block(number, step, arriving.wait())
            parts[0].receive()
            # In the memory that `receive` has freed, so that the other stream comes after it as well
            dq, dk, dv = (
                torch.empty(x.shape, dtype=dtype, device=x.device)
                for x, dtype in ((q, q.dtype), (k, out_dtype), (v, out_dtype))
            )
            for i in reversed(range(len(parts))):  # as their last gradients were sent
                if i:
                    streams.after(i, 0)
                with streams.on(i):
                    parts[i].finish(dq, dk, dv)
    dsinks = q.new_empty(0) if sinks is None else sink_gradient(sinks, lse, delta)
    return dq, dk, dv, dsinks


class _Backward:
    """A share of the heads in the backward pass. Its dq, and the dk and dv of the rank's own keys, are sums in the
    accumulator's dtype, which live from their first block to their last. The gradients of others' keys go home while
    the other share's block is computed, and are added there in the order of the steps. All is made here, see
    `_Forward`."""

    def __init__(
        self,
        share: _Share,
        steps: list[Step],
        inputs: tuple[Tensor, Tensor, Tensor, Tensor],
        k: Tensor,
        run: Callable[..., object],
        lane: Transport,
    ) -> None:
        dout, q, lse, delta = inputs
        self.share, self.run, self.lane, self.last = share, run, lane, len(steps) - 1
        self.inputs = dout[:, :, share.q], q[:, :, share.q]
        self.statistics = lse[:, share.q].contiguous(), delta[:, share.q].contiguous()
        wide, (batch, rows, heads, dim) = accumulator(q.dtype), k[:, :, share.kv].shape
        self.dq = torch.zeros(self.inputs[1].shape, dtype=wide, device=q.device)
        self.sums = self.dq.new_empty(batch, rows, heads, dim), self.dq.new_empty(batch, rows, heads, dim)
        self.begun = False  # whether the sums hold something
        most = max(len(step.keys) for step in steps[1:])
        self.others: Tensor | None = self.dq.new_empty(2, batch * most * heads * dim)  # another rank's keys' gradients
        self.expected: tuple[int, Runs, Exchange] | None = None  # step, rows, and their gradients on the way here
        self.arrived: Pair | None = None

    def block(self, number: int, step: Step, pair: Pair) -> None:
        if self.expected is not None and self.expected[0] < self.last:
            self.add()  # they have had a block's time; the last ones have until `finish`
        into, fresh = self.sums, not self.begun
        if number:
            assert self.others is not None
            batch, _, heads, dim = self.sums[0].shape
            size = batch * len(step.keys) * heads * dim
            dk, dv = (x[:size].view(batch, len(step.keys), heads, dim) for x in self.others)
            into, fresh = (dk, dv), True
        if len(step.keys):
            k, v = (x[:, :, self.share.kv] for x in pair)
            self.run(*self.inputs, k, v, *self.statistics, step.plan, dq=self.dq, dk=into[0], dv=into[1], fresh=fresh)
        if number:
            what = f"the gradients of step {number} of {self.last} of the backward pass"
            self.expected = number, step.sent, self.lane.exchange(into, step.owner, len(step.sent), step.reader, what)
        else:
            self.begun = True

    def add(self) -> None:
        """Gradients of the rank's own keys have come home."""
        assert self.expected is not None
        _, runs, arriving = self.expected
        for total, x in zip(self.sums, arriving.wait(), strict=True):
            if not self.begun:
                total.zero_()
            runs.add(total, x)
        self.begun = True
        arriving.done()

    def receive(self) -> None:
        """Wait for the last that come home, and until those of others have gone, whose memory is free then."""
        assert self.expected is not None
        self.arrived, self.others = self.expected[2].wait(), None

    def finish(self, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Round the sums, with the last that have come home, into the share's part of these."""
        assert self.expected is not None
        _, runs, arriving = self.expected
        arrived = self.arrived or arriving.wait()
        rounded_sum(dq[:, :, self.share.q], self.dq)
        for out, total, x in zip((dk, dv), self.sums, arrived, strict=True):
            _settle(out[:, :, self.share.kv], total, runs, x)
        arriving.done()


def _settle(out: Tensor, total: Tensor, runs: Runs, x: Tensor) -> None:
    """out = total, with x added to those rows of it: each row once, as 16K tokens of 32 heads are 0.6 GB a pass."""
    at = done = 0
    for start, stop in runs.edges:
        rounded_sum(out[:, done:start], total[:, done:start])
        rounded_sum(out[:, start:stop], total[:, start:stop], x[:, at : at + stop - start])
        at, done = at + stop - start, stop
    rounded_sum(out[:, done:], total[:, done:])


define_sharded(OPERATOR, "str group_name, str transport, float scale, float softcap, str backend", _forward, _backward)
