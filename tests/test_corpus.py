"""Tokens on disk and the figures about them."""

import errno
import json
import math
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringspan.train import corpus as module
from ringspan.train import shards as shards_module
from ringspan.train.corpus import FORMAT, Corpus, Joined, entropy, verify, write_manifest
from ringspan.train.reading import Segment
from ringspan.train.shards import token_dtype, write_shards
from ringspan.train.tokenizer import ByteTokenizer

TEXTS = ["hello", "x", "naïve 東京" * 50, "end"]


class WideTokenizer(ByteTokenizer):
    """Bytes in the upper half of a vocabulary too large for 16 bits."""

    vocab_size = 70_000
    end_of_document = 69_999

    def encode(self, texts):
        return [np.frombuffer(text.encode(), np.uint8) + np.uint32(69_000) for text in texts]


def write(folder: Path, texts=TEXTS, tokenizer=ByteTokenizer, **facts) -> Corpus:
    folder.mkdir(exist_ok=True)
    shards = write_shards(folder, [Segment(text, last=True) for text in texts], tokenizer)
    told = {"name": "some text", "tokenizer": "bytes", "skipped": ["a.png"], "n_skipped": 1} | facts
    t = tokenizer()
    write_manifest(folder, shards, token_dtype(t.vocab_size), t.vocab_size, end_of_document=t.end_of_document, **told)
    return Corpus(folder)


def documents(corpus: Corpus) -> list[list[int]]:
    return [corpus.tokens[a:b].tolist() for a, b in zip(corpus.starts, corpus.starts[1:], strict=False)]


@pytest.fixture(params=[(1, 1), (7, 40), (1 << 22, 1 << 24)])
def sizes(request, monkeypatch):
    monkeypatch.setattr(shards_module, "UNIT_CHARACTERS", request.param[0])
    monkeypatch.setattr(shards_module, "SHARD_TOKENS", request.param[1])


@pytest.mark.parametrize(("tokenizer", "offset", "dtype"), [(ByteTokenizer, 0, "<u2"), (WideTokenizer, 69_000, "<u4")])
def test_documents_come_back_with_their_ends(tmp_path, monkeypatch, sizes, tokenizer, offset, dtype):
    monkeypatch.setattr(module, "COUNTED_TOKENS", 3)
    corpus = write(tmp_path, tokenizer=tokenizer)
    expected = [[byte + offset for byte in text.encode()] + [tokenizer.end_of_document] for text in TEXTS]
    assert documents(corpus) == expected
    assert corpus.tokens.dtype == np.dtype(dtype)
    assert (corpus.vocab_size, corpus.end_of_document) == (tokenizer.vocab_size, tokenizer.end_of_document)
    assert (corpus.name, corpus.skipped, corpus.n_skipped) == ("some text", ["a.png"], 1)
    assert corpus.labelled is None
    assert corpus.bytes.tolist() == [len(text.encode()) for text in TEXTS]
    flat = [token for document in expected for token in document]
    assert len(corpus.tokens) == len(flat)
    by_hand = -sum(flat.count(token) / len(flat) * math.log(flat.count(token) / len(flat)) for token in set(flat))
    assert corpus.unigram_entropy == pytest.approx(by_hand, rel=1e-12)


def test_entropy_of_known_distributions():
    assert entropy(np.array([0, 5, 0])) == 0
    assert entropy(np.full(257, 3)) == pytest.approx(math.log(257), rel=1e-14)
    assert entropy(np.array([1, 3])) == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3), rel=1e-14)


def test_digest_is_of_the_tokens(tmp_path):
    corpora = [["ab", "c"], ["ab", "c"], ["ax", "c"], ["a", "bc"], ["c", "ab"]]
    digests = [write(tmp_path / str(i), texts, name=str(i)).digest for i, texts in enumerate(corpora)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


@given(st.lists(st.lists(st.integers(0, 99)), min_size=1), st.data())
def test_arrays_end_to_end_are_read_as_one(parts, data):
    joined = Joined([np.array(part, np.uint16) for part in parts])
    flat = [value for part in parts for value in part]
    assert len(joined) == len(flat)
    start, stop = (data.draw(st.integers(0, len(flat) + 2)) for _ in range(2))
    assert joined[start:stop].tolist() == flat[start:stop]
    assert joined[start:stop].dtype == np.uint16
    assert joined.tolist() == flat


def test_missing_and_damaged_folders_are_named(tmp_path, sizes):
    with pytest.raises(ValueError, match=f"no corpus in {tmp_path}: every host must see"):
        Corpus(tmp_path)
    write(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["documents"] == 4
    for name in ("00000.tokens", "00000.documents"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content + b"x")
        with pytest.raises(ValueError, match=rf"{name} has [\d,]+ bytes instead of [\d,]+: the corpus is damaged; del"):
            Corpus(tmp_path)
        (tmp_path / name).unlink()
        for open_ in (Corpus, verify):
            with pytest.raises(ValueError, match=f"{name} is missing: the corpus is damaged; delete {tmp_path}"):
                open_(tmp_path)
        (tmp_path / name).write_bytes(content)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": 1}', json.dumps({"format": FORMAT + 1})])
def test_a_manifest_that_is_not_ours_is_named(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"is damaged: .*; prepare the text again|has format \d, not \d: prepare"):
        Corpus(tmp_path)


def test_a_shard_with_another_hash_is_refused(tmp_path, monkeypatch, sizes):
    write(tmp_path)
    verify(tmp_path)
    for file in sorted(tmp_path.glob("0*.*")):
        content = file.read_bytes()
        if not content or file.suffix == ".json":
            continue
        stat = file.stat()
        file.write_bytes(bytes([content[0] ^ 1]) + content[1:])  # one bit, and the time set back
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        with pytest.raises(ValueError, match=f"{file.stem}.tokens does not have the hash that is in the manifest: the"):
            verify(tmp_path)
        file.write_bytes(content)
        verify(tmp_path)


def test_a_shard_that_was_found_right_is_not_read_again(tmp_path, monkeypatch):
    write(tmp_path)
    verify(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "sha256_of", None)
        verify(tmp_path)
    os.utime(tmp_path / "00000.tokens")
    read = []
    monkeypatch.setattr(module, "sha256_of", partial(lambda f, files: read.append(files) or f(files), module.sha256_of))
    verify(tmp_path)
    verify(tmp_path)
    assert len(read) == 1


@pytest.mark.parametrize("left", ["", '{"00000": ['])
def test_what_was_noted_of_hashes_and_is_broken_is_noted_anew(tmp_path, left):
    write(tmp_path)
    (tmp_path / "verified.json").write_text(left)
    verify(tmp_path)
    assert list(json.loads((tmp_path / "verified.json").read_text())) == ["00000"]


def test_a_full_disk_keeps_no_corpus_from_being_read_and_gets_no_file_of_it(tmp_path, monkeypatch):
    write(tmp_path)
    before = set(tmp_path.iterdir())

    def full(self, text, encoding):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    verify(tmp_path)
    assert set(tmp_path.iterdir()) == before
