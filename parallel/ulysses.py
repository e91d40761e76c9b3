"""Ulysses: ranks trade heads for positions by all-to-all (Jacobs et al., DeepSpeed Ulysses, arXiv 2309.14509)."""

import torch
import torch.distributed as dist
from torch import Tensor

from ringspan.parallel.parts import part
from ringspan.parallel.transport import agree, group_by_name
from ringspan.parallel.waiting import waiting


def to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(batch, rows, heads, dim) of this rank's positions -> (batch, ranks * rows, heads / ranks, dim): its heads."""
    return x if group.size() == 1 else exchange(x, group.group_name, 2, 1)


def to_positions(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The way back from ``to_heads``."""
    return x if group.size() == 1 else exchange(x, group.group_name, 1, 2)


def repeat_heads(x: Tensor, ranks: int) -> Tensor:
    """K or V with each head repeated until ``ranks`` divides them: lcm(kv_heads, ranks)."""
    times = next(n for n in range(1, ranks + 1) if n * x.shape[2] % ranks == 0)  # torch.compile refuses math.lcm here
    return x.repeat_interleave(times, dim=2)


def sum_repeated(grad: Tensor, kv_heads: int) -> Tensor:
    """The gradient of what ``repeat_heads`` was given: the sum over each head's repetitions, in grad's dtype."""
    return grad.unflatten(2, (kv_heads, -1)).sum(dim=3)


@torch.library.custom_op("ringspan::ulysses_exchange", mutates_args=())
def exchange(x: Tensor, group_name: str, split_dim: int, join_dim: int) -> Tensor:
    """Rank r's r-th part along ``split_dim`` of every rank's x, joined along ``join_dim`` in rank order.

    ValueError: x differs between the ranks in shape or dtype.
    """
    group = group_by_name(group_name)
    agree(group, {"shape": tuple(x.shape), "dtype": x.dtype})
    sent = torch.stack(x.chunk(group.size(), dim=split_dim))
    received = torch.empty_like(sent)
    with part("ring"), waiting(x.device):
        dist.all_to_all_single(received, sent, group=group)
    return torch.cat(received.unbind(), dim=join_dim)


@exchange.register_fake
def _(x, group_name, split_dim, join_dim):  # type: ignore[no-untyped-def]
    ranks = group_by_name(group_name).size()
    shape = list(x.shape)
    shape[split_dim] //= ranks
    shape[join_dim] *= ranks
    return x.new_empty(shape)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, ctx.group_name, ctx.split_dim, ctx.join_dim = inputs


def _gradient(ctx, dout):  # type: ignore[no-untyped-def]
    return exchange(dout, ctx.group_name, ctx.join_dim, ctx.split_dim), None, None, None


exchange.register_autograd(_gradient, setup_context=_setup)
