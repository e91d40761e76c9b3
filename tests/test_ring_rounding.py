"""The one pass that rounds a ring's sums: in plain PyTorch, in Triton's interpreter, and compiled for an H100."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import ahead_of_time
import numpy
import pytest
import torch
import triton
from torch import Tensor

from ringspan.kernels.triton_backend import Config
from ringspan.parallel import triton_rounding
from ringspan.parallel.ring import _settle
from ringspan.parallel.ring_plan import Runs
from ringspan.parallel.rounding import rounded_sum


def operands(heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """out, some heads of a wider tensor; a, contiguous; b, rows of a longer one."""
    out = torch.full((2, 5, heads + 3, dim), 7.0, dtype=dtype)
    a, b = torch.randn(2, 5, heads, dim), torch.randn(2, 9, heads, dim)
    return out, a, b[:, 2:7]


def compare(run) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    for heads, dim, dtype in ((2, 8, torch.float16), (33, 64, torch.float32), (1, 24, torch.float16)):
        out, a, b = operands(heads, dim, dtype)
        for other, exact in ((b, a + b), (None, a)):
            run(out[:, :, 1:-2], a, other)
            assert torch.equal(out[:, :, 1:-2], exact.to(dtype))
            assert (out[:, :, :1] == 7).all()
            assert (out[:, :, -2:] == 7).all()


def test_plain():
    compare(rounded_sum)
    rounded_sum(torch.empty(1, 0, 2, 8), torch.empty(1, 0, 2, 8))


def test_interpreted():
    old, new_numpy = (tuple(map(int, x.__version__.split(".")[:2])) for x in (triton, numpy))
    if old < (3, 7) and new_numpy >= (2, 5):
        pytest.skip(f"the interpreter of triton {triton.__version__} fails with numpy {numpy.__version__}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(compare, triton_rounding.rounded_sum).result(timeout=120)


def test_compiled():
    out, a, b = (torch.zeros(1, 64, 16, 128, dtype=dtype) for dtype in (torch.bfloat16, *[torch.float32] * 2))
    arguments = (out, a, b, *(131072, 4096, 131072, 2048, 131072, 2048), 64, 2048)
    constants = {"BLOCK": triton_rounding.BLOCK, "HAS_B": True}
    launch = ahead_of_time.Launch(triton_rounding.rounded_sum_kernel, Config(1, 1, 4, 1), 64, arguments, constants)
    report = ahead_of_time.build(launch, 90)
    assert report.stack == 0
    assert "ld.global.v4" in report.ptx


def test_settled_rows_are_rounded_once_and_all():
    total, x = torch.randn(2, 12, 1, 4), torch.randn(2, 5, 1, 4)
    for edges in (((0, 2), (3, 4), (8, 10)), ((7, 12),), ()):
        out, runs = torch.full((2, 12, 1, 4), 9.0, dtype=torch.bfloat16), Runs(edges)
        expected, arrived = total.clone(), x[:, : len(runs)]
        runs.add(expected, arrived)
        _settle(out, total, runs, arrived)
        assert torch.equal(out, expected.bfloat16())
