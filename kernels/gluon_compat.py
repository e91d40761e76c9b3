"""What changed in Gluon between Triton 3.6 and 3.9, in one place: the kernels import these names and no others.

The TMA copies were renamed in 3.8. The TMA reduce-add has no Python name before 3.8, though the compiler has the
operation; views of shared memory in another shape changed theirs in 3.9.
"""

from triton.backends.nvidia.compiler import CUDAOptions
from triton.experimental.gluon.language import _core as core
from triton.experimental.gluon.language.nvidia.hopper import tma

SPARES_REGISTERS = hasattr(CUDAOptions, "sched4reg")  # 3.9: LLVM can be told to

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
tma_store_wait = tma.store_wait

if hasattr(tma, "async_atomic_add"):
    tma_add = tma.async_atomic_add
else:

    @core.builtin
    def tma_add(tensor_desc, coord, src, _semantic=None):  # type: ignore[no-untyped-def]  # traced by Triton, not run
        """Add a block of shared memory to global memory; out-of-bounds elements are left out."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        _semantic.builder.create_async_tma_reduce(
            core.ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle
        )


@core.builtin
def reinterpret(memory, dtype, shape, layout, _semantic=None):  # type: ignore[no-untyped-def]  # traced by Triton
    """The same shared memory with another dtype, shape and layout."""
    plain = core._unwrap_if_constexpr
    return _semantic.memdesc_reinterpret(memory, plain(dtype), [plain(n) for n in plain(shape)], plain(layout))


@core.builtin
def as_block(memory, tensor_desc, _semantic=None):  # type: ignore[no-untyped-def]  # traced by Triton, not run
    """Shared memory of (rows, columns) seen as the 4-D block (1, rows, 1, columns) that a descriptor moves."""
    return reinterpret(memory, tensor_desc.dtype, tensor_desc.block_type.shape, tensor_desc.layout, _semantic=_semantic)
