"""Tensors that wait in the host's memory: copied out while the device goes on, and back before they are asked for."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNED = 512  # bytes: where each tensor of a parcel starts


class Parcel:
    """Tensors that were put together, and are taken together."""

    def __init__(self, tensors: Sequence[Tensor | None], before: Parcel | None) -> None:
        self.device: list[Tensor | None] | None = list(tensors)  # None: in the host's memory alone
        self.before = None if before is None else weakref.ref(before)  # the one that backward needs after this one
        self.host: Tensor | None = None
        self.shapes = [None if x is None else (x.shape, x.dtype) for x in tensors]
        self.moved: torch.cuda.Event | None = None

    def views(self) -> list[Tensor | None]:
        """Its tensors' places in the host's memory."""
        assert self.host is not None
        places: list[Tensor | None] = []
        at = 0
        for one in self.shapes:
            if one is None:
                places.append(None)
                continue
            shape, dtype = one
            size = shape.numel() * dtype.itemsize
            places.append(self.host[at : at + size].view(dtype).view(shape))
            at += -(-size // ALIGNED) * ALIGNED
        return places

    def size(self) -> int:
        sizes = (0 if one is None else one[0].numel() * one[1].itemsize for one in self.shapes)
        return sum(-(-size // ALIGNED) * ALIGNED for size in sizes)


class HostMemory:
    """A last-in, first-out store. ``put`` begins to copy out and keeps the tensors on the device until the next
    ``put``; ``take`` begins to bring back the parcel that was put before the one it gives.

    So at most two parcels are on the device: on CUDA one is in use and the other on the wire, by a stream of its own;
    on a CPU the copies are made at once. Host memory is pinned, and used again: it grows to what one step needs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.newest: weakref.ref[Parcel] | None = None
        self.free: list[Tensor] = []  # buffers that no parcel has

    def put(self, tensors: Sequence[Tensor | None]) -> Parcel:
        before = _alive(self.newest)
        if before is not None and before.device is not None:
            self._wait(before)
            before.device = None
        parcel = Parcel(tensors, before)
        parcel.host = self._buffer(parcel.size())
        weakref.finalize(parcel, self.free.append, parcel.host)
        self._copy(parcel, parcel.views(), tensors)
        self.newest = weakref.ref(parcel)
        return parcel

    def take(self, parcel: Parcel) -> list[Tensor | None]:
        if parcel.device is None:
            self._fetch(parcel)
        self._wait(parcel)
        tensors, parcel.device = parcel.device, None
        before = _alive(parcel.before)
        self.newest = parcel.before
        if before is not None and before.device is None:
            self._fetch(before)
        assert tensors is not None
        return tensors

    def _fetch(self, parcel: Parcel) -> None:
        places = parcel.views()
        device = self.stream.device if self.stream else torch.device("cpu")
        parcel.device = [None if x is None else torch.empty_like(x, device=device) for x in places]
        self._copy(parcel, parcel.device, places)

    def _copy(self, parcel: Parcel, to: Sequence[Tensor | None], source: Sequence[Tensor | None]) -> None:
        """In order with all that the device was asked to compute so far, and beside what comes after."""
        if self.stream is None:
            self._copy_all(to, source)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            self._copy_all(to, source)
            parcel.moved = self.stream.record_event()

    def _copy_all(self, to: Sequence[Tensor | None], source: Sequence[Tensor | None]) -> None:
        for target, x in zip(to, source, strict=True):
            if target is not None and x is not None:
                target.copy_(x, non_blocking=True)

    def _wait(self, parcel: Parcel) -> None:
        if self.stream is not None and parcel.moved is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(parcel.moved)

    def _buffer(self, size: int) -> Tensor:
        """The smallest free one that is large enough; else a new one, in the place of those that are too small."""
        enough = [i for i, buffer in enumerate(self.free) if buffer.numel() >= size]
        if enough:
            return self.free.pop(min(enough, key=lambda i: self.free[i].numel()))
        self.release()
        return pinned(size, self.device, "train.offload=cpu")

    def release(self) -> None:
        """Give back the buffers that are free."""
        self.free.clear()


def pinned(size: int, device: torch.device, wanted_by: str) -> Tensor:
    """``size`` bytes of the host's memory, uint8, pinned for a CUDA device. ValueError, naming a field: they cannot be.

    Not torch's pinned memory: that comes in powers of two, up to twice of what is needed.
    """
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # not shared memory, of which a container may have little
    memory = mmap.mmap(-1, max(size, 1), flags=private)
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    if device.type == "cuda":
        error = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)
        if int(error) != 0:
            raise ValueError(
                f"{wanted_by}: {size / 2**30:.1f} GiB of host memory cannot be pinned (CUDA error {int(error)}); give "
                "the job more host memory or locked memory (ulimit -l), or keep less"
            )
        # Memory that is unmapped while it is registered can never be registered again: CUDA error 712. Any view keeps
        # the mapping alive, which says when it goes.
        weakref.finalize(memory, _unpin, device, buffer.data_ptr()).atexit = False
    return buffer


def _unpin(device: torch.device, address: int) -> None:
    torch.cuda.synchronize(device)  # a copy may still read or write it
    torch.cuda.cudart().cudaHostUnregister(address)


def _alive(parcel: weakref.ref[Parcel] | None) -> Parcel | None:
    return None if parcel is None else parcel()
