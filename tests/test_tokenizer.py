"""Bytes and tokenizer.json files: ids, ends of documents, and what is wrong with the ones that are refused."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from ringspan.train.tokenizer import load_tokenizer, tokenizer_fingerprint

TEXTS = ["hello world", "", "naïve 東京 \r\n\t x", "hello"]


def byte_bpe(path, special=(), vocabulary=None):
    """A tokenizer.json whose tokens are the 256 bytes and one merge."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = vocabulary or {token: i for i, token in enumerate([*letters, "he"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(path))
    return tokenizer


def test_bytes_are_their_own_ids():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 256)
    assert [bytes(ids.tolist()).decode() for ids in tokenizer.encode(TEXTS)] == TEXTS


def test_a_tokenizer_json_gives_all_of_a_text_unpadded(tmp_path):
    library = byte_bpe(tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode(TEXTS)
    assert [library.decode(part.tolist()) for part in ids] == TEXTS
    assert len(ids[0]) == len(TEXTS[0]) - 1  # "he" is one token
    assert all(np.issubdtype(part.dtype, np.unsignedinteger) for part in ids)


def test_without_a_token_of_its_own_the_end_of_a_document_is_one_more_id(tmp_path):
    byte_bpe(tmp_path / "tokenizer.json", special=["<pad>"])
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (259, 258)


@pytest.mark.parametrize("name", ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"])
def test_its_own_end_of_document_is_taken_and_never_comes_out_of_text(tmp_path, name):
    byte_bpe(tmp_path / "tokenizer.json", special=["<pad>", name])
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (259, 258)
    (ids,) = tokenizer.encode([f"one{name}two"])
    assert len(ids) == len(f"one{name}two")  # written out in bytes


def test_ids_with_holes_stay_inside_the_vocabulary(tmp_path):
    letters = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    byte_bpe(tmp_path / "tokenizer.json", vocabulary={**letters, "he": 999})
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (1001, 1000)
    assert tokenizer.encode(["he"])[0].tolist() == [999]


def test_fingerprint_is_of_the_content(tmp_path):
    first, same, other = (tmp_path / name for name in ("first.json", "same.json", "other.json"))
    byte_bpe(first), byte_bpe(same), byte_bpe(other, special=["<eos>"])
    assert tokenizer_fingerprint(str(first)) == tokenizer_fingerprint(str(same))
    assert len({tokenizer_fingerprint(name) for name in (str(first), str(other), "bytes")}) == 3


@pytest.mark.parametrize("content", [None, b"", b"\x00\xff", b"{}", json.dumps({"model": "gpt2"}).encode()])
def test_what_is_no_tokenizer_is_named_in_one_line(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"does not exist|is not a Hugging Face tokenizer.json") as error:
        load_tokenizer(str(file))
    assert str(error.value).startswith(f"data.tokenizer={str(file)!r}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "gpt2", "BYTES"])
def test_names_that_are_no_files(name):
    with pytest.raises(ValueError, match=rf"data\.tokenizer='{name}' does not exist; give 'bytes' or the path"):
        tokenizer_fingerprint(name)


def test_a_folder_is_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"Is a directory.*give 'bytes' or the path of a tokenizer.json"):
        load_tokenizer(str(tmp_path))


def test_an_empty_vocabulary_is_refused(tmp_path):
    tokenizers.Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="empty vocabulary"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
