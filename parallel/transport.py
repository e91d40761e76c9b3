"""How keys travel between the ranks of a ring. A new wire is a new class with the same two verbs."""

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

Parcel = tuple[Tensor, int]  # a contiguous tensor, and the group rank that it goes to or comes from


class Exchange(Protocol):
    def wait(self) -> None:
        """Until then neither what was sent may be written nor what was received be read."""


class Transport(Protocol):
    def exchange(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Exchange:
        """Start all of them, and return at once. Between two ranks parcels arrive in the order they were sent."""


class PointToPoint:
    """NCCL or gloo send and receive, batched: one launch an exchange, on a stream of their own."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def exchange(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> "_Works":
        moves = [
            dist.P2POp(move, tensor, group=self.group, group_peer=peer)
            for move, parcels in ((dist.isend, sends), (dist.irecv, receives))
            for tensor, peer in parcels
            if tensor.numel()
        ]
        return _Works(dist.batch_isend_irecv(moves) if moves else [], moves)


class _Works:
    def __init__(self, works: Sequence[dist.Work], moves: Sequence[dist.P2POp]) -> None:
        self.works, self.moves = works, moves  # the moves keep what is being sent alive

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        self.moves = []


TRANSPORTS = {"p2p": PointToPoint}


def pick_transport(name: str) -> str:
    """The transport that runs for ``name``. ValueError: an unknown one."""
    if name != "auto" and name not in TRANSPORTS:
        raise ValueError(f"transport={name!r}: must be one of auto, {', '.join(TRANSPORTS)}")
    return "p2p" if name == "auto" else name


def group_by_name(name: str) -> dist.ProcessGroup:
    """The group of that ``group_name``: operators take strings, and torch keeps the registry."""
    return _resolve_process_group(cast(Any, name))  # torch 2.13 types the name as its own kind of string
