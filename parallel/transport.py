"""How pairs of tensors, keys and values or their gradients, travel between the ranks of a ring.

A new wire is a new class with one verb, `exchange`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from ringspan.parallel import copy_engine
from ringspan.parallel.copy_engine import Lane, Pair
from ringspan.parallel.parts import within
from ringspan.parallel.waiting import waiting
from ringspan.parallel.watchdog import TransportError, Wait


class Exchange(Protocol):
    def wait(self) -> Pair:
        """What has come in, good until ``done``: each stream that reads it waits here, and one does in any case."""

    def done(self) -> None:
        """What came in has been read by work that has been issued, on the streams that have waited. From here on they
        may write what was sent again."""


class Transport(Protocol):
    """One lane between the ranks of a group: its exchanges are started, and done with, in one order on all ranks."""

    @property
    def open(self) -> Sequence[Exchange]:
        """Those that are started and not done with, in order."""

    def exchange(self, sent: Pair, to: int, rows: int, source: int, what: str) -> Exchange:
        """Start to send a pair to rank ``to`` and to receive its like of ``rows`` rows from rank ``source``; returns at
        once. What has no rows is not sent. ``what`` is for error messages."""


class PointToPoint:
    """NCCL or gloo send and receive, batched: one launch an exchange, on a stream of their own."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.open: list[_Works] = []

    def exchange(self, sent: Pair, to: int, rows: int, source: int, what: str) -> _Works:
        shape = (sent[0].shape[0], rows, *sent[0].shape[2:])
        arriving = torch.empty(shape, dtype=sent[0].dtype, device=sent[0].device), sent[0].new_empty(shape)
        moves = [
            dist.P2POp(move, tensor, group=self.group, group_peer=peer)
            for move, pair, peer in ((dist.isend, sent, to), (dist.irecv, arriving, source))
            for tensor in pair
            if tensor.numel()
        ]
        wait = Wait(self.group, sent[0].device, "p2p", what, source, to)
        works = _Works(moves, arriving, wait, self.open)
        self.open.append(works)
        return works


class _Works:
    def __init__(self, moves: list[dist.P2POp], arriving: Pair, waiting: Wait, open_: list[_Works]) -> None:
        self.moves, self.arriving, self.waiting = moves, arriving, waiting  # the moves keep what is being sent alive
        self.works = dist.batch_isend_irecv(moves) if moves else []
        self.waited, self.open = False, open_

    @within("ring")
    def wait(self) -> Pair:
        cuda = self.arriving[0].is_cuda
        if self.works and (cuda or not self.waited):  # on a CPU the host itself has waited, and for all
            with waiting(self.arriving[0].device), nullcontext() if self.waited else self.waiting:
                for work in self.works:
                    work.wait()
        if cuda and self.waited:  # a second stream: the allocator knows of the first
            for x in self.arriving:
                x.record_stream(torch.cuda.current_stream(x.device))
        self.waited = True
        return self.arriving

    def done(self) -> None:
        """Nobody waits for the memory: it is this exchange's own."""
        self.moves = []
        self.open.remove(self)


@contextmanager
def settled(*lanes: Transport) -> Iterator[None]:
    """Inside is a pass. Before an error leaves it, what is on its way arrives: it would else be taken for the next
    pass's, which waits for ever. All ranks that have come as far have started it. Where one is lost nobody waits, nor
    where this one is told to leave."""
    try:
        yield
    except TransportError:
        raise
    except Exception:
        with suppress(RuntimeError):  # a rank is lost, too: what was raised first is told
            for exchange in [one for lane in lanes for one in lane.open]:
                exchange.wait()
                exchange.done()
        raise


TRANSPORTS: dict[str, Callable[[dist.ProcessGroup, torch.device, Lane], Transport]] = {
    "p2p": lambda group, device, lane: PointToPoint(group),
    "copy_engine": copy_engine.open_mailbox,
}


def open_lane(transport: str, group: dist.ProcessGroup, device: torch.device, lane: Lane) -> Transport:
    """The lane between the ranks of the group; they ask together, for the same one."""
    return TRANSPORTS[transport](group, device, lane)


def check_transport(name: str) -> str:
    """ValueError: an unknown name."""
    if name != "auto" and name not in TRANSPORTS:
        raise ValueError(f"transport={name!r}: must be one of auto, {', '.join(TRANSPORTS)}")
    return name


def pick_transport(name: str, group: dist.ProcessGroup, device: torch.device) -> str:
    """The transport that runs for ``name``; the ranks of the group ask together.

    "auto" is the copy engine where all ranks are GPUs of one host that reach each other's memory, else p2p.
    ValueError: an unknown name, or a copy engine asked for where there is none, and why.
    """
    if check_transport(name) == "p2p":
        return name
    refusal = copy_engine.refusal(group, device)
    if refusal and name == "copy_engine":
        raise ValueError(f"transport='copy_engine' cannot run here: {refusal}; use transport='auto'")
    return "p2p" if refusal else "copy_engine"


_agreed: WeakKeyDictionary[dist.ProcessGroup, set[Hashable]] = WeakKeyDictionary()  # a later group has the same name


def agree(group: dist.ProcessGroup, what: dict[str, Any]) -> None:
    """Compare ``what`` between the ranks, once for each that comes up: before anything of that shape travels.

    ValueError: the ranks differ, and in what.
    """
    key, agreed = tuple(what.items()), _agreed.setdefault(group, set())
    if key in agreed:
        return
    told: list[Any] = [None] * group.size()
    try:
        dist.all_gather_object(told, what, group=group)
    except RuntimeError as error:
        ranks = dist.get_process_group_ranks(group)
        raise TransportError(
            f"rank {ranks[group.rank()]}: set-up of the ring failed: one of ranks {ranks} has died or not come to it"
        ) from error
    for name in what:
        values = [one[name] for one in told]
        if any(value != values[0] for value in values):
            listed = ", ".join(f"rank {rank} has {value}" for rank, value in enumerate(values))
            raise ValueError(f"{name} differs between the ranks of the ring: {listed}; all need the same")
    agreed.add(key)


def group_by_name(name: str) -> dist.ProcessGroup:
    """The group of that ``group_name``: operators take strings, and torch keeps the registry."""
    return _resolve_process_group(cast(Any, name))  # torch 2.13 types the name as its own kind of string
