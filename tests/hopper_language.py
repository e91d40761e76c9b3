"""Gluon's language as the machine of `hopper_machine.py` runs it: kernels are Python, and run here as they stand.

Products read their operands as early as they are issued or as late as they are waited for, drawn at random; shared
memory is poisoned, and what the copy engine or the tensor cores read must have been fenced after it was stored.
Layouts, registers and rounding inside products are not modelled: `test_hopper_ahead_of_time.py` and the GPU see those.
"""

from __future__ import annotations

import builtins
import functools
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from hopper_machine import Barrier, Barriers, Machine, Warps, machines, running_machine
from hopper_memory import DTYPES, Descriptor, Memory, Pointer, Value, tensor_of, value
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import JITFunction

from ringspan.kernels import hopper_backend, triton_statistics


class Product:
    """A matrix product that has been issued."""

    def __init__(self, a: Value | Memory, b: Memory, acc: Value | Product, use_acc: bool) -> None:
        self.operands, self.acc, self.result = (a, b), acc if use_acc else torch.zeros_like(acc), None
        unfenced = running_machine().running.unfenced
        assert not any(isinstance(x, Memory) and x.root in unfenced for x in (a, b)), "a product before a fence"

    def compute(self) -> None:
        """Once: its operands may be gone later."""
        if self.result is not None:
            return
        a, b = (x.data if isinstance(x, Memory) else x.as_subclass(Tensor) for x in self.operands)
        acc = self.acc.result if isinstance(self.acc, Product) else self.acc  # products are computed in their order
        self.result = value(acc.as_subclass(Tensor) + a.float() @ b.float())


class mbarrier:  # noqa: N801  # Gluon's name
    @staticmethod
    def expect(barrier: Barrier, nbytes: int) -> None:
        barrier.change(arrivals=1, nbytes=nbytes)

    @staticmethod
    def arrive(barrier: Barrier, count: int = 1) -> None:
        barrier.change(arrivals=count)

    @staticmethod
    def wait(barrier: Barrier, parity: Any) -> None:
        parity = int(parity)
        running_machine().running.wait(f"parity {parity} of a barrier", lambda: barrier.phase & 1 != parity)


def tma_load(desc: Descriptor, where: Sequence[Any], barrier: Barrier, memory: Memory) -> None:
    part, inside = desc.tile(where)

    def copy() -> None:
        memory.data.zero_()
        memory.data[inside] = part
        barrier.change(nbytes=-desc.block_type.nbytes)

    running_machine().copies.append(copy)


def _from_shared(desc: Descriptor, where: Sequence[Any], memory: Memory, add: bool) -> None:
    warps = running_machine().running
    assert memory.root not in warps.unfenced, "a copy before a fence"
    part, inside = desc.tile(where)

    def copy() -> None:
        part.copy_(part + memory.data[inside] if add else memory.data[inside])
        warps.stores.remove(copy)

    warps.stores.append(copy)
    running_machine().copies.append(copy)


def tma_store(desc: Descriptor, where: Sequence[Any], memory: Memory) -> None:
    _from_shared(desc, where, memory, add=False)


def tma_add(desc: Descriptor, where: Sequence[Any], memory: Memory) -> None:
    _from_shared(desc, where, memory, add=True)


def tma_store_wait(pending: int) -> None:
    warps = running_machine().running
    warps.wait("its stores", lambda: len(warps.stores) <= pending)


def fence_async_shared() -> None:
    running_machine().running.unfenced.clear()


def warpgroup_mma(
    a: Value | Memory, b: Memory, acc: Value | Product, use_acc: bool = True, is_async: bool = False
) -> Product:
    product = Product(a, b, acc, use_acc)
    queue = running_machine().running.products
    queue.append(product)
    if running_machine().chance.random() < 0.5:
        for one in queue:
            one.compute()
    return product


def warpgroup_mma_wait(pending: int, deps: Sequence[Product]) -> Any:
    warps = running_machine().running
    warps.wait("a product", lambda: True)
    while len(warps.products) > pending:
        one = warps.products.pop(0)
        one.compute()
    assert all(one not in warps.products for one in deps), "a product is used before it is there"
    return deps[0].result


def meet(number: Any, threads: int) -> None:
    warps, number = running_machine().running, int(number)
    named = warps.block.named
    before = named.arrive(number, threads, warps.threads)
    warps.wait(f"named barrier {number}", lambda: named.passed[number] > before)


def pass_by(number: Any, threads: int) -> None:
    warps = running_machine().running
    warps.block.named.arrive(int(number), threads, warps.threads)


def exceeded(sums: Value, number: Any) -> int:
    meet(number, 128)
    return int(not bool((sums <= 2**12).all()))


def _wait_turn(at: Pointer, turn: Any) -> None:
    running_machine().running.wait(f"turn {int(turn)}", lambda: int(Language.load(at)) == int(turn))


def _pass_turn(at: Pointer, turn: Any) -> None:
    tma_store_wait(0)
    Language.store(at, turn)


def _rounded(p: Value, slope: Value, dp: Value, like: Memory) -> tuple[Value, Value]:
    return p.to(like.dtype), (slope * dp).to(like.dtype)


def reinterpret(memory: Memory, dtype: Any, shape: Sequence[int], layout: Any) -> Memory:
    return memory.reinterpret(dtype, shape)


def as_block(memory: Memory, desc: Descriptor) -> Memory:
    return memory.reinterpret(desc.dtype, desc.block_type.shape)


def _no_layout(*arguments: Any, **options: Any) -> None:
    return None


class Language:
    """What the kernels use of `gluon.language` and of `triton.language`."""

    float32, bfloat16, float16, int32, int64 = gl.float32, gl.bfloat16, gl.float16, gl.int32, gl.int64
    constexpr = staticmethod(lambda x: x)
    BlockedLayout = DistributedLinearLayout = DotOperandLayout = NVMMADistributedLayout = NVMMASharedLayout = (
        SliceLayout
    ) = SwizzledSharedLayout = staticmethod(_no_layout)
    static_range = staticmethod(range)

    @staticmethod
    def program_id(axis: int) -> Value:
        return value(running_machine().running.block.number[axis], torch.int32)

    @staticmethod
    def num_programs(axis: int) -> int:
        return int(running_machine().running.block.grid[axis])

    @staticmethod
    def allocate_shared_memory(dtype: Any, shape: Sequence[int], layout: Any) -> Memory:
        poison = torch.nan if DTYPES[dtype].is_floating_point else -(2**30)
        return Memory(torch.full(tuple(shape), poison, dtype=DTYPES[dtype]))

    @staticmethod
    def arange(start: int, end: int, layout: Any = None) -> Value:
        return value(torch.arange(start, end, dtype=torch.int32))

    @staticmethod
    def full(shape: Sequence[int], fill: float, dtype: Any, layout: Any = None) -> Value:
        return value(torch.full(tuple(shape), fill, dtype=DTYPES[dtype]))

    @staticmethod
    def zeros(shape: Sequence[int], dtype: Any, layout: Any = None) -> Value:
        return Language.full(shape, 0, dtype)

    @staticmethod
    def load(at: Pointer, mask: Any = True, other: float = 0) -> Value:
        place, keep = at.where(mask)
        found = at.data[torch.where(keep, place, 0)]
        return value(torch.where(keep, found, torch.as_tensor(other, dtype=found.dtype)))

    @staticmethod
    def store(at: Pointer, x: Any, mask: Any = True) -> None:
        place, keep = at.where(mask)
        at.data[place[keep]] = torch.as_tensor(x, dtype=at.data.dtype).as_subclass(Tensor).expand_as(place)[keep]

    @staticmethod
    def atomic_add(at: Pointer, x: int) -> Value:
        running_machine().running.wait("an atomic", lambda: True)
        before = Language.load(at)
        Language.store(at, before + x)
        return before

    @staticmethod
    def where(condition: Any, x: Any, y: Any) -> Value:
        return value(torch.where(torch.as_tensor(condition), tensor_of(x), tensor_of(y)))

    @staticmethod
    def minimum(x: Any, y: Any) -> Value:
        return value(torch.minimum(tensor_of(x), tensor_of(y)))

    @staticmethod
    def maximum(x: Any, y: Any) -> Value:
        return value(torch.maximum(tensor_of(x), tensor_of(y)))

    max = staticmethod(torch.amax)
    sum = staticmethod(lambda x, axis: x.sum(axis, dtype=x.dtype))
    exp, exp2, log = staticmethod(torch.exp), staticmethod(torch.exp2), staticmethod(torch.log)
    convert_layout = staticmethod(lambda x, layout, assert_trivial=False: x)

    @staticmethod
    def warp_specialize(parts: Sequence[tuple[Any, Any]], warps: Sequence[int], registers: Sequence[int]) -> None:
        machine, mine = running_machine(), running_machine().running
        others = [
            Warps(machine, mine.block, n, lambda one=one: one[0](*one[1]))
            for one, n in zip(parts[1:], warps, strict=True)
        ]
        machine.warps += others
        parts[0][0](*parts[0][1])
        mine.wait("the other warps", lambda: builtins.all(one.over for one in others))


REPLACED: dict[str, Any] = {
    "gl": Language,
    "tl": Language,
    "mbarrier": mbarrier,
    "tma_load": tma_load,
    "tma_store": tma_store,
    "tma_add": tma_add,
    "tma_store_wait": tma_store_wait,
    "fence_async_shared": fence_async_shared,
    "warpgroup_mma": warpgroup_mma,
    "warpgroup_mma_wait": warpgroup_mma_wait,
    "meet": meet,
    "pass_by": pass_by,
    "barriers": Barriers,
    "_wait_turn": _wait_turn,
    "_pass_turn": _pass_turn,
    "_rounded": _rounded,
    "_once": lambda x: x,
    "declare_exceeded": lambda: None,
    "exceeded": exceeded,
    "rounded": lambda x, like: x.to(like.dtype),
    "_column_layout": _no_layout,
    "reinterpret": reinterpret,
    "as_block": as_block,
}


@functools.cache
def names_of(module: str) -> dict[str, Any]:
    """A module's names, with this machine's in the place of Gluon's, and kernels as plain functions."""
    names: dict[str, Any] = {"__builtins__": builtins}
    for name, x in vars(sys.modules[module]).items():
        if isinstance(x, JITFunction) and name not in REPLACED:
            home = names if x.fn.__module__ == module else names_of(x.fn.__module__)
            names[name] = types.FunctionType(x.fn.__code__, home, name, x.fn.__defaults__)
        else:
            names[name] = REPLACED.get(name, x.value if isinstance(x, gl.constexpr) else x)
    return names


@contextmanager
def simulated(seed: int) -> Iterator[None]:
    """What the Hopper backend launches runs on this machine; ``seed`` draws what happens when."""
    here = functools.partial(launch, seed=seed)
    with mock.patch.object(hopper_backend, "launch", here), mock.patch.object(triton_statistics, "launch", here):
        yield


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any], device: int,
    num_warps: int = 4, seed: int = 0, **options: Any,
) -> None:  # fmt: skip
    """`kernels.launch.launch` on this machine."""
    function = names_of(kernel.fn.__module__)[kernel.fn.__name__]
    given = [_argument(x) for x in arguments]
    machine = Machine(seed)
    machines.append(machine)
    try:
        machine.run(lambda: function(*given, **constants), grid, num_warps)
    finally:
        machines.pop()


def _argument(x: Any) -> Any:
    if isinstance(x, Tensor):
        return Pointer(
            torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size() - x.storage_offset(),), (1,))
        )
    return Descriptor(x) if isinstance(x, TensorDescriptor) else x
