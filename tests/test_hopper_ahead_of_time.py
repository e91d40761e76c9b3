"""The Hopper kernels compiled for a GPU that is not there: no spills, and matrix products that stay asynchronous."""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ringspan.kernels import hopper_backend, triton_statistics
from ringspan.kernels.plan import plan
from ringspan.kernels.spans import Spans

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}
SHARED_LIMIT = 227 * 1024  # bytes a block may have on compute capability 9.0
VERSION = ".".join(triton.__version__.split(".")[:2])
# Bytes of spills a thread by (Triton, kernel, head dim, softcap, into), no more and no less; all others are 0.
SPILLS = {
    ("3.9", "forward_kernel", 64, 0.0, False): 32,
    ("3.9", "forward_kernel", 64, 0.0, True): 24,
    ("3.9", "forward_kernel", 128, 0.0, False): 24,
    ("3.9", "forward_kernel", 128, 0.0, True): 16,
    ("3.9", "forward_kernel", 128, 3.0, True): 32,
}
# Waits for products beyond those that are written, in the same way: ptxas copies the wait for dp into the way to the
# loop, for each consumer, where others jump to it.
WAITS = {(triton, "backward_kernel", 128, 0.0, into): 2 for triton in ("3.8", "3.9") for into in (False, True)}


class Report(NamedTuple):
    """Of one kernel: bytes of shared memory and of spills a thread, SASS instructions by name, Triton's IR, the PTX."""

    shared: int
    stack: int
    sass: Counter[str]
    ttgir: str
    ptx: str


def record(
    head_dim: int, dtype: torch.dtype, softcap: float, into: bool, out_dtype: torch.dtype, deterministic: bool
) -> dict[str, Any]:
    """The launches of a forward and a backward pass by kernel name; `into`: merged, and gradients added to."""
    q = torch.zeros(2, 300, 4, head_dim, dtype=dtype)
    k = torch.zeros(2, 300, 2, head_dim, dtype=dtype)
    lse = torch.zeros(2, 4, 300)
    mask = plan(Spans.causal(300), 300)
    given = [x.float() if into else None for x in (q, k, k.clone())]
    with mock.patch.object(hopper_backend, "launch") as launch, mock.patch.object(triton_statistics, "launch"):
        before = (q.float(), lse) if into else None
        hopper_backend.forward(q, k, k, mask, scale=0.1, softcap=softcap, into=before, out_dtype=out_dtype)
        hopper_backend.backward(
            q, q, k, k, lse, lse, mask,
            scale=0.1, softcap=softcap, dq=given[0], dk=given[1], dv=given[2], fresh=into and not deterministic,
            deterministic=deterministic,
        )  # fmt: skip
    return {call.args[0].fn.__name__: call for call in launch.call_args_list}


def build(launch: Any) -> Report:
    kernel, _, arguments, constants, _ = launch.args
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
    signature = {name: "constexpr" if name in constants else signature_of(values[name]) for name in kernel.arg_names}
    places = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    aligned = {places[name]: [["tt.divisibility", 16]] for name, x in values.items() if isinstance(x, Tensor)}
    source = GluonASTSource(kernel, signature, {places[name]: x for name, x in constants.items()}, aligned)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={**launch.kwargs, "enable_fp_fusion": True}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources, sass = (
            subprocess.run([TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    stack = re.search(r"STACK:(\d+)", resources)
    assert stack, resources
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE)
    return Report(compiled.metadata.shared, int(stack[1]), Counter(names), compiled.asm["ttgir"], compiled.asm["ptx"])


def signature_of(value: Any) -> str:
    if isinstance(value, TensorDescriptor):
        block = ",".join(map(str, value.block_shape))
        return f"tensordesc<{TYPES[value.base.dtype]}[{block}],{value.layout!r}>"
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def count(sass: Counter[str], prefix: str) -> int:
    return sum(n for name, n in sass.items() if name.startswith(prefix))


def check(report: Report, spills: int, waits: int = 0) -> None:
    assert report.shared <= SHARED_LIMIT
    assert report.stack == spills, f"{report.stack} bytes of spills"
    assert spills or count(report.sass, "STL") == count(report.sass, "LDL") == 0
    assert count(report.sass, "HGMMA") == len(re.findall(r"wgmma\.mma_async", report.ptx)) > 0
    # Where ptxas serialises products (its warnings C7510 to C7517), it adds fences and waits that nobody wrote.
    assert count(report.sass, "WARPGROUP.ARRIVE") == len(re.findall(r"wgmma\.fence", report.ptx))
    assert count(report.sass, "WARPGROUP.DEPBAR") == len(re.findall(r"wgmma\.wait_group", report.ptx)) + waits
    assert count(report.sass, "UTMALDG") > 0
    assert count(report.sass, "USETMAXREG") > 0
    # The memory of any other barrier would be taken for the arguments of the warps: see `barriers`.
    made = set(re.findall(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<\d+x1xi64", report.ttgir))
    given = set(re.findall(r"%\w+", report.ttgir.split("ttg.warp_specialize(")[1].split(")")[0]))
    assert made, "kernels have barriers"
    assert made <= given, f"no warp is given {made - given}"


CASES = [
    (torch.bfloat16, 0.0, False, torch.bfloat16, False),
    (torch.bfloat16, 0.0, True, torch.float32, True),
    (torch.float16, 3.0, True, torch.float16, False),
]


@pytest.mark.parametrize("head_dim", [128, 64])
@pytest.mark.parametrize("dtype, softcap, into, out_dtype, deterministic", CASES)
def test_what_is_launched_compiles_well(head_dim, dtype, softcap, into, out_dtype, deterministic):
    launches = record(head_dim, dtype, softcap, into, out_dtype, deterministic)
    forward, backward = (build(launches[name]) for name in ("forward_kernel", "backward_kernel"))
    check(forward, SPILLS.get((VERSION, "forward_kernel", head_dim, softcap, into), 0))
    assert count(forward.sass, "UTMASTG") > 0, "out leaves by TMA, which stops at the end of each sequence"
    which = (VERSION, "backward_kernel", head_dim, softcap, into)
    check(backward, SPILLS.get(which, 0), WAITS.get(which, 0))
    assert count(backward.sass, "UTMAREDG") > 0, "dq is added by TMA"
    assert count(backward.sass, "RED") == count(backward.sass, "ATOM") == 0, "dk and dv have no atomics"


def test_what_is_refused():
    q = torch.zeros(1, 8, 2, 64)
    assert "no CUDA device" in str(hopper_backend.supports(q, q, q))
    fused = torch.zeros(2, 8, 3, 2, 64, dtype=torch.bfloat16)
    assert all(hopper_backend._fits_tma(x) for x in fused.unbind(2))
    assert not hopper_backend._fits_tma(fused[..., 1:, :, :].as_strided((2, 8, 2, 60), (3072, 384, 64, 1), 4))
    assert not hopper_backend._fits_tma(torch.zeros(2, 8, 1, 64).expand(2, 8, 4, 64))
