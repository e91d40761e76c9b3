"""Two streams of a GPU that fill each other's gaps: where the last blocks of one kernel leave multiprocessors idle, the
first of the other's run."""

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from ringspan.parallel.waiting import turn, waiting


class Streams:
    """``on(0)`` is the stream that was current, ``on(1)`` the one beside it; on a CPU there is nothing to be beside."""

    def __init__(self, streams: list[torch.cuda.Stream]) -> None:
        self.streams = streams

    def on(self, i: int) -> AbstractContextManager[object]:
        """What is issued inside runs in order, and beside what is issued on the other."""
        return torch.cuda.stream(self.streams[i]) if i and self.streams else nullcontext()

    def after(self, i: int, other: int) -> None:
        """Stream i waits for all that the other has been given so far."""
        if self.streams:
            with waiting(self.streams[i].device, self.streams[i]):
                self.streams[i].wait_stream(self.streams[other])


@contextmanager
def side_by_side(device: torch.device, n: int) -> Iterator[Streams]:
    """``n`` streams, 1 or 2.

    All that is issued on them follows what the current one has been given before, and precedes what it is given later.
    Tensors that one stream has made and the other reads must live until then.
    """
    if n == 1 or device.type != "cuda":
        yield Streams([])
        return
    here = torch.cuda.current_stream(device)
    streams = Streams([here, _side(here.device_index)])
    streams.after(1, 0)
    try:
        with turn(streams.streams[1]):
            yield streams
    finally:
        streams.after(0, 1)


@functools.cache
def _side(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
