"""Where text comes from: a file, a folder or the running Python's own standard library, read through `datasets`."""

import codecs
import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import IterableDataset

SNIFF_BYTES = 1 << 20  # what is read of a file to tell text from other things before all of it is read

# Folders beside or in the standard library: tests are many (19 of 31 MB) and odd on purpose; packages are not its own.
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Source:
    """Text files below `root`. Each entry of `documents` is one document, in one or several files that are joined.

    A `.jsonl` file is a document a line instead: an object with a string under "text".
    """

    setting: str  # how the user asked for it, to begin errors with: "data.path='books'"
    name: str
    root: Path
    documents: list[list[str]]  # paths relative to root, with / between folders
    headed: bool = False  # a joined file begins with a "# path" line
    is_folder: bool = False  # all of root is read: other things than text are common in it, and are left out

    def files(self) -> Iterator[str]:
        return (file for document in self.documents for file in document)

    def would_read(self, path: Path) -> bool:
        """Whether a file of that path would be text of this source."""
        path, root = path.resolve(), self.root.resolve()
        return self.is_folder and path.is_relative_to(root) and not any(map(_is_hidden, path.relative_to(root).parts))

    def unreadable(self, file: str, error: OSError) -> ValueError:
        return ValueError(f"{self.setting}: {file} cannot be read: {error.strerror}")


def find_source(path: str | None) -> Source:
    """List the files of `data.path`, None being the standard library.

    Raises ValueError where there is no such path.
    """
    if path is None:
        return _standard_library(Path(sysconfig.get_path("stdlib")))
    setting, where = f"data.path={path!r}", os.path.abspath(os.path.expanduser(path))
    if not path or not os.path.lexists(where):
        raise ValueError(
            f"{setting} does not exist; give a text file, a folder of them, or null for Python's own library"
        )
    if os.path.isdir(where):
        files = [[file] for file in _walk(where, setting)]
        return Source(setting, os.path.basename(where) or where, Path(where), files, is_folder=True)
    if not os.path.isfile(where):
        raise ValueError(f"{setting} is neither a file nor a folder; give a text file or a folder of them")
    folder, file = os.path.split(where)
    return Source(setting, file, Path(folder), [[file]])


def _standard_library(root: Path) -> Source:
    """Every package one document and every single module one, in path order; tests are left out."""
    setting = "data.path=null (Python's standard library)"
    files = [name for name in _walk(root, setting, NOT_LIBRARY) if name.endswith(".py") and not _is_generated(name)]
    if not files:
        raise ValueError(f"{setting}: no source files in {root}; give data.path a text file or a folder of them")
    documents = [list(package) for _, package in groupby(files, key=lambda name: name.split("/")[0])]
    return Source(setting, f"standard library of Python {platform.python_version()}", root, documents, headed=True)


def _is_generated(name: str) -> bool:
    """True for what is written when Python is built, full of paths of the machine it was built on."""
    return name.startswith(("config-", "_sysconfigdata"))


def _walk(root: str | Path, setting: str, left_out: Container[str] = ()) -> list[str]:
    """Sorted paths of all files below root that are not hidden, nor in a folder that is, or whose name is left out."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"{setting}: {error.filename} cannot be read: {error.strerror}") from error

    names = []
    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not _is_hidden(name) and name not in left_out]
        paths = (os.path.join(folder, name) for name in files if not _is_hidden(name))
        names += [os.path.relpath(path, root) for path in paths if os.path.isfile(path)]
    return sorted(name.replace(os.sep, "/") for name in names)


def _is_hidden(name: str) -> bool:
    """True for the names of files and folders that are passed over in a folder."""
    return name.startswith(".") or name == "__pycache__"


def fingerprint(source: Source) -> str:
    """Changes with every change of a file: path, size, and the times of its last write and last change of any kind.

    The latter (ctime) cannot be set back, so that a copy that keeps the time of writing is noticed too.
    """
    digest = hashlib.sha256(os.fsencode(source.root))
    for document in source.documents:
        for file in document:
            stat = _stat(source, file)
            line = f"\0{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}\n"
            digest.update(os.fsencode(file) + line.encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _stat(source: Source, file: str) -> os.stat_result:
    try:
        return os.stat(source.root / file)
    except OSError as error:
        raise source.unreadable(file, error) from error


def check_text(source: Source) -> None:
    """Look at the first MiB of a file, or of a folder's files until one is text. Raises ValueError if none is."""
    files = [file for file in source.files() if _stat(source, file).st_size]
    if not files:
        raise ValueError(f"{source.setting} is empty; give a text file or a folder of them")
    reasons = []
    for file in files:
        if not (reason := why_not_text(source, file)):
            return
        reasons.append(reason)
    others = f" (and {len(reasons) - 1} other files are not text)" if len(reasons) > 1 else ""
    raise ValueError(f"{source.setting} is not text: {reasons[0]}{others}; give files in UTF-8")


def why_not_text(source: Source, file: str) -> str:
    """The reason why a file's first MiB is not text, or "" where it is."""
    try:
        with open(source.root / file, "rb") as raw:
            head = raw.read(SNIFF_BYTES)
        _decode(head, final=len(head) < SNIFF_BYTES)
    except OSError as error:
        raise source.unreadable(file, error) from error
    except ValueError as error:
        return f"{file} {error}"
    return ""


def _decode(raw: bytes, final: bool = True) -> str:
    """UTF-8 to text, line ends as they are, a byte order mark taken off; if not final, the last character may be cut.

    Raises ValueError with what is wrong, to be written behind the file's name.
    """
    if (nul := raw.find(0)) >= 0:
        raise ValueError(f"has a NUL byte at byte {nul}")
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(raw, final).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start}") from error


def without_binaries(source: Source) -> tuple[Source, list[str]]:
    """A folder's files that are text, and the names of the others: images and archives, say. Other sources as given."""
    others = {file for file in source.files() if source.is_folder and why_not_text(source, file)}
    documents = [document for document in source.documents if others.isdisjoint(document)]
    return replace(source, documents=documents), sorted(others)


def read_documents(source: Source) -> "IterableDataset":
    """A dataset with one column, "text", and a row a document, read as it is iterated over.

    It is a table in memory mapped lazily: unlike `load_dataset` that asks nothing of the network, and writes nothing
    into the library's own cache, whose keys do not see an edited function in an imported module.
    Iterating raises ValueError at a file that is not text.
    """
    from datasets import Dataset  # noqa: PLC0415 - takes more than a second, and a cached corpus does without it

    numbers = Dataset.from_dict({"document": range(len(source.documents))}).to_iterable_dataset()
    read = _Reader(source)
    return numbers.map(read, batched=True, batch_size=1, remove_columns=["document"])


@dataclass(frozen=True)
class _Reader:
    source: Source

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[str]]:
        return {"text": [text for number in batch["document"] for text in self.texts(self.source.documents[number])]}

    def texts(self, files: list[str]) -> list[str]:
        if len(files) == 1 and files[0].endswith(".jsonl"):
            return list(self.lines(files[0]))
        return ["\n".join(f"# {file}\n{self.read(file)}" if self.source.headed else self.read(file) for file in files)]

    def read(self, file: str) -> str:
        try:
            return _decode((self.source.root / file).read_bytes())
        except OSError as error:
            raise self.source.unreadable(file, error) from error
        except ValueError as error:
            raise ValueError(f"{self.source.setting} is not text: {file} {error}; give files in UTF-8") from error

    def lines(self, file: str) -> Iterator[str]:
        for number, line in enumerate(self.read(file).split("\n"), start=1):
            if line.strip():
                try:
                    text = json.loads(line)["text"]
                    text.encode()  # text only, without halves of surrogate pairs, which no tokenizer takes
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    wanted = 'a JSON object with a string under "text" is expected on every line'
                    raise ValueError(f"{self.source.setting}: {file}, line {number}: {wanted}") from error
                yield text
