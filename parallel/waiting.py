"""Seconds in which a rank's attention computes nothing, as what it needs from other ranks has not come yet.

On a CPU the host itself waits, and its clock tells. On a GPU streams wait while the host runs ahead: events stand
around each wait and are read once the device has passed them, so that nothing waits for the measuring. Where two
streams take turns (`streams.py`), a wait of the one counts only while the other computes nothing either.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch

Interval = tuple[float, float]


class Recording:
    """Of one device, on the stream that was current when it was made and on the one beside it."""

    current: ClassVar[Recording | None] = None  # operators are opaque, and take no such argument

    def __init__(self, device: torch.device) -> None:
        self.host_seconds = 0.0
        self.waits, self.waits_beside, self.turns = (list[tuple[Any, Any]]() for _ in range(3))
        self.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self.began = _mark(self.stream) if self.stream else None

    def seconds(self) -> float:
        """Of all waits so far. Waits until the device has passed them."""
        if self.stream is None or self.began is None:
            return self.host_seconds
        self.stream.synchronize()
        at = self.began.elapsed_time  # ms
        kinds = ([(at(a), at(b)) for a, b in kind] for kind in (self.waits, self.turns, self.waits_beside))
        return idle(*kinds) / 1000


def idle(waits: Sequence[Interval], turns: Sequence[Interval], waits_beside: Sequence[Interval]) -> float:
    """How long one stream is in ``waits`` while the other has no turn, or is in ``waits_beside``."""
    kinds = enumerate((waits, turns, waits_beside))
    edges = [(at, kind, way) for kind, spans in kinds for span in spans for at, way in zip(span, (1, -1), strict=True)]
    inside, total, before = [0, 0, 0], 0.0, 0.0
    for at, kind, way in sorted(edges):
        if inside[0] and not (inside[1] and not inside[2]):
            total += at - before
        inside[kind] += way
        before = at
    return total


@contextmanager
def recorded(device: torch.device) -> Iterator[Recording]:
    """All waits inside, of any thread, go into the recording."""
    Recording.current = recording = Recording(device)
    try:
        yield recording
    finally:
        Recording.current = None


def waiting(device: torch.device, stream: torch.cuda.Stream | None = None) -> AbstractContextManager[object]:
    """Inside, the host (on a CPU) or the stream (default: the current one) is given nothing but other ranks to wait
    for."""
    recording = Recording.current
    if recording is None:
        return _NOTHING
    if device.type != "cuda":
        return _HostWait(recording)
    stream = stream or torch.cuda.current_stream(device)
    return _Span(stream, recording.waits if stream == recording.stream else recording.waits_beside)


def turn(stream: torch.cuda.Stream) -> AbstractContextManager[object]:
    """Inside, the stream beside has work of its own."""
    recording = Recording.current
    return _NOTHING if recording is None else _Span(stream, recording.turns)


_NOTHING: AbstractContextManager[object] = nullcontext()  # a ring of 8 over 32 layers comes here 1,500 times a step


class _HostWait:
    def __init__(self, recording: Recording) -> None:
        self.recording = recording

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.recording.host_seconds += time.perf_counter() - self.started


class _Span:
    def __init__(self, stream: torch.cuda.Stream, spans: list[tuple[Any, Any]]) -> None:
        self.stream, self.spans = stream, spans

    def __enter__(self) -> None:
        self.begun = _mark(self.stream)

    def __exit__(self, *error: object) -> None:
        self.spans.append((self.begun, _mark(self.stream)))


def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event
