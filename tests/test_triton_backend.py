"""The Triton kernels on a CPU, in Triton's interpreter: fp32 and fp16, as bf16 products are wrong there.

Interpreter mode is fixed when triton is imported, so the cases run in a process of their own.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from types import ModuleType
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
import triton
import triton_cases
from triton_cases import Case

from ringspan.kernels import triton_split, triton_statistics
from ringspan.kernels.plan import plan
from ringspan.kernels.spans import Spans

HALF = torch.float16
CASES = {
    "random": Case(queries=131, keys=97),
    "batch": Case(batch=2, queries=70, keys=150, heads=1, seed=1),
    "causal": Case("causal", queries=200, keys=200, heads=1),
    "grouped": Case("causal", HALF, queries=67, keys=67, heads=4, kv_heads=2),
    "packed": Case("packed", queries=257, keys=257, heads=1, head_dim=16),
    "window": Case("window", HALF, queries=129, keys=140, heads=1, head_dim=64),
    "full": Case("full", queries=37, keys=150, heads=1, head_dim=80),
    "softcap": Case("causal", queries=65, keys=65, softcap=5.0),
    "ring step": Case(into=True, queries=150, keys=130, heads=1, seed=1),
    "last ring step": Case("window", HALF, into=True, queries=66, keys=90, seed=2),
    "softcapped ring step": Case(into=True, queries=50, keys=60, softcap=20.0, seed=3),
    "fused projection": Case(fused=True, dtype=HALF, batch=2, queries=50, keys=50, kv_heads=2),
    "one query, one key": Case("causal", queries=1, keys=1),
    "no key is seen": Case("none", queries=3, keys=5, into=True),
    "no keys": Case("none", queries=3, keys=0),
    "no queries": Case("none", queries=0, keys=3),
}
SHORT = {
    "one query": Case("causal", HALF, queries=1, keys=700, heads=4, kv_heads=2),
    "random": Case(queries=5, keys=150, batch=2, heads=4, kv_heads=2, head_dim=40, seed=1),
    "window": Case("window", queries=16, keys=400, heads=2, softcap=5.0),
    "ring step": Case(into=True, queries=9, keys=260, heads=3, seed=1),
    "last ring step": Case("causal", HALF, into=True, queries=3, keys=200, seed=2),
    "no key is seen": Case("none", queries=3, keys=5, into=True),
}


def _version(module: ModuleType) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., Any]]:
    """`interpreted(fn, *args)` runs fn(*args) where Triton interprets."""
    if _version(triton) < (3, 7) and _version(numpy) >= (2, 5):
        pytest.skip(f"the interpreter of triton {triton.__version__} fails in loops with numpy {numpy.__version__}")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(os.getpid).result()  # starts the process, which keeps the variable
        yield lambda fn, *args: pool.submit(fn, *args).result(timeout=240)


@pytest.mark.parametrize("name", CASES)
def test_against_float64(interpreted, name):  # type: ignore[no-untyped-def]
    interpreted(triton_cases.check, CASES[name], "cpu", 64)


@pytest.mark.parametrize("name", SHORT)
def test_few_queries(interpreted, name):  # type: ignore[no-untyped-def]
    interpreted(triton_cases.check_split, SHORT[name], "cpu")


def test_tiles_smaller_than_the_plans(interpreted):  # type: ignore[no-untyped-def]
    """The blocks that ship, here eight to a tile of the work order."""
    interpreted(triton_cases.check, Case("random", queries=70, keys=40, heads=1, head_dim=200), "cpu")


def test_delta(interpreted):  # type: ignore[no-untyped-def]
    interpreted(triton_cases.check_delta, "cpu")


def test_parts_of_keys_fill_whole_rounds_of_the_gpu():
    """On 264 places: 1, 8, 16 and 64 rows of 8 kv heads; few keys; more heads than places."""
    assert [triton_split.pick_splits(pairs, 264, 128) for pairs in (8, 64, 128, 512)] == [32, 4, 2, 1]
    assert triton_split.pick_splits(8, 264, 16) == 16
    assert triton_split.pick_splits(300, 264, 1) == 1


def test_many_short_rows_fit_a_grid():
    """2^16 heads in all: CUDA takes no more than 65,535 programs in a grid's second dimension."""
    grids = []
    q, k = (torch.empty(1, n, 1, 16).expand(2**16, -1, -1, -1) for n in (1, 1024))
    mask, statistic = plan(Spans.causal(1, 1024), 1024), torch.empty(2**16, 1, 1)
    with (
        mock.patch.object(triton_statistics, "launch", lambda kernel, grid, *others: grids.append(grid)),
        mock.patch.object(triton_split, "launch", lambda kernel, grid, *others, **options: grids.append(grid)),
    ):
        triton_statistics.delta(q, q, None)
        triton_split.split_forward(q, k, k, mask, q, statistic, None, scale=1.0, softcap=0.0)
    assert len(grids) == 3
    assert all(max(grid[1:], default=0) < 2**16 for grid in grids), grids
