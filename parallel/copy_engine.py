"""Pairs of tensors carried by the DMA engines of the GPUs of one host: no multiprocessor moves a byte or polls a flag.

Each rank has boxes in symmetric memory, mapped into the others' address spaces. An exchange is, all in stream order
and never seen by the host:

    receiver   my box is free           -> a counter in the sender's memory
    sender     waits for that counter, copies straight from where the tensors are into the box, on a stream of its own
    sender     the box is full          -> a counter in the receiver's memory, whose compute stream waits for it

The sender pushes: were keys pulled from their owner, it would first have to copy them into symmetric memory, which is
one more range of memory and 0.2 ms a layer for 16K tokens of 32 heads. Counters only grow, so nothing is ever reset.

Every wait is for something that its peer issues earlier in the common order of exchanges, before any wait of the same
exchange. So a rank whose work were run one by one, as when streams share a hardware queue, would not lock up either.
"""

from __future__ import annotations

import ctypes
import functools
import os
import socket
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _SymmetricMemory

from ringspan.parallel.parts import within
from ringspan.parallel.waiting import waiting
from ringspan.parallel.watchdog import Wait

Pair = tuple[Tensor, Tensor]  # contiguous, of one shape (batch, rows, heads, dim) and dtype
ALIGN = 512  # bytes: more than any load of a kernel needs


class Lane(NamedTuple):
    """What of one kind travels: exchanges that follow each other in one order on all ranks."""

    name: str
    open: int  # exchanges, at most, that have been started and are not done with
    nbytes: int  # of the largest tensor of a pair, the same on all ranks


class Link(Protocol):
    """What a mailbox asks of the machine, in the order of the lane's own stream, or of the one that is computing."""

    rank: int
    ranks: int

    def allocate(self, nbytes: int) -> None:
        """Give all ranks buffers of that size and counters at 0; collective, and what was on its way has arrived."""

    def here(self) -> Any:
        """The stream that is computing: there may be several, by turns."""

    def follow(self, compute: Any) -> None:
        """The lane waits for all that this stream has been given so far."""

    def tell(self, peer: int, counter: int, value: int) -> None:
        """The lane sets that counter of the peer's."""

    def expect(self, counter: int, value: int) -> None:
        """The lane waits until that counter of ours has reached the value."""

    def push(self, peer: int, offset: int, x: Tensor) -> None:
        """The lane copies x into the peer's buffer."""

    def mark(self) -> Any:
        """This place in the lane."""

    def join(self, mark: Any, counter: int, value: int | None) -> None:
        """What computes waits until the lane has passed the mark and that counter of ours has reached the value, if
        any."""

    def box(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A view of our own buffer."""

    def waiting(self, what: str, source: int, to: int) -> Any:
        """The context in which `join` is called: it watches over it."""


class Mailbox:
    """One lane between the ranks of a group, over a link: exchange number n goes through box n mod ``boxes``.

    Counters of a rank: at p, the number of the latest exchange for which rank p's box is free, plus 1; at ranks + p, of
    the latest that rank p has put into ours. Both grow in the order of p's lane.
    """

    def __init__(self, link: Link, boxes: int) -> None:
        self.link, self.boxes = link, boxes
        self.room = 0  # bytes of a box
        self.started = 0
        self.open: list[_Delivery] = []

    def reserve(self, nbytes: int) -> None:
        """Boxes for pairs of tensors of up to that size; collective where they must grow."""
        room = 2 * _aligned(nbytes)
        if room > self.room:
            self.link.allocate(self.boxes * room)
            self.room, self.started = room, 0

    @within("ring")
    def exchange(self, sent: Pair, to: int, rows: int, source: int, what: str) -> _Delivery:
        number, link = self.started, self.link
        assert len(self.open) < self.boxes, f"{what}: the box of {self.boxes} exchanges ago has not been read"
        self.started += 1
        link.follow(link.here())  # what is sent has been written; `done` has seen to what was in our box
        if rows:
            link.tell(source, link.rank, number + 1)
        offset = number % self.boxes * self.room
        if sent[0].shape[1]:
            link.expect(to, number + 1)
            for place, x in zip(self._places(offset, sent[0]), sent, strict=True):
                link.push(to, place, x)
            link.tell(to, link.ranks + link.rank, number + 1)
        shape = (sent[0].shape[0], rows, *sent[0].shape[2:])
        delivery = _Delivery(self, number, link.mark(), offset, shape, sent, to, source, what)
        self.open.append(delivery)
        return delivery

    def _places(self, offset: int, x: Tensor) -> tuple[int, int]:
        nbytes = _aligned(x.numel() * x.element_size())
        assert 2 * nbytes <= self.room, f"{tuple(x.shape)} twice in a box of {self.room} bytes"
        return offset, offset + nbytes


class _Delivery:
    def __init__(
        self, mailbox: Mailbox, number: int, mark: Any, offset: int, shape: tuple[int, ...], sent: Pair, to: int,
        source: int, what: str,
    ) -> None:  # fmt: skip
        self.mailbox, self.number, self.mark, self.offset, self.shape = mailbox, number, mark, offset, shape
        self.sent: Pair | None = sent  # alive for as long as it is being read
        self.readers: list[Any] = []
        self.dtype, self.to, self.source, self.what = sent[0].dtype, to, source, what

    def wait(self) -> Pair:
        link = self.mailbox.link
        value = self.number + 1 if self.shape[1] else None
        with nullcontext() if self.readers else link.waiting(self.what, self.source, self.to):
            link.join(self.mark, link.ranks + self.source, value)
        self.readers.append(link.here())
        first = link.box(self.offset, self.shape, self.dtype)
        second = self.offset + _aligned(first.numel() * first.element_size())
        return first, link.box(second, self.shape, self.dtype)

    def done(self) -> None:
        assert self.mailbox.open[0] is self, f"{self.what}: exchanges are done with in their order"
        del self.mailbox.open[0]
        for reader in self.readers:
            self.mailbox.link.follow(reader)
        self.sent = None


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


class CudaLink:
    """Symmetric memory, stream memory operations of the driver, and peer copies."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.rank, self.ranks = group.rank(), group.size()
        self.lane = torch.cuda.Stream(device)
        self.inbox = torch.cuda.Stream(device)  # waits for arrivals, so that no wait stands on a default stream
        self.header = _aligned(2 * self.ranks * 4)
        self.buffer: Tensor | None = None
        self.buffers: list[int] = []  # the address of each rank's

    def allocate(self, nbytes: int) -> None:
        # Nothing here uses multicast objects, and drivers have been seen to hang with them.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        torch.cuda.synchronize(self.device)
        dist.barrier(self.group)  # nobody still writes to what is freed now
        self.buffer, self.handle = None, None
        name, size = self.group.group_name, self.header + nbytes
        # Not symm_mem.empty: its pool would keep the smaller buffers for ever
        buffer = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, self.device, name)
        buffer[: self.header].zero_()
        torch.cuda.synchronize(self.device)
        self.handle = _SymmetricMemory.rendezvous(buffer, name)  # every rank is past its zeros when it comes here
        self.buffer, self.buffers = buffer, list(self.handle.buffer_ptrs)
        assert self.buffers[self.rank] == buffer.data_ptr()

    def here(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def follow(self, compute: torch.cuda.Stream) -> None:
        self.lane.wait_stream(compute)

    def tell(self, peer: int, counter: int, value: int) -> None:
        _driver("cuStreamWriteValue32_v2", self.lane.cuda_stream, self.buffers[peer] + 4 * counter, value & _UINT32, 0)

    def expect(self, counter: int, value: int) -> None:
        self._expect(self.lane, counter, value)

    def _expect(self, stream: torch.cuda.Stream, counter: int, value: int) -> None:
        # Flag 0: until (int32)(counter - value) >= 0, so that counters may wrap around
        address = self.buffers[self.rank] + 4 * counter
        _driver("cuStreamWaitValue32_v2", stream.cuda_stream, address, value & _UINT32, 0)

    def push(self, peer: int, offset: int, x: Tensor) -> None:
        at = self.buffers[peer] + self.header + offset
        assert x.is_contiguous(), f"strides {x.stride()}"
        _driver("cuMemcpyAsync", at, x.data_ptr(), x.numel() * x.element_size(), self.lane.cuda_stream)

    def mark(self) -> torch.cuda.Event:
        return self.lane.record_event()

    def join(self, mark: torch.cuda.Event, counter: int, value: int | None) -> None:
        compute = self.here()
        with waiting(self.device, compute):
            compute.wait_event(mark)
            if value is not None:
                self._expect(self.inbox, counter, value)
                compute.wait_stream(self.inbox)

    def box(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        assert self.buffer is not None
        start = self.header + offset
        nbytes = functools.reduce(lambda x, y: x * y, shape, dtype.itemsize)
        return self.buffer[start : start + nbytes].view(dtype).view(shape)

    def waiting(self, what: str, source: int, to: int) -> Wait:
        return Wait(self.group, self.device, "copy_engine", what, source, to)


_UINT32 = 2**32 - 1
_POINTER, _SIZE, _WORD = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_uint32
_ARGUMENTS = {
    "cuStreamWriteValue32_v2": (ctypes.c_void_p, _POINTER, _WORD, ctypes.c_uint),
    "cuStreamWaitValue32_v2": (ctypes.c_void_p, _POINTER, _WORD, ctypes.c_uint),
    "cuMemcpyAsync": (_POINTER, _POINTER, _SIZE, ctypes.c_void_p),
}


@functools.cache
def _function(name: str) -> Any:
    function = getattr(ctypes.CDLL("libcuda.so.1"), name)
    function.argtypes, function.restype = _ARGUMENTS[name], ctypes.c_int
    return function


class DriverError(Exception):
    """The CUDA driver has refused a call."""


def _driver(name: str, *arguments: int) -> None:
    if code := _function(name)(*arguments):
        raise DriverError(f"{name} failed with CUDA driver error {code}")


_mailboxes: dict[tuple[str, str], Mailbox] = {}  # by group and lane: all layers share them


def open_mailbox(group: dist.ProcessGroup, device: torch.device, lane: Lane) -> Mailbox:
    """The group's mailbox for the lane, with room enough: the same one at each call."""
    mailbox = _mailboxes.get((group.group_name, lane.name))
    if mailbox is None or not isinstance(mailbox.link, CudaLink) or mailbox.link.group is not group:
        mailbox = _mailboxes[group.group_name, lane.name] = Mailbox(CudaLink(group, device), lane.open)
    mailbox.reserve(lane.nbytes)
    return mailbox


def reserved_bytes() -> int:
    """Device memory of all mailboxes of this process, which PyTorch's allocator does not count."""
    buffers = [mailbox.link.buffer for mailbox in _mailboxes.values() if isinstance(mailbox.link, CudaLink)]
    return sum(buffer.numel() for buffer in buffers if buffer is not None)


_refusals: WeakKeyDictionary[dist.ProcessGroup, str | None] = WeakKeyDictionary()  # asked once


def refusal(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Why the ranks of the group cannot write into each other's memory; None if they can. They ask together."""
    if device.type != "cuda":
        return f"no CUDA device (tensors are on {device})"
    if group not in _refusals:
        told: list[Any] = [None] * group.size()
        dist.all_gather_object(told, _reach(device), group=group)
        _refusals[group] = _obstacle(told)
    return _refusals[group]


def _reach(device: torch.device) -> tuple[str, str, list[str]]:
    """This rank's host, its GPU, and the GPUs whose memory that one reaches."""
    uuids = [str(torch.cuda.get_device_properties(one).uuid) for one in range(torch.cuda.device_count())]
    mine = torch.cuda.current_device() if device.index is None else device.index
    near = [x for one, x in enumerate(uuids) if one != mine and torch.cuda.can_device_access_peer(mine, one)]
    return socket.gethostname(), uuids[mine], near


def _obstacle(told: list[tuple[str, str, list[str]]]) -> str | None:
    for rank, (host, gpu, near) in enumerate(told):
        for peer, (its_host, its_gpu, _) in enumerate(told):
            if its_host != host:
                return f"ranks {rank} and {peer} of the ring are on hosts {host} and {its_host}"
            if peer != rank and its_gpu == gpu:
                return f"ranks {rank} and {peer} of the ring share a GPU"
            if peer != rank and its_gpu not in near:
                return f"the GPU of rank {rank} of the ring does not reach, or see, that of rank {peer}"
    return None
