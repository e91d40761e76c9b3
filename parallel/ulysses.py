"""Ulysses: ranks trade heads for positions by all-to-all (Jacobs et al., DeepSpeed Ulysses, arXiv 2309.14509)."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ringspan.parallel.transport import group_by_name


def to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(batch, rows, heads, dim) of this rank's positions -> (batch, ranks * rows, heads / ranks, dim): its heads."""
    return x if group.size() == 1 else _exchange(x, group.group_name, 2, 1)


def to_positions(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The way back from ``to_heads``."""
    return x if group.size() == 1 else _exchange(x, group.group_name, 1, 2)


def replicate_heads(x: Tensor, ranks: int) -> Tensor:
    """K or V with each head repeated until ``ranks`` divides them: lcm(kv_heads, ranks). Gradients are summed back."""
    kv_heads = x.shape[2]
    return x.repeat_interleave(math.lcm(kv_heads, ranks) // kv_heads, dim=2) if kv_heads % ranks else x


@torch.library.custom_op("ringspan::ulysses_exchange", mutates_args=())
def _exchange(x: Tensor, group_name: str, split_dim: int, join_dim: int) -> Tensor:
    """Rank r's r-th part along ``split_dim`` of every rank's x, joined along ``join_dim`` in rank order."""
    group = group_by_name(group_name)
    ranks = group.size()
    sent = torch.stack(x.chunk(ranks, dim=split_dim))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return torch.cat(received.unbind(), dim=join_dim)


@_exchange.register_fake
def _(x, group_name, split_dim, join_dim):  # type: ignore[no-untyped-def]
    ranks = group_by_name(group_name).size()
    shape = list(x.shape)
    shape[split_dim] //= ranks
    shape[join_dim] *= ranks
    return x.new_empty(shape)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, ctx.group_name, ctx.split_dim, ctx.join_dim = inputs


def _gradient(ctx, dout):  # type: ignore[no-untyped-def]
    return _exchange(dout, ctx.group_name, ctx.join_dim, ctx.split_dim), None, None, None


_exchange.register_autograd(_gradient, setup_context=_setup)
