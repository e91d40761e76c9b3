"""Attention over spans on Hopper GPUs (compute capability 9.0): bf16 and fp16, head dims 64 and 128, sums in fp32.

The kernels move every tensor by TMA (4-D descriptors), which needs strides that are multiples of 16 bytes: tensors
made by PyTorch and views of a fused q, k, v projection have them. `supports` says what does not fit.
"""

import functools
from math import e, log2
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import KernelInterface

from ringspan.kernels.gluon_compat import SPARES_REGISTERS
from ringspan.kernels.hopper_backward import backward_kernel
from ringspan.kernels.hopper_forward import forward_kernel
from ringspan.kernels.launch import launch, processors
from ringspan.kernels.plan import TILE, Plan, heads_in_cache, row_stride
from ringspan.kernels.triton_split import is_short, split_forward
from ringspan.kernels.triton_statistics import statistics

_SWIZZLED = {bits: NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=4) for bits in (16, 32)}


class ForwardConfig(NamedTuple):
    """`consumers` warpgroups of 64 queries each, at `registers` a thread, and `stages` tiles of `block_n` keys."""

    consumers: int
    block_n: int
    stages: int
    registers: int


# By head dim. All compile to asynchronous matrix products and, by Triton 3.6 to 3.8, to zero spills
# (tests/test_hopper_ahead_of_time.py); of those, the fastest that were tried on an H100, with Triton 3.6.
# Triton 3.9 keeps more for the whole kernel than the loading warp has room for beside 240: with a softcap, 16 bytes of
# spills more. Those before it get the 240: at 232 their loops have the same instructions, but in another order than the
# one that was measured.
WIDE = 232 if SPARES_REGISTERS else 240
FORWARD = {64: ForwardConfig(3, 128, 3, 160), 128: ForwardConfig(2, 128, 2, WIDE)}
BACKWARD = {64: 128, 128: 64}  # queries of a tile, which pass by TILE keys
# A softcap needs registers, its derivative most.
FORWARD_SOFTCAP = FORWARD | {64: ForwardConfig(2, 128, 3, WIDE)}
BACKWARD_SOFTCAP = BACKWARD | {64: 64}
# Heads are worked on in sections, so that what they walk along stays in L2: a tile of keys for each of an H100's
# 132 multiprocessors, of two heads at least, as the last section ends unevenly; in a fixed order, in which tiles keep
# further apart, of one: it takes 1.37 times as long as a free order then, and 1.85 by two (causal, 16K, 32/8 heads).
# Sections are equal: 16 heads by 5 are 5 % slower than by 4 or by 8.
BACKWARD_SECTION = 128


def supports(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why this backend cannot run q, k and v; None if it can."""
    if q.device.type != "cuda":
        return f"no CUDA device (q is on {q.device})"
    capability = torch.cuda.get_device_capability(q.device)
    if capability != (9, 0):
        return f"compute capability {capability} is not (9, 0)"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {q.dtype} is not bf16 or fp16"
    if q.shape[-1] not in FORWARD:
        return f"head dim {q.shape[-1]} is not one of {', '.join(map(str, FORWARD))}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not _fits_tma(x):
            return f"{name} has strides {x.stride()} and offset {x.storage_offset()}, not multiples of 16 bytes"
    return None


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
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    old = None if into is None else into[0]
    in_place = old is not None and old.dtype == out_dtype
    if out is None:
        out = old if old is not None and in_place else torch.empty(q.shape, dtype=out_dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, device=q.device) if into is None else into[1]
    _check_statistic(lse)
    if keys == 0 and old is None:
        return out.zero_(), lse.fill_(-torch.inf)
    if keys == 0 or q.numel() == 0:
        return (out if old is None or in_place else out.copy_(old)), lse
    if is_short(q, k):
        result = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
        split_forward(q, k, v, plan, result, lse, old, scale=scale, softcap=softcap)
        return out if result is out else out.copy_(result), lse
    config = (FORWARD_SOFTCAP if softcap else FORWARD)[dim]
    block_m = 64 * config.consumers
    score_scale, bend = _coefficients(scale, softcap)
    out_tiles = _rows(out, 64)
    work = batch * heads * triton.cdiv(queries, block_m)
    _launch(
        forward_kernel,
        min(work, processors(q.get_device())),
        (
            _rows(q, 64), _rows(k, config.block_n), _rows(v, config.block_n), out_tiles,
            out_tiles if old is None else _rows(old, 64), lse, plan.lo, plan.hi, plan.query_order,
            torch.zeros(1, dtype=torch.int32, device=q.device), row_stride(plan.lo), row_stride(plan.query_order),
            queries, keys, heads, heads // kv_heads, batch * heads,
            heads_in_cache(4 * keys * dim, heads // kv_heads, batch * heads), score_scale, bend,
        ),
        {
            "NC": config.consumers, "BN": config.block_n, "D": dim, "STAGES": config.stages,
            "MERGE": into is not None, "SOFTCAP": bool(softcap), "ORDERED": block_m == TILE,
            "REGISTERS": config.registers,
        },
    )  # fmt: skip
    return out, lse


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
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of ``attention_backward``, whose contract this is.

    dk and dv are the same bits each time. With ``deterministic`` so is dq, whose sum over tiles of keys then has a
    fixed order, which takes 1.07 to 1.4 times as long; else tiles add as they come. By default it is what
    ``torch.use_deterministic_algorithms`` was told.
    """
    deterministic = torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic
    empty = q.numel() == 0 or k.numel() == 0
    wanted = [(q, dq), (k, dk), (v, dv)]
    # dq is a sum over tiles of keys. dk and dv are written once: only if one of them is given are both added to.
    adds = [True, dk is not None or dv is not None or empty, dk is not None or dv is not None or empty]
    sums = [
        given if given is not None
        else torch.zeros(x.shape, dtype=torch.float32, device=x.device) if add
        else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for (x, given), add in zip(wanted, adds, strict=True)
    ]  # fmt: skip
    if not empty:
        dout = dout.to(q.dtype)
        dout = dout if _fits_tma(dout) else dout.contiguous()
        _backward(dout, q, k, v, lse, delta, plan, scale, softcap, fresh, deterministic, *sums)
    dq, dk, dv = (total.to(x.dtype) if given is None else total for total, (x, given) in zip(sums, wanted, strict=True))
    return dq, dk, dv


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, plan: Plan, scale: float,
    softcap: float, fresh: bool, deterministic: bool, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    block_m = (BACKWARD_SOFTCAP if softcap else BACKWARD)[dim]
    half = TILE // 2  # of the keys: each consumer's
    _check_statistic(lse)
    _check_statistic(delta)
    # Fused scale: ds is rounded to 16 bits, and fp16 keeps more of it before the scale than after
    fold = q.dtype == torch.bfloat16
    both = statistics(lse, delta, scale if fold else 1.0, pairs=False)
    assert both.numel() < 2**31, f"{batch} x {heads} heads x {queries} queries: TMA counts in int32"
    flat = _Tiles(both, [both.numel()], [1], [block_m], NVMMASharedLayout(0, element_bitwidth=32, rank=1))
    score_scale, bend = _coefficients(scale, softcap)
    key_tiles = triton.cdiv(keys, TILE)
    all_heads = batch * kv_heads
    section = _section(8 * queries * dim * group, key_tiles, all_heads, 1 if deterministic else 2)
    turn = plan.key_order  # any int32: it is not touched
    if deterministic:
        turn = torch.zeros(batch * heads * triton.cdiv(queries, block_m), dtype=torch.int32, device=q.device)
    _launch(
        backward_kernel,
        all_heads * key_tiles,
        (
            _rows(q, block_m), _rows(dout, block_m), _rows(k, half), _rows(v, half),
            flat, _rows(dq, half, half), _rows(dk, half), _rows(dv, half),
            plan.query_lo, plan.query_hi, plan.key_order, turn, row_stride(plan.query_lo), row_stride(plan.key_order),
            queries, keys, kv_heads, group, all_heads, section, both.shape[2], score_scale, bend, scale,
        ),
        {
            "BM": block_m, "BN": TILE, "D": dim,
            "SOFTCAP": bool(softcap), "FOLD": fold, "FRESH": fresh, "DETERMINISTIC": deterministic,
        },
    )  # fmt: skip


def _section(walked_bytes: int, key_tiles: int, heads: int, least: int) -> int:
    """Of all kv ``heads`` (times batch) those to work on at a time, each of which walks along so many bytes."""
    least = max(heads_in_cache(walked_bytes, 1, heads), triton.cdiv(BACKWARD_SECTION, key_tiles), least)
    return next((n for n in range(least, heads) if heads % n == 0), heads)


def _launch(kernel: KernelInterface[Any], programs: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    options: dict[str, Any] = {"num_warps": 4}  # a consumer; the kernels start the others
    if SPARES_REGISTERS and kernel is forward_kernel and constants["D"] == 128:
        # Triton 3.9 computes the addresses of a tile's products long before them: 40 bytes of spills with a softcap,
        # which are 32 so. The backward kernel has none, and at head dim 64 its products for dv get an empty one behind
        # them if told so.
        options["sched4reg"] = True
    launch(kernel, (programs,), arguments, constants, arguments[0].base.get_device(), **options)


class _Tiles(TensorDescriptor):
    def __post_init__(self) -> None:
        """Nothing is checked again: `_fits_tma` has, and Triton's own checks cost 20 us a launch."""


def _rows(x: Tensor, rows: int, columns: int | None = None) -> TensorDescriptor:
    """Tiles of so many rows (and columns: all) of a head of x (batch, length, heads, dim): zeros past its end."""
    size = x.element_size()
    shape, strides, block = _tiling(x.shape, x.stride(), size, rows, columns or x.shape[3])
    return _Tiles(x, shape, strides, block, _SWIZZLED[8 * size])


@functools.lru_cache(maxsize=1024)
def _tiling(shape: torch.Size, strides: tuple[int, ...], size: int, rows: int, columns: int) -> tuple[list[int], ...]:
    """Shape, strides and block of a descriptor."""
    assert _strides_fit(shape, strides, size), f"shape {shape}, strides {strides}"
    # The stride of a dim of size 1 is never used, but checked: PyTorch puts anything there.
    used = [shape[3] if n == 1 else stride for n, stride in zip(shape[:3], strides[:3], strict=True)]
    return list(shape), [*used, 1], [1, rows, 1, columns]


def _fits_tma(x: Tensor) -> bool:
    """Strides and address are multiples of 16 bytes, the last dim is contiguous, and nothing is expanded."""
    size = x.element_size()
    return x.data_ptr() % 16 == 0 and _strides_fit(x.shape, x.stride(), size)


@functools.lru_cache(maxsize=1024)
def _strides_fit(shape: torch.Size, strides: tuple[int, ...], size: int) -> bool:
    steps = [stride * size for n, stride in zip(shape[:-1], strides[:-1], strict=True) if n > 1]
    return strides[-1] == 1 and all(step and step % 16 == 0 for step in steps)


def _check_statistic(x: Tensor) -> None:
    assert x.dtype == torch.float32, f"lse and delta are fp32, not {x.dtype}"
    assert x.is_contiguous(), f"lse and delta are contiguous (batch, heads, queries), not of strides {x.stride()}"


def _coefficients(scale: float, softcap: float) -> tuple[float, float]:
    """(score_scale, bend) of the kernels. Above 0, as a masked score of -inf times it must stay -inf."""
    assert scale >= 0, f"scale={scale}"
    per_score = softcap if softcap else scale
    return max(per_score * log2(e), 1e-30), 2 * scale * log2(e) / softcap if softcap else 0.0
