"""The parts of a step, as a profiler's trace names them. Where none runs, naming one costs the host 0.4 us."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import torch

PREFIX = "ringspan: "  # of a part's name in a trace

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def part(name: str) -> AbstractContextManager[object]:
    """What is called inside, and the kernels that it launches, are of that part; the innermost one counts."""
    return torch.profiler.record_function(PREFIX + name) if _profiled() else _NOTHING


def within(name: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """All of a function is of that part. What torch.compile has made is wrapped, never traced through."""

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function, updated=())
        def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            if not _profiled():
                return function(*args, **kwargs)
            with part(name):
                return function(*args, **kwargs)

        return run

    return decorate


# A range of torch's own takes 12 us also where nothing records it: 6 ms of a step of 32 layers with 15 ranges each
_profiled: Callable[[], bool] = torch.autograd._profiler_enabled
_NOTHING: AbstractContextManager[object] = nullcontext()
