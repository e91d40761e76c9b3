"""Safetensors files: written in one pass with their checksum, read by runs of elements.

A file is the length of its header (8 bytes, little endian), the header (JSON: the dtype, shape and bytes of each name)
and the tensors, end to end. Reading one runs nothing: it is text and numbers, and each number is checked.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
LARGEST_HEADER = 100 << 20  # bytes, the format's own limit
BLOCK = 16 << 20  # bytes written and hashed at once: Python's lock is free meanwhile


class Entry(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Written(NamedTuple):
    size: int  # bytes
    sha256: str


def write(path: Path, entries: Mapping[str, Entry], tensors: Iterable[Tensor]) -> Written:
    """Write ``tensors``, contiguous and on the CPU, in the order of ``entries``; on the disk when this returns.

    Tensors may be made one after the other, so that no more than one is in memory.
    """
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for block in _blocks(entries, tensors):
            file.write(block)
            digest.update(block)
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
    return Written(size, digest.hexdigest())


def _blocks(entries: Mapping[str, Entry], tensors: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    header, at = {}, 0
    for name, entry in entries.items():
        header[name] = {
            "dtype": CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, at := at + entry.size],
        }
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for entry, tensor in zip(entries.values(), tensors, strict=True):
        assert (tensor.dtype, tensor.numel()) == (entry.dtype, math.prod(entry.shape))
        data = as_bytes(tensor)
        yield from (data[start : start + BLOCK] for start in range(0, len(data), BLOCK))


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TensorFile:
    """``entries`` is what a file says that it holds. ValueError: no such file, or one that is cut or not consistent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                self.begin, size = 8 + length, path.stat().st_size
                if not 2 <= length <= min(LARGEST_HEADER, size - 8):
                    raise ValueError(f"its header cannot be {length} bytes")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            self.entries = {name: _entry(name, told) for name, told in header.items()}
            self.starts = {name: told["data_offsets"][0] for name, told in header.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from error
        ends = [self.starts[name] + entry.size for name, entry in self.entries.items()]
        if min(self.starts.values(), default=0) < 0 or max(ends, default=0) > size - self.begin:
            raise ValueError(f"{path} is no safetensors file: tensors outside of its {size} bytes")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements ``start`` to ``stop`` of the flat tensor, as a new 1-D one."""
        entry = self.entries[name]
        count = math.prod(entry.shape)
        stop = count if stop is None else stop
        assert 0 <= start <= stop <= count
        run = torch.empty(stop - start, dtype=entry.dtype)
        with open(self.path, "rb") as file:
            file.seek(self.begin + self.starts[name] + start * entry.dtype.itemsize)
            if run.numel() and file.readinto(as_bytes(run)) != run.nbytes:
                raise ValueError(f"{self.path} has been cut")
        return run


def _entry(name: str, told: dict[str, Any]) -> Entry:
    shape, offsets = told["shape"], told["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in [*shape, *offsets]):
        raise ValueError(f"{name}: sizes must be whole numbers")
    entry, size = Entry(DTYPES[told["dtype"]], tuple(shape)), offsets[1] - offsets[0]
    if size != entry.size:
        raise ValueError(f"{name}: {size} bytes cannot be a tensor of shape {entry.shape}")
    return entry
