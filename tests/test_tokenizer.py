"""Bytes and tokenizer.json files: ids, ends of documents, and what is wrong with the ones that are refused."""

import base64
import io
import json
import os
import signal
import sys
import threading

import numpy as np
import pytest
import regex
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from ringspan.train.tokenizer import (
    CL100K_WORDS,
    END_OF_DOCUMENT,
    KNOWN_RANKS,
    load_tokenizer,
    tokenizer_fingerprint,
    train_bpe,
)

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


def test_a_trained_bpe_round_trips_and_keeps_its_end_for_documents(tmp_path):
    file = tmp_path / "tokenizer.json"
    train_bpe(["the cat and the dog and the cow. " * 20] * 3, 270, file)
    tokenizer, library = load_tokenizer(str(file)), tokenizers.Tokenizer.from_file(str(file))
    assert tokenizer.vocab_size == 270
    assert library.id_to_token(tokenizer.end_of_document) == END_OF_DOCUMENT[0]
    for text, ids in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert library.decode(ids.tolist()) == text
    assert len(tokenizer.encode(["the cat and"])[0]) < len("the cat and")
    assert tokenizer.end_of_document not in tokenizer.encode([END_OF_DOCUMENT[0]])[0]
    assert list(tmp_path.iterdir()) == [file]


def tiktoken_file(path, tokens=(b"he", b"ll", b"hell", b" w"), words=CL100K_WORDS):
    if words is not None:
        path.with_suffix(".words").write_text(words + "\n")
    every = [*(bytes([byte]) for byte in range(256)), *tokens]
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(every)))
    return str(path)


def test_a_tiktoken_file_merges_by_rank(tmp_path):
    pytest.importorskip("tiktoken")
    tokenizer = load_tokenizer(tiktoken_file(tmp_path / "some.tiktoken"))
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (261, 260)
    (ids,) = tokenizer.encode(["hello world"])
    assert ids.tolist() == [258, ord("o"), 259, *b"orld"]
    every = [*(bytes([byte]) for byte in range(256)), b"he", b"ll", b"hell", b" w"]
    assert [b"".join(every[i] for i in ids).decode() for ids in tokenizer.encode(TEXTS)] == TEXTS


KNOWN_NAMES = {50_256: "r50k_base", 50_280: "p50k_base", 100_256: "cl100k_base", 199_998: "o200k_base"}


@pytest.mark.parametrize("size", KNOWN_NAMES)
def test_words_end_where_the_library_ends_them(monkeypatch, size):
    library = pytest.importorskip("tiktoken_ext.openai_public")
    monkeypatch.setattr(library, "load_tiktoken_bpe", lambda *_, **__: {})
    theirs, ours = getattr(library, KNOWN_NAMES[size])(), KNOWN_RANKS[size]
    assert ours.end_of_document == theirs["special_tokens"]["<|endoftext|>"]
    rng = np.random.default_rng(size)
    words = ["'s", "'LL", "'", "Don", "ABc", "éÉ", "東京", "1", "2345", "٣", "//", "+="]
    parts = [*words, " ", "  ", "\n", "\r\n", "\t", "\u0301"]
    for _ in range(300):
        text = "".join(rng.choice(parts, rng.integers(1, 12)))
        expected = regex.findall(theirs["pat_str"], text)
        assert regex.findall(ours.words, text) == expected
        assert "".join(expected) == text


def test_a_known_vocabulary_is_split_by_its_own_words(tmp_path, monkeypatch):
    """Digits all together, by threes or one by one; contractions as words: four vocabularies, made small here."""
    pytest.importorskip("tiktoken")
    merges, found = [b"12", b"123", b"1234", b"./", b"'s", b"a's"], {}
    for more, size in enumerate((50_256, 100_256, 151_643, 199_998)):
        tokens = [*merges, *[b"\xff" * (n + 2) for n in range(more)]]
        known = KNOWN_RANKS[size]._replace(end_of_document=300)
        monkeypatch.setitem(KNOWN_RANKS, 256 + len(tokens), known)
        tokenizer = load_tokenizer(tiktoken_file(tmp_path / f"{size}.tiktoken", tokens, words=None))
        (ids,) = tokenizer.encode(["1234./a's"])
        found[size] = [merges[i - 256].decode() if i >= 256 else chr(i) for i in ids]
        assert (tokenizer.end_of_document, tokenizer.vocab_size) == (300, 301)
    assert found == {
        50_256: ["1234", "./", "a", "'s"],
        100_256: ["123", "4", "./", "a", "'s"],
        151_643: ["1", "2", "3", "4", "./", "a", "'s"],
        199_998: ["123", "4", "./", "a's"],
    }


def test_a_vocabulary_that_nobody_knows_needs_its_words(tmp_path):
    pytest.importorskip("tiktoken")
    file = tiktoken_file(tmp_path / "a.tiktoken", words=None)
    with pytest.raises(ValueError, match=r"has 260 tokens, and no such file is known: .* into .*a\.words$"):
        load_tokenizer(file)
    before = tokenizer_fingerprint(file)
    ids = []
    for words in (r"hel|\S|\s", r"\S+|\s"):
        (tmp_path / "a.words").write_text(words)
        ids.append(load_tokenizer(file).encode(["hello"])[0].tolist())
        assert tokenizer_fingerprint(file) not in {before, ""}
        before = tokenizer_fingerprint(file)
    assert ids == [[256, ord("l"), *b"lo"], [258, ord("o")]]
    (tmp_path / "a.words").write_text("(")
    with pytest.raises(ValueError, match=r"a\.words is no regular expression: "):
        load_tokenizer(file)


def test_a_sentencepiece_model_is_used(tmp_path):
    package = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    text = iter(["hello world and more text"] * 9)
    package.SentencePieceTrainer.train(sentence_iterator=text, model_writer=model, vocab_size=18, minloglevel=2)
    (tmp_path / "a.model").write_bytes(model.getvalue())
    tokenizer = load_tokenizer(str(tmp_path / "a.model"))
    library = package.SentencePieceProcessor(model_proto=model.getvalue())
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (18, library.eos_id())
    assert [library.decode(ids.tolist()) for ids in tokenizer.encode(["hello text", ""])] == ["hello text", ""]
    for content in (b"", b"junk"):
        (tmp_path / "b.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"data\.tokenizer='.*b\.model' is not a SentencePiece model: ") as error:
            load_tokenizer(str(tmp_path / "b.model"))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"junk", b"YQ== 0 1", b"YQ== x", b"? 0", b"YQ== 0"])
def test_what_is_no_tiktoken_file_is_named(tmp_path, content):
    pytest.importorskip("tiktoken")
    (tmp_path / "a.tiktoken").write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.tokenizer='.*a\.tiktoken' is not a \.tiktoken file: ") as error:
        load_tokenizer(str(tmp_path / "a.tiktoken"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("suffix", "package"), [("tiktoken", "tiktoken"), ("model", "sentencepiece")])
def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch, suffix, package):
    file = tiktoken_file(tmp_path / f"a.{suffix}")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"data\.tokenizer='.*' needs the package {package}: pip install {package}$"):
        load_tokenizer(file)


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


def test_ctrl_c_is_heard_while_a_bpe_is_trained(tmp_path):
    """Rust, which counts and merges for minutes, would keep the thread that it is called in from hearing it."""
    stopped = threading.Event()

    def texts():
        assert threading.current_thread() is not threading.main_thread()
        yield "one two"
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped.wait(30)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            train_bpe(texts(), 300, tmp_path / "x.json")
    finally:
        signal.signal(signal.SIGINT, before)
    stopped.set()


def test_a_mistake_in_the_text_ends_the_training_of_a_bpe(tmp_path):
    def texts():
        yield "one two"
        raise ValueError("data.path: cannot be read")

    with pytest.raises(ValueError, match=r"data\.path: cannot be read"):
        train_bpe(texts(), 300, tmp_path / "x.json")
    assert not list(tmp_path.iterdir())
