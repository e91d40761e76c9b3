"""Compile what the Triton backend launches for a GPU that is not there, and read what the compiler made of it."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ringspan.kernels import triton_backend, triton_statistics
from ringspan.kernels.plan import plan
from ringspan.kernels.spans import Spans

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
TYPES |= {torch.int32: "*i32", torch.int64: "*i64"}


class Launch(NamedTuple):
    """A launch that was recorded instead of made."""

    kernel: Any
    config: triton_backend.Config
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


class Report(NamedTuple):
    """Of one compiled kernel: registers a thread, bytes of stack a thread (spills), bytes of shared memory."""

    registers: int
    stack: int
    shared: int
    ptx: str


def record(
    capability: int, head_dim: int, dtype: torch.dtype, *, softcap: float = 0.0, accumulate: bool = False
) -> dict[str, Launch]:
    """The launches of a forward and a backward pass on such a GPU, by kernel name."""
    size = 128
    q = torch.zeros(2, size, 4, head_dim, dtype=dtype)
    k = torch.zeros(2, size, 2, head_dim, dtype=dtype)
    lse = torch.zeros(2, 4, size)
    mask = plan(Spans.causal(size), size)
    gradients = {name: x.float() if accumulate else None for name, x in (("dq", q), ("dk", k), ("dv", k.clone()))}
    with (
        mock.patch.object(triton_backend, "_launch") as launch,
        mock.patch.object(triton_statistics, "launch"),
        mock.patch.object(triton_backend, "_capability", return_value=capability // 10),
    ):
        triton_backend.forward(
            q, k, k, mask, scale=0.1, softcap=softcap, into=(q.float(), lse) if accumulate else None, out_dtype=dtype
        )
        triton_backend.backward(q, q, k, k, lse, lse, mask, scale=0.1, softcap=softcap, **gradients)
    return {call.args[0].fn.__name__: Launch(*call.args) for call in launch.call_args_list}


def build(launch: Launch, capability: int) -> Report:
    """Compile for compute capability 80, 90, ... with the argument specializations that the real launch would have."""
    parameters = launch.kernel.params
    values = dict(zip((p.name for p in parameters), launch.arguments, strict=False)) | launch.constants
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(parameters):
        value = values[parameter.name]
        specialized = not (parameter.do_not_specialize or parameter.is_constexpr)
        if parameter.is_constexpr or (specialized and isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
            continue
        signature[parameter.name] = _type(value)
        if specialized and (isinstance(value, Tensor) or value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.config.warps, "num_stages": launch.config.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = _resources(compiled.asm["cubin"])
    return Report(registers, stack, compiled.metadata.shared, compiled.asm["ptx"])


def _type(value: Tensor | int | float) -> str:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _resources(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])
