"""Tokens on disk and the figures about them."""

import json
import math

import numpy as np
import pytest

from ringspan.train import corpus as module
from ringspan.train.corpus import Corpus, entropy, write_corpus
from ringspan.train.tokenizer import ByteTokenizer

TEXTS = ["hello", "", "x", "naïve 東京" * 50, "end"]


class WideTokenizer(ByteTokenizer):
    """Bytes in the upper half of a vocabulary too large for 16 bits."""

    vocab_size = 70_000
    end_of_document = 69_999

    def encode(self, texts):
        return [np.frombuffer(text.encode(), np.uint8) + np.uint32(69_000) for text in texts]


def documents(corpus: Corpus) -> list[list[int]]:
    return [corpus.tokens[a:b].tolist() for a, b in zip(corpus.starts, corpus.starts[1:], strict=False)]


@pytest.mark.parametrize("batch", [1, 7, 1 << 22])
@pytest.mark.parametrize(
    ("tokenizer", "offset", "dtype"), [(ByteTokenizer(), 0, "<u2"), (WideTokenizer(), 69_000, "<u4")]
)
def test_documents_come_back_with_their_ends(tmp_path, monkeypatch, tokenizer, offset, dtype, batch):
    monkeypatch.setattr(module, "BATCH_CHARACTERS", batch)
    monkeypatch.setattr(module, "COUNTED_TOKENS", 3)
    written = write_corpus(tmp_path, iter(TEXTS), tokenizer, name="some text", skipped=["a.png"])
    corpus = Corpus(tmp_path)
    expected = [[byte + offset for byte in text.encode()] + [tokenizer.end_of_document] for text in TEXTS if text]
    assert documents(corpus) == expected
    assert corpus.tokens.dtype == np.dtype(dtype)
    assert (corpus.vocab_size, corpus.end_of_document) == (tokenizer.vocab_size, tokenizer.end_of_document)
    assert (corpus.name, corpus.skipped) == ("some text", ["a.png"])
    flat = [token for document in expected for token in document]
    assert written == len(flat)
    by_hand = -sum(flat.count(token) / len(flat) * math.log(flat.count(token) / len(flat)) for token in set(flat))
    assert corpus.unigram_entropy == pytest.approx(by_hand, rel=1e-12)


def test_entropy_of_known_distributions():
    assert entropy(np.array([0, 5, 0])) == 0
    assert entropy(np.full(257, 3)) == pytest.approx(math.log(257), rel=1e-14)
    assert entropy(np.array([1, 3])) == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3), rel=1e-14)


def test_digest_is_of_the_tokens(tmp_path, monkeypatch):
    digests = []
    corpora = [(["ab", "c"], 99), (["ab", "c"], 1), (["ax", "c"], 99), (["a", "bc"], 99), (["c", "ab"], 99)]
    for i, (texts, batch) in enumerate(corpora):
        (tmp_path / str(i)).mkdir()
        monkeypatch.setattr(module, "BATCH_CHARACTERS", batch)
        write_corpus(tmp_path / str(i), texts, ByteTokenizer(), name=str(i))
        digests.append(Corpus(tmp_path / str(i)).digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_missing_and_damaged_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=f"no corpus in {tmp_path}: every host must see"):
        Corpus(tmp_path)
    write_corpus(tmp_path, TEXTS, ByteTokenizer(), name="x")
    assert json.loads((tmp_path / "meta.json").read_text())["documents"] == 4
    with open(tmp_path / "tokens.bin", "r+b") as file:
        file.truncate(11)
    with pytest.raises(ValueError, match=f"the corpus in {tmp_path} is damaged; delete that folder"):
        Corpus(tmp_path)
