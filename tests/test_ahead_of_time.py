"""The shipped configurations compiled for the GPUs they ship to: they must fit, and spill only what is listed.

The interpreter runs kernels as Python and accepts some that the compiler refuses; this is the other half.
"""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from unittest import mock

import ahead_of_time
import pytest
import torch
import triton
from ahead_of_time import Report

from ringspan.kernels import triton_split
from ringspan.kernels.plan import plan
from ringspan.kernels.spans import Spans
from ringspan.kernels.triton_backend import Config
from ringspan.kernels.triton_statistics import ROWS, delta_kernel

# Shared memory that a block may ask for, bytes: A100, H100, B200.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
BF16, FP16 = torch.bfloat16, torch.float16
# Bytes of spills a thread, no more and no less, by (capability, head dim, dtype, softcap, kernel); all others are 0.
# Triton before 3.9 assembles for Hopper and older by ptxas 12.8 or 12.9, 3.9 for Hopper by 13.4.
SPILLS = {
    "3.6": {
        (80, 64, BF16, 30.0, "dkdv_kernel"): 16,
        (80, 128, BF16, 0.0, "dkdv_kernel"): 56,
        (80, 192, BF16, 0.0, "forward_kernel"): 24,
        (80, 192, BF16, 0.0, "dkdv_kernel"): 40,
        (90, 128, BF16, 0.0, "dkdv_kernel"): 32,
        (90, 256, BF16, 0.0, "dkdv_kernel"): 72,
    },
    "3.7": {
        (80, 128, BF16, 0.0, "dkdv_kernel"): 48,
        (80, 192, BF16, 0.0, "forward_kernel"): 32,
        (80, 192, BF16, 0.0, "dkdv_kernel"): 32,
        (90, 128, BF16, 0.0, "dkdv_kernel"): 8,
        (90, 256, BF16, 0.0, "dkdv_kernel"): 56,
    },
    "3.9": {
        (80, 128, BF16, 0.0, "dkdv_kernel"): 48,
        (80, 192, BF16, 0.0, "forward_kernel"): 32,
        (80, 192, BF16, 0.0, "dkdv_kernel"): 24,
        (90, 128, BF16, 0.0, "dkdv_kernel"): 112,
        (90, 256, BF16, 0.0, "forward_kernel"): 24,
        (90, 256, BF16, 0.0, "dkdv_kernel"): 128,
        (100, 64, BF16, 0.0, "dkdv_kernel"): 8,
    },
}.get(".".join(triton.__version__.split(".")[:2]), {})
KERNELS = ("forward_kernel", "dq_kernel", "dkdv_kernel")
# (capability, head dim, dtype, softcap, accumulate): the shipped configurations on the GPUs that differ in them, the
# options in turn; of fp32 only two head dims, as its unrolled products take long to compile. 192 is padded to 256.
COMPILED = [
    (80, 32, torch.float16, 0.0, False),
    (80, 64, torch.bfloat16, 0.0, True),
    (80, 128, torch.bfloat16, 0.0, False),
    (80, 128, torch.bfloat16, 30.0, True),
    (80, 192, torch.bfloat16, 0.0, False),
    (80, 64, torch.bfloat16, 30.0, True),
    (90, 64, torch.bfloat16, 0.0, False),
    (90, 64, torch.bfloat16, 30.0, True),
    (90, 128, torch.bfloat16, 0.0, True),
    (90, 128, torch.bfloat16, 30.0, False),
    (100, 64, torch.bfloat16, 0.0, True),
    (90, 256, torch.bfloat16, 0.0, False),
    (100, 128, torch.bfloat16, 0.0, True),
    (80, 64, torch.float32, 0.0, True),
    (90, 128, torch.float32, 0.0, False),
]


def _compile(case: tuple[int, int, torch.dtype, float, bool], kernel: str) -> Report:
    capability, head_dim, dtype, softcap, accumulate = case
    launches = ahead_of_time.record(capability, head_dim, dtype, softcap=softcap, accumulate=accumulate)
    return ahead_of_time.build(launches[kernel], capability)


@pytest.fixture(scope="module")
def reports() -> Iterator[dict[tuple[object, str], Future[Report]]]:
    """All compilations, started at once over the cores that there are."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context) as pool:
        yield {(case, kernel): pool.submit(_compile, case, kernel) for case in COMPILED for kernel in KERNELS}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", COMPILED, ids=lambda case: f"sm_{case[0]}-{case[1]}-{case[2]}".replace("torch.", ""))
def test_fits(reports, case, kernel):  # type: ignore[no-untyped-def]
    capability, head_dim, dtype, softcap, _ = case
    report = reports[case, kernel].result()
    spills = SPILLS.get((capability, head_dim, dtype, softcap, kernel), 0)
    assert report.stack == spills, f"{report.stack} bytes of spills at {report.registers} registers"
    assert report.shared <= SHARED[capability]
    if capability == 90 and dtype != torch.float32:
        assert "wgmma.mma_async" in report.ptx  # Hopper's matrix instructions, not those of the A100


@pytest.mark.parametrize("capability", SHARED)
def test_delta_fits(capability):  # type: ignore[no-untyped-def]
    x, rows = torch.zeros(1, 64, 2, 128, dtype=torch.bfloat16), torch.zeros(1, 2, 64)
    arguments = (x, x, rows, rows, *x.stride()[:3], 64, 2)
    constants = {"HEAD_DIM": 128, "BLOCK_D": 128, "ROWS": ROWS, "HAS_DLSE": True}
    launch = ahead_of_time.Launch(delta_kernel, Config(0, 0, warps=4, stages=3), 2, arguments, constants)
    assert ahead_of_time.build(launch, capability).stack == 0


@pytest.mark.parametrize("capability", SHARED)
def test_few_queries_fit_without_spills(capability):  # type: ignore[no-untyped-def]
    q, k = torch.zeros(1, 1, 32, 128, dtype=torch.bfloat16), torch.zeros(1, 2048, 8, 128, dtype=torch.bfloat16)
    with mock.patch.object(triton_split, "launch") as launched:
        mask = plan(Spans.causal(1, 2048), 2048)
        triton_split.split_forward(q, k, k, mask, q, torch.zeros(1, 32, 1), q.float(), scale=0.1, softcap=0.0)
    for call in launched.call_args_list:
        kernel, _, arguments, constants, _ = call.args
        config = Config(0, 0, call.kwargs["num_warps"], call.kwargs.get("num_stages", 3))
        report = ahead_of_time.build(ahead_of_time.Launch(kernel, config, 1, arguments, constants), capability)
        assert report.stack == 0
        assert report.shared <= SHARED[capability]
