"""Launching a Triton kernel at a fraction of what Triton's own launch costs the host."""

import functools
from typing import Any

import torch
from torch import Tensor
from triton.runtime import KernelInterface

_compiled: dict[tuple[Any, ...], Any] = {}  # by kernel, device and variant, as Triton's own cache


def launch(
    kernel: KernelInterface[Any],
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    device: int,
    **options: Any,
) -> None:
    """``kernel[grid](*arguments, **constants, **options)`` on GPU ``device``, or interpreted where that is -1.

    Constants stand last in the kernel's signature, in their order here.

    Triton binds, specializes and hashes all arguments anew each time: 150 us with five descriptors. Here that is done
    when a variant is first met, and the compiled kernel that came of it is launched from then on.
    """
    assert max(grid[1:], default=0) < 2**16, f"grid {grid}: CUDA takes more in the first dimension alone"
    with torch.cuda.device(device):
        key = (kernel.fn, device, *options.values(), *constants.values(), *map(_variant, arguments))  # type: ignore[attr-defined]
        compiled = _compiled.get(key)
        if compiled is not None:
            compiled[(*grid, 1, 1)[:3]](*arguments, *constants.values())
            return
        # Triton 3.10 changes the default of enable_fp_fusion, and score * scale - max must stay one instruction.
        compiled = kernel[grid](*arguments, **constants, enable_fp_fusion=True, **options)
        if compiled is not None:  # None: interpreted
            _compiled[key] = compiled


def _variant(x: Any) -> Any:
    """All that Triton may specialize on: types, whether multiples of 16, whether 1, whether past 32 bits."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if isinstance(x, int):
        return x % 16 == 0, x == 1, x >= 2**31
    if isinstance(x, float):
        return float
    return x.base.dtype, tuple(x.block_shape)  # a descriptor: its layout follows from these


@functools.cache
def processors(device: int) -> int:
    """Multiprocessors of a GPU; a few where there is none, in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device >= 0 else 4
