"""Our safetensors files against the library's own reader and writer, and files that lie."""

import json
from hashlib import sha256

import pytest
import safetensors.torch
import torch

from ringspan.train.tensors import BLOCK, Entry, TensorFile, as_bytes, sha256_of, write


def some_tensors():
    g = torch.Generator().manual_seed(0)
    return {
        "a.weight/0": torch.randn(7, 3, generator=g),
        "half": torch.randn(5, generator=g).bfloat16(),
        "wide": torch.randn(2, 1, 2, generator=g, dtype=torch.float64),
        "none": torch.empty(0, 4),
        "ids": torch.arange(9),
        "random/cpu": torch.randint(256, (11,), generator=g, dtype=torch.uint8),
    }


def save(path, tensors):
    return write(path, {name: Entry(x.dtype, tuple(x.shape)) for name, x in tensors.items()}, tensors.values())


def test_the_library_reads_what_we_write(tmp_path):
    tensors, path = some_tensors(), tmp_path / "x.safetensors"
    written = save(path, tensors)
    assert (written.size, written.sha256) == (path.stat().st_size, sha256(path.read_bytes()).hexdigest())
    assert sha256_of(path) == written.sha256
    read = safetensors.torch.load_file(path)
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name


def test_we_read_what_the_library_writes_and_any_run_of_it(tmp_path):
    tensors, path = some_tensors(), tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    file = TensorFile(path)
    assert file.entries == {name: Entry(x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    for name, tensor in tensors.items():
        assert torch.equal(file.read(name), tensor.flatten())
        assert name == "none" or torch.equal(file.read(name, 2, 4), tensor.flatten()[2:4])
    assert file.read("ids", 9).numel() == 0


def test_a_tensor_of_many_blocks(tmp_path):
    big = torch.arange(BLOCK // 4 + 3, dtype=torch.int32)
    written = save(tmp_path / "x", {"big": big})
    assert written.sha256 == sha256_of(tmp_path / "x")
    assert TensorFile(tmp_path / "x").read("big", BLOCK // 4 - 1).tolist() == [BLOCK // 4 + i for i in (-1, 0, 1, 2)]


def lying(header, data=bytes(16), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def told(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04\x95" + bytes(40),  # a pickle
        lying(b"{", length=1 << 40),
        lying(b'{"x": 1}'),
        lying(b"[1]"),
        lying(b"{'x'}"),
        lying(told(), data=bytes(15)),
        lying(told(offsets=(-4, 12))),
        lying(told(offsets=(16, 32))),
        lying(told(offsets=(0, 12))),
        lying(told(shape=(-4,))),
        lying(told(shape=(2.0, 2))),
        lying(told(shape=(True, 4))),
        lying(told(dtype="PICKLE")),
        lying({"x": {"dtype": "F32", "shape": [4]}}),
    ],
)
def test_a_file_that_lies_is_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="x is no safetensors file: "):
        TensorFile(tmp_path / "x")


def test_a_file_cut_after_it_was_opened_is_noticed(tmp_path):
    save(tmp_path / "x", {"a": torch.ones(100)})
    file = TensorFile(tmp_path / "x")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-8])
    assert file.read("a", 0, 98).sum() == 98
    with pytest.raises(ValueError, match="has been cut"):
        file.read("a", 90)


def test_bytes_are_the_tensor_s_own():
    x = torch.zeros(3)
    as_bytes(x)[:] = torch.tensor([1.0, 2.0, 3.0]).numpy().tobytes()
    assert x.tolist() == [1, 2, 3]
