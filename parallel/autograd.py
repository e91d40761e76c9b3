"""Autograd around the operators of sharded attention, and around the repeated key heads of Ulysses."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringspan.kernels.attention import accumulator, define_operators, fake_backward
from ringspan.parallel.parts import within
from ringspan.parallel.ulysses import exchange, repeat_heads, sum_repeated


class ShardedAttention(torch.autograd.Function):
    """out of ``torch.ops.ringspan.NAME(q, k, v, sinks, table, data, *settings)``, and gradients by ``NAME_backward``.

    With ``ulysses`` (a group's name, and its ranks) k and v are this rank's positions of all heads, which the ranks do
    not divide: they are repeated and exchanged here, so that the gradients of one head's repetitions are added up in
    the accumulator's dtype and rounded once. q has had its exchange.
    """

    @staticmethod
    def forward(ctx, name, ulysses, q, k, v, sinks, table, data, *settings):  # type: ignore[no-untyped-def]
        ctx.name, ctx.ulysses, ctx.settings, ctx.kv_heads = name, ulysses, settings, k.shape[2]
        if ulysses is not None:
            k, v = (exchange(repeat_heads(x, ulysses[1]), ulysses[0], 2, 1) for x in (k, v))
        out, lse = getattr(torch.ops.ringspan, name)(q, k, v, sinks, table, data, *settings)
        ctx.save_for_backward(q, k, v, sinks, out, lse, table, data)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):  # type: ignore[no-untyped-def]
        q, k, v, sinks, out, lse, table, data = ctx.saved_tensors
        run: Any = getattr(torch.ops.ringspan, f"{ctx.name}_backward")
        wide = ctx.ulysses is not None
        dq, dk, dv, dsinks = run(dout, dlse, q, k, v, sinks, out, lse, table, data, *ctx.settings, wide)
        if wide:
            dk, dv = (_home(x, ctx.ulysses[0], ctx.kv_heads, k.dtype) for x in (dk, dv))
        return None, None, dq, dk, dv, None if sinks is None else dsinks, None, None, *[None] * len(ctx.settings)


def _home(grad: Tensor, group_name: str, kv_heads: int, dtype: torch.dtype) -> Tensor:
    return sum_repeated(exchange(grad, group_name, 1, 2), kv_heads).to(dtype)


def _fake_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of an operator's gradients; its last argument says whether dk and dv are wide."""
    dq, dk, dv, dsinks = fake_backward(*args)
    if args[-1]:
        dk, dv = (x.new_empty(x.shape, dtype=accumulator(x.dtype)) for x in (dk, dv))
    return dq, dk, dv, dsinks


def define_sharded(name: str, settings: str, forward: Callable[..., object], backward: Callable[..., object]) -> None:
    """The operators that ``ShardedAttention`` runs by that name; ``settings`` follow a plan's two tensors."""
    settings = f"Tensor table, Tensor data, {settings}"
    forward, backward = (within("attention")(run) for run in (forward, backward))
    define_operators(name, settings, forward, backward, backward_settings=f"{settings}, bool wide", fake=_fake_backward)
