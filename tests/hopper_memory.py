"""What Gluon's kernels hold and point at, on the machine of `hopper_machine.py`: registers, shared memory, tensors."""

from __future__ import annotations

import math
import types
from collections.abc import Sequence
from typing import Any

import torch
from hopper_machine import running_machine
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

DTYPES = {
    gl.float32: torch.float32,
    gl.bfloat16: torch.bfloat16,
    gl.float16: torch.float16,
    gl.int32: torch.int32,
    gl.int64: torch.int64,
}
NAMES = {theirs: ours for ours, theirs in DTYPES.items()}


class Value(Tensor):
    """A tensor or a number in registers. Its layout is not modelled."""

    layout = None

    @property
    def type(self) -> Value:  # type: ignore[override]
        return self

    def to(self, dtype: Any) -> Value:  # type: ignore[override]
        return value(super().to(DTYPES[dtype]))


def value(x: Any, dtype: torch.dtype | None = None) -> Value:
    return torch.as_tensor(x, dtype=dtype).as_subclass(Value)


def tensor_of(x: Any) -> Tensor:
    """Also of a number, with the dtype that Triton gives it."""
    return torch.tensor(x, dtype=torch.int32) if type(x) is int else torch.as_tensor(x)


class Memory:
    """A block of shared memory. ``root`` is the allocation that it is a part of."""

    def __init__(self, data: Tensor, root: object = None) -> None:
        self.data, self.root, self.dtype = data, root or self, NAMES[data.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def index(self, i: Any) -> Memory:
        assert 0 <= int(i) < self.shape[0], f"block {int(i)} of {self.shape}"
        return Memory(self.data[int(i)], self.root)

    def permute(self, order: Sequence[int]) -> Memory:
        return Memory(self.data.permute(*order), self.root)

    def slice(self, start: int, length: int, dim: int = 0) -> Memory:
        return Memory(self.data.narrow(dim, start, length), self.root)

    def load(self, layout: Any) -> Value:
        return value(self.data.clone())

    def store(self, x: Value) -> None:
        assert self.shape == tuple(x.shape), f"{tuple(x.shape)} into {self.shape}"
        assert self.data.dtype == x.dtype, f"{x.dtype} into {self.data.dtype}"
        self.data.copy_(x)
        running_machine().running.unfenced.add(self.root)

    def reinterpret(self, dtype: Any, shape: Sequence[int]) -> Memory:
        return Memory(self.data.reshape(-1).view(torch.uint8).view(DTYPES[dtype]).view(*map(int, shape)), self.root)


class Pointer:
    """Into a tensor's storage, in elements."""

    def __init__(self, data: Tensor, at: Any = 0) -> None:
        self.data, self.at = data, at

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.data, self.at + offset)

    def __sub__(self, offset: Any) -> Pointer:
        return self + -offset

    def where(self, mask: Any) -> tuple[Tensor, Tensor]:
        """The elements pointed at, and which of them count."""
        at = torch.as_tensor(self.at).long().as_subclass(Tensor)
        keep = torch.as_tensor(mask).as_subclass(Tensor).expand_as(at)
        inside = (at >= 0) & (at < self.data.numel())
        assert bool((inside | ~keep).all()), f"an access outside of {self.data.numel()} elements"
        return at, keep


class Descriptor:
    """A tensor's tiles, as the copy engine sees them."""

    def __init__(self, one: TensorDescriptor) -> None:
        self.whole = torch.as_strided(one.base, one.shape, one.strides)
        self.dtype, self.layout = NAMES[one.base.dtype], None
        nbytes = math.prod(one.block_shape) * one.base.element_size()
        self.block_type = types.SimpleNamespace(shape=list(one.block_shape), nbytes=nbytes)

    def tile(self, where: Sequence[Any]) -> tuple[Tensor, tuple[slice, ...]]:
        """What of a block is inside of the tensor, and where in the block that is."""
        sizes = zip(map(int, where), self.block_type.shape, self.whole.shape, strict=True)
        ends = [(at, max(0, min(block, size - at))) for at, block, size in sizes]
        assert all(at >= 0 for at, _ in ends), f"a block at {where}"
        return self.whole[tuple(slice(at, at + n) for at, n in ends)], tuple(slice(0, n) for _, n in ends)
