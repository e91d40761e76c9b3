"""What steps take of time and memory: added up since the last logged one, and looked at closely in the logged one."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from ringspan.parallel import copy_engine
from ringspan.parallel.waiting import Recording, recorded
from ringspan.train.metrics import GIB
from ringspan.train.state import State


class Meter:
    """Of one rank. Nothing here waits for the device until a logged step is over."""

    def __init__(self, device: torch.device, state: State) -> None:
        self.device, self.state = device, state
        self.recording: Recording | None = None  # of the step, if it is to be logged
        self.allocated: dict[str, int] = {}  # bytes at moments of that step
        self._clear()

    def _clear(self) -> None:
        self.steps, self.seconds = 0, {"step": 0.0, "data": 0.0, "save": 0.0}
        self.tokens, self.attended = 0, 0.0

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - started

    @contextmanager
    def step(self, *, logged: bool) -> Iterator[None]:
        """A whole step; the gradient's norm, at its end, has waited for the device."""
        self.allocated = {}
        with self.timed("step"), recorded(self.device) if logged else nullcontext() as self.recording:
            self.see("before")
            yield
        self.steps += 1

    def see(self, moment: str) -> None:
        """How much of a GPU's memory is taken. Costs 30 us, which is why other steps do without."""
        if self.recording is not None and self.device.type == "cuda":
            self.allocated[moment] = torch.cuda.memory_allocated(self.device)

    def count(self, tokens: int, attended: float) -> None:
        """The work of a step: positions of all ranks, and pairs of (query, key) of this data group."""
        self.tokens += tokens
        self.attended += attended

    def work(self) -> tuple[float, float]:
        """(tokens, pairs) of a step, the mean since `take` was called."""
        return self.tokens / self.steps, self.attended / self.steps

    def take(self) -> dict[str, float]:
        """Seconds of a step by part, the mean since the last call."""
        means = {f"{part}_seconds": seconds / self.steps for part, seconds in self.seconds.items()}
        self._clear()
        return means

    def exposed_seconds(self) -> float:
        """Of the logged step, see parallel/waiting.py."""
        assert self.recording is not None, "this step was not to be logged"
        return self.recording.seconds()

    def memory(self) -> dict[str, float | None]:
        """GiB of this rank's device by part. A CPU's allocator does not tell of what a step takes."""
        weights, optimizer = held(self.state, self.device)
        seen = self.allocated
        parts: dict[str, float | None] = {
            "weights": weights,
            "optimizer": optimizer,
            "activations": seen["forward"] - seen["before"] if seen else None,
            "gradients": seen["backward"] - seen["before"] if seen else None,
            "transport": copy_engine.reserved_bytes(),
        }
        return {part: None if size is None else size / GIB for part, size in parts.items()}


def held(state: State, device: torch.device) -> tuple[int, int]:
    """Bytes on this rank's device of the model's own parameters, and of what the optimizer keeps besides them."""

    def size(x: Tensor) -> int:
        return x.numel() * x.element_size() if x.device.type == device.type else 0

    own = [*state.parameters.values(), *state.frozen]
    shards = [p.ds_tensor for p in own if hasattr(p, "ds_tensor")]  # ZeRO-3: a parameter is empty but while it is used
    known = {id(p) for p in own}
    kept = [x for flat, states in state.optimizer.state.items() for x in (flat, *states.values())]
    return sum(map(size, own + shards)), sum(size(x) for x in kept if torch.is_tensor(x) and id(x) not in known)
