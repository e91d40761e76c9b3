"""Attention over spans in portable Triton: CUDA devices of compute capability 8.0 and newer, and Triton's interpreter.

bf16, fp16 and fp32, head dims up to 256 (padded to a power of two inside the kernels), sums in fp32.
"""

import os
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import KernelInterface

from ringspan.kernels.launch import launch
from ringspan.kernels.plan import TILE, Plan, heads_in_cache, row_stride
from ringspan.kernels.triton_backward import dkdv_kernel, dq_kernel
from ringspan.kernels.triton_forward import forward_kernel
from ringspan.kernels.triton_split import is_short, split_forward
from ringspan.kernels.triton_statistics import statistics
from ringspan.kernels.triton_tiles import coefficients

MAX_HEAD_DIM = 256


class Config(NamedTuple):
    """How a kernel is tiled: BLOCK_M queries against BLOCK_N keys; KEEP_OFFSETS is what `tile_pointers` says."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    keep_offsets: bool = False


# By (element bytes, padded head dim). Chosen from ahead-of-time reports: up to 128 next to no spills in the loops over
# tiles; shared memory within an A100's 163 KiB, of 16 bits up to 128 within the 99 of an RTX. fp32 products are plain
# FMAs here, whose operands fill the registers.
FORWARD = {
    (2, 32): Config(128, 64, 4, 3),
    (2, 64): Config(128, 64, 4, 3),
    (2, 128): Config(128, 64, 8, 3),
    (2, 256): Config(64, 64, 8, 2),
    (4, 32): Config(64, 32, 8, 2),
    (4, 64): Config(64, 32, 8, 2),
    (4, 128): Config(32, 16, 8, 2),
    (4, 256): Config(32, 16, 8, 2),
}
DQ = {
    (2, 32): Config(128, 64, 8, 3),
    (2, 64): Config(128, 64, 8, 3),
    (2, 128): Config(128, 64, 8, 2),
    (2, 256): Config(64, 32, 8, 2),
    (4, 32): Config(64, 32, 8, 2),
    (4, 64): Config(32, 32, 8, 2),
    (4, 128): Config(32, 16, 8, 2),
    (4, 256): Config(16, 16, 8, 2),
}
DKDV = {
    (2, 32): Config(64, 128, 8, 3),
    (2, 64): Config(64, 128, 8, 3),
    (2, 128): Config(64, 128, 8, 2),
    (2, 256): Config(32, 64, 8, 2),
    (4, 32): Config(32, 32, 8, 2),
    (4, 64): Config(16, 32, 8, 2),
    (4, 128): Config(16, 16, 8, 2),
    (4, 256): Config(16, 16, 8, 1),
}
# sm_90 and sm_100 multiply from shared memory, of which they have 227 KiB: larger tiles fit their registers. Of 6 to 10
# tried, the fastest on an H100 at 16K tokens, causal; at head dim 128 also in full, packed and window masks, where dq
# has four of six within 3 %, kept offsets make forward 3 to 11 % faster and dq 5 to 10 %; for dk and dv a third stage
# makes a backward pass 3 to 11 % faster, and kept offsets 2 to 8 %. At head dim 64 those spill, and dq loses by them.
LARGE = (9, 10)
FORWARD_LARGE = FORWARD | {(2, 128): Config(128, 64, 8, 3, True), (2, 256): Config(128, 64, 8, 2)}
DQ_LARGE = DQ | {(2, 64): Config(128, 64, 4, 3), (2, 128): Config(128, 64, 8, 3, True)}
DKDV_LARGE = DKDV | {(2, 64): Config(64, 64, 4, 3), (2, 128): Config(64, 128, 8, 3, True)}
# A softcap keeps one more tile alive in the backward pass.
DQ_SOFTCAP = {(2, 64): Config(128, 64, 8, 3), (2, 128): Config(128, 64, 8, 2)}
DKDV_SOFTCAP = {(2, 128): Config(64, 64, 8, 2)}


def supports(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why this backend cannot run q, k and v; None if it can."""
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtype {q.dtype} is not bf16, fp16 or fp32"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head dim {q.shape[-1]} is above {MAX_HEAD_DIM}"
    if q.device.type == "cuda":
        capability = torch.cuda.get_device_capability(q.device)
        return None if capability >= (8, 0) else f"compute capability {capability} is below (8, 0)"
    # Triton fixes its interpreter mode when it is imported, from this variable alone.
    interpreter = os.environ.get("TRITON_INTERPRET") == "1"
    return None if q.device.type == "cpu" and interpreter else f"no CUDA device (q is on {q.device})"


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    scale: float,
    softcap: float,
    into: tuple[Tensor, Tensor] | None,
    out_dtype: torch.dtype,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of ``attention_forward``, whose contract this is."""
    q, k, v = _rows_contiguous(q), _rows_contiguous(k), _rows_contiguous(v)
    (batch, queries, heads, _), (keys, kv_heads) = q.shape, k.shape[1:3]
    in_place = into is not None and into[0].dtype == out_dtype
    before = torch.empty(q.shape, dtype=out_dtype, device=q.device) if into is None else into[0]
    result = before if into is None or in_place else torch.empty(q.shape, dtype=out_dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, device=q.device) if into is None else into[1]
    _check(before, lse)
    if is_short(q, k):
        split_forward(q, k, v, plan, result, lse, None if into is None else before, scale=scale, softcap=softcap)
        return result if out is None else out.copy_(result), lse
    config, sizes = _configure(FORWARD_LARGE if _capability(q) in LARGE else FORWARD, q)
    arguments = (
        q, k, v, result, lse, before, plan.lo, plan.hi, plan.query_order,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], row_stride(plan.lo), row_stride(plan.query_order),
        queries, keys, batch * heads, heads, heads // kv_heads,
        heads_in_cache(_head_bytes(k), heads // kv_heads, batch * heads), *coefficients(scale, softcap),
    )  # fmt: skip
    constants = {**sizes, "SOFTCAP": bool(softcap), "MERGE": into is not None, "IN_PLACE": in_place}
    _launch(forward_kernel, config, batch * heads * _blocks(queries, config.block_m), arguments, constants)
    return result if out is None else out.copy_(result), lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    plan: Plan,
    *,
    scale: float,
    softcap: float,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    fresh: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of ``attention_backward``, whose contract this is."""
    dout, q, k, v = (_rows_contiguous(x) for x in (dout.to(q.dtype), q, k, v))
    _check(lse, delta, *(x for x in (dq, dk, dv) if x is not None))
    add_dq, add_dk, add_dv = dq is not None, dk is not None and not fresh, dv is not None and not fresh
    dq, dk, dv = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if gradient is None else gradient
        for x, gradient in ((q, dq), (k, dk), (v, dv))
    )
    (batch, queries, heads, _), (keys, kv_heads) = q.shape, k.shape[1:3]
    group = heads // kv_heads
    inputs = (dout, q, k, v, statistics(lse, delta, 1.0, pairs=True))
    strides = tuple(stride for x in (dout, q, k, v) for stride in x.stride()[:3])
    factors = (*coefficients(scale, softcap), scale)

    large, softcapped = _capability(q) in LARGE, bool(softcap)
    config, sizes = _configure((DQ_LARGE if large else DQ) | (DQ_SOFTCAP if softcapped else {}), q)
    arguments = (
        *inputs, dq, plan.lo, plan.hi, plan.query_order, *strides, row_stride(plan.lo), row_stride(plan.query_order),
        queries, keys, batch * heads, heads, group, heads_in_cache(_head_bytes(k), group, batch * heads), *factors,
    )  # fmt: skip
    constants = {**sizes, "SOFTCAP": softcapped, "ACCUMULATE": add_dq}
    _launch(dq_kernel, config, batch * heads * _blocks(queries, config.block_m), arguments, constants)

    config, sizes = _configure((DKDV_LARGE if large else DKDV) | (DKDV_SOFTCAP if softcapped else {}), q)
    arguments = (
        *inputs, dk, dv, plan.query_lo, plan.query_hi, plan.key_order, *strides,
        row_stride(plan.query_lo), row_stride(plan.key_order), queries, keys, batch * kv_heads, kv_heads, group,
        heads_in_cache(_head_bytes(q) * group, 1, batch * kv_heads), *factors,
    )  # fmt: skip
    constants = {**sizes, "SOFTCAP": softcapped, "ADD_DK": add_dk, "ADD_DV": add_dv}
    _launch(dkdv_kernel, config, batch * kv_heads * _blocks(keys, config.block_n), arguments, constants)
    return dq, dk, dv


def _launch(
    kernel: KernelInterface[Any], config: Config, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    if programs == 0:
        return
    device = arguments[0].get_device()
    launch(kernel, (programs,), arguments, constants, device, num_warps=config.warps, num_stages=config.stages)


def _configure(table: dict[tuple[int, int], Config], q: Tensor) -> tuple[Config, dict[str, Any]]:
    head_dim = q.shape[3]
    assert 1 <= head_dim <= MAX_HEAD_DIM, f"head dim {head_dim}"
    block_d = max(32, triton.next_power_of_2(head_dim))
    config = table[q.element_size(), block_d]
    return config, {
        "HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "KEEP_OFFSETS": config.keep_offsets,
    }  # fmt: skip


def _capability(q: Tensor) -> int:
    """The major compute capability; 0 in the interpreter."""
    return torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 0


def _blocks(rows: int, block: int) -> int:
    """Programs for so many rows: whole tiles of the plan's order, each of TILE / block programs."""
    return triton.cdiv(rows, TILE) * (TILE // block)


def _head_bytes(x: Tensor) -> int:
    """Bytes of one head of one batch row of x and its companion: k and v, or q and dout."""
    return 2 * x.shape[1] * x.shape[3] * x.element_size()


def _rows_contiguous(x: Tensor) -> Tensor:
    """x with a last dim of stride 1: a gradient expanded from a scalar has none, and is copied."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _check(*tensors: Tensor) -> None:
    for x in tensors:
        assert x.is_contiguous(), f"a tensor of shape {tuple(x.shape)} and strides {x.stride()} is not contiguous"
