"""What all ranks of the default group agree on before it changes what they do next."""

from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist

Value = TypeVar("Value")


def from_rank_zero(make: Callable[[], Value]) -> Value:
    """``make()`` of rank 0 on every rank; a ValueError too."""
    box: list[tuple[Value | None, str | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            box = [(make(), None)]
        except ValueError as error:
            box = [(None, str(error))]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    value, mistake = box[0]
    if mistake is not None:
        raise ValueError(mistake)
    return cast(Value, value)


def of_every_rank(value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """``value`` of each rank, by rank. On the CPU."""
    every: list[Value] = [value] * dist.get_world_size(group)
    dist.all_gather_object(every, value, group=group)
    return every


def any_rank(flag: bool) -> bool:
    """Whether it is so on any rank: then all leave at the same step. On the CPU, beside what a GPU does."""
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)
