"""Text to token ids: the bytes themselves, or any Hugging Face tokenizer.json."""

import hashlib
import os
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers

# What tokenizers call the token that ends a document, the most specific first (the bars are U+FF5C, the box U+2581).
END_OF_DOCUMENT = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|endofdocument|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<EOS>",
)


class Tokenizer(Protocol):
    """What a corpus needs of a tokenizer. Text never gives `end_of_document`: the corpus appends it."""

    vocab_size: int  # ids are 0 to vocab_size - 1, with end_of_document
    end_of_document: int

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, of any unsigned integer dtype."""
        ...


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8, 256 ends a document."""

    vocab_size = 257
    end_of_document = 256

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]


class JsonTokenizer:
    """A tokenizer.json. Its own end-of-document token is taken if it has one, else an id is added behind its last."""

    def __init__(self, file: str, content: bytes):
        """Raises ValueError where `content`, what is in `file`, is no tokenizer."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises a plain Exception whatever the reason
            raise ValueError(f"data.tokenizer={file!r} is not a Hugging Face tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()  # files of sentence encoders often say 512
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" written in a text is text, and ends nothing
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        if not ids:
            raise ValueError(f"data.tokenizer={file!r} has an empty vocabulary; give one that is trained")
        size = max(ids.values()) + 1  # not len(ids): some have holes
        self.end_of_document = next((ids[name] for name in END_OF_DOCUMENT if name in ids), size)
        self.vocab_size = max(size, self.end_of_document + 1)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: "bytes", or the path of a tokenizer.json. Raises ValueError."""
    return ByteTokenizer() if name == "bytes" else JsonTokenizer(name, _content(name))


def tokenizer_fingerprint(name: str) -> str:
    """Changes with whatever changes ids. Raises ValueError if there is no such file."""
    return name if name == "bytes" else hashlib.sha256(_content(name)).hexdigest()


def _content(name: str) -> bytes:
    way_out = "give 'bytes' or the path of a tokenizer.json"
    file = Path(os.path.expanduser(name))
    if not name or not file.exists():
        raise ValueError(f"data.tokenizer={name!r} does not exist; {way_out}")
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"data.tokenizer={name!r} cannot be read ({error.strerror}); {way_out}") from error
