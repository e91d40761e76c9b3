"""Text to token ids: the bytes themselves, a Hugging Face tokenizer.json, a .tiktoken or a SentencePiece .model."""

import base64
import binascii
import hashlib
import importlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

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

# A .tiktoken file has ranks alone: where words end, and which id ends a document, is known by how many they are.
# Contractions, words with a character before them, numbers, runs of signs, line ends, spaces.
_SHORT, _SPACES = r"(?i:'(?:[sdmt]|ll|ve|re))", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+"
GPT2_WORDS = rf"'(?:[sdmt]|ll|ve|re)| ?\p{{L}}+| ?\p{{N}}+|{_SIGNS}|\s+(?!\S)|\s+"
LLAMA3_WORDS = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_SIGNS}[\r\n]*|{_SPACES}"
CL100K_WORDS = LLAMA3_WORDS.replace(_SPACES, rf"\s+$|{_SPACES}")  # white space that ends a text is one word
QWEN_WORDS = LLAMA3_WORDS.replace("{1,3}", "")  # a digit a word
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SHORT}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SHORT}?|"
    rf"\p{{N}}{{1,3}}|{_SIGNS}[\r\n/]*|{_SPACES}"
)
WORDS = ".words"  # suffix of the file beside a .tiktoken of another size
WAY_OUT = "give 'bytes' or the path of a tokenizer.json, a .tiktoken or a SentencePiece .model file"


class Ranks(NamedTuple):
    """What is known of the .tiktoken files that have so many tokens."""

    words: str  # a regular expression that matches them one after the other
    end_of_document: int


KNOWN_RANKS = {
    50_256: Ranks(GPT2_WORDS, 50_256),  # gpt2, r50k_base
    50_280: Ranks(GPT2_WORDS, 50_256),  # p50k_base, whose ranks leave that id out
    100_256: Ranks(CL100K_WORDS, 100_257),  # cl100k_base
    128_000: Ranks(LLAMA3_WORDS, 128_001),  # Llama 3, whose id 128,000 begins a document
    151_643: Ranks(QWEN_WORDS, 151_643),  # Qwen
    199_998: Ranks(O200K_WORDS, 199_999),  # o200k_base
}


class Tokenizer(Protocol):
    """What a corpus needs of a tokenizer. Text never gives `end_of_document`: the corpus appends it."""

    vocab_size: int  # ids are 0 to vocab_size - 1, with end_of_document
    end_of_document: int

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, of any unsigned integer dtype."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Their text; an id that stands for none, or a character that is not whole, is left out or U+FFFD."""
        ...


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8, 256 ends a document."""

    vocab_size = 257
    end_of_document = 256

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < self.end_of_document).decode(errors="replace")


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

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids))


class TiktokenTokenizer:
    """A .tiktoken file, a base64 token and its rank on each line, of a size in KNOWN_RANKS.

    Of another size, the regular expression of its words is read from a file beside it, NAME.words, and the id behind
    the last rank ends a document.
    """

    def __init__(self, file: str, content: bytes):
        """Raises ValueError where the package `tiktoken` is not installed, or `content` is no such file."""
        package = _package("tiktoken", file)
        try:
            pairs = [line.split() for line in content.splitlines() if line]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"data.tokenizer={file!r} is not a .tiktoken file: {error}") from error
        if not {bytes([byte]) for byte in range(256)} <= ranks.keys():
            raise ValueError(f"data.tokenizer={file!r} is not a .tiktoken file: it has not a token for every byte")
        words, known = _words_beside(file), KNOWN_RANKS.get(len(ranks))
        if words is None and known is None:
            raise ValueError(
                f"data.tokenizer={file!r} has {len(ranks):,} tokens, and no such file is known: where its words end is "
                f"not in it; write the regular expression that splits them into {Path(file).with_suffix(WORDS)}"
            )
        last = max(ranks.values())
        known = known if words is None else Ranks(words, last + 1)
        assert known is not None
        self.end_of_document = known.end_of_document
        self.vocab_size = max(last, self.end_of_document) + 1
        self._words = frozenset(ranks.values())
        try:
            self._encoding = package.Encoding(
                Path(file).stem, pat_str=known.words, mergeable_ranks=ranks, special_tokens={}
            )
        except ValueError as error:
            raise ValueError(f"{Path(file).with_suffix(WORDS)} is no regular expression: {_line(error)}") from error

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(self._encoding.encode_ordinary(text), dtype=np.uint32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode([i for i in ids if i in self._words])


class SentencePieceTokenizer:
    """A SentencePiece .model file. Its own end-of-sentence token ends a document, else the id behind its last."""

    def __init__(self, file: str, content: bytes):
        """Raises ValueError where the package `sentencepiece` is not installed, or `content` is no model."""
        package = _package("sentencepiece", file)
        self._processor = package.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(content)
            size = self._processor.vocab_size()
        except (RuntimeError, OSError) as error:
            raise ValueError(f"data.tokenizer={file!r} is not a SentencePiece model: {_line(error)}") from error
        if not size:
            raise ValueError(f"data.tokenizer={file!r} has an empty vocabulary; give one that is trained")
        self.end_of_document = self._processor.eos_id() if self._processor.eos_id() >= 0 else size
        self.vocab_size = max(size, self.end_of_document + 1)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(self._processor.encode(text), dtype=np.uint32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([i for i in ids if i < self._processor.vocab_size()])


# By the file's suffix
KINDS: dict[str, Callable[[str, bytes], Tokenizer]] = {".tiktoken": TiktokenTokenizer, ".model": SentencePieceTokenizer}


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: "bytes", or the path of a file. Raises ValueError."""
    if name == "bytes":
        return ByteTokenizer()
    return KINDS.get(Path(name).suffix, JsonTokenizer)(name, _content(name))


def tokenizer_fingerprint(name: str) -> str:
    """Changes with whatever changes ids. Raises ValueError if there is no such file."""
    if name == "bytes":
        return name
    kind = Path(name).suffix if Path(name).suffix in KINDS else ""
    words = _words_beside(name) if KINDS.get(kind) is TiktokenTokenizer else None
    return hashlib.sha256(_content(name) + (words or "").encode()).hexdigest() + kind


def train_bpe(texts: Iterable[str], vocab_size: int, file: Path) -> None:
    """Train a byte-level BPE (Sennrich et al., arXiv 1508.07909) on texts and write a tokenizer.json.

    vocab_size: at most, with the 256 bytes and the token that ends a document.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    _interruptible(lambda: tokenizer.train_from_iterator(texts, trainer))
    half = file.with_name(f"{file.name}.tmp")
    tokenizer.save(str(half))
    os.replace(half, file)  # a killed training leaves no half of a tokenizer


def _interruptible(work: Callable[[], None]) -> None:
    """Call it beside this thread, which hears Ctrl-C meanwhile: Rust would keep it from that for minutes."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def _package(name: str, file: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"data.tokenizer={file!r} needs the package {name}: pip install {name}") from error


def _words_beside(file: str) -> str | None:
    beside = Path(os.path.expanduser(file)).with_suffix(WORDS)
    return beside.read_text(encoding="utf-8").strip() if beside.exists() else None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _content(name: str) -> bytes:
    file = Path(os.path.expanduser(name))
    if not name or not file.exists():
        raise ValueError(f"data.tokenizer={name!r} does not exist; {WAY_OUT}")
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"data.tokenizer={name!r} cannot be read ({error.strerror}); {WAY_OUT}") from error
