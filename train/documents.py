"""Where text comes from: files, folders of them, a dataset of the Hugging Face hub, Python's own standard library."""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from ringspan.train.reading import (
    LINES,
    TABLES,
    Columns,
    DamagedError,
    Segment,
    Skipped,
    decoded,
    ended,
    file_segments,
    line_documents,
    noted,
    quiet,
    table_documents,
)

SNIFF_BYTES = 1 << 20  # what is read of a file to tell text from other things before all of it is read
HUB = "hub:"

# Folders beside or in the standard library: tests are many (19 of 31 MB) and odd on purpose; packages are not its own.
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


class Source(Protocol):
    """Documents that can be read again and again, in the same order."""

    @property
    def setting(self) -> str:
        """How the user asked for it, to begin errors with: data.path='books'."""
        ...

    @property
    def name(self) -> str: ...

    def fingerprint(self) -> str:
        """Changes with whatever changes a document."""
        ...

    def check(self) -> None:
        """Raises ValueError where a quick look finds no text."""
        ...

    def would_read(self, path: Path) -> bool:
        """Whether a file of that path would be part of this source."""
        ...

    def segments(self, columns: Columns, skipped: Skipped) -> Iterator[Segment]: ...


@dataclass(frozen=True)
class Files:
    """Files below `root`. Each entry of `documents` is one document, in one or several text files that are joined.

    A .jsonl file is a document a line instead, a .parquet or .arrow file one a row.
    """

    setting: str
    name: str
    root: Path
    documents: list[list[str]] = field(repr=False)  # paths relative to root, with / between folders
    headed: bool = False  # a joined file begins with a "# path" line
    is_folder: bool = False  # all of root is read

    def files(self) -> Iterator[str]:
        return (file for document in self.documents for file in document)

    def would_read(self, path: Path) -> bool:
        path, root = path.resolve(), self.root.resolve()
        return self.is_folder and path.is_relative_to(root) and not any(map(_is_hidden, path.relative_to(root).parts))

    def fingerprint(self) -> str:
        """Of paths, sizes, and the times of each file's last write and last change of any kind.

        The latter (ctime) cannot be set back, so that a copy that keeps the time of writing is noticed too.
        """
        digest = hashlib.sha256(os.fsencode(self.root) + bytes([self.headed]))
        for document in self.documents:
            for file in document:
                stat = self._stat(file)
                line = f"\0{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}\n"
                digest.update(os.fsencode(file) + line.encode())
            digest.update(b"\n")
        return digest.hexdigest()

    def check(self) -> None:
        """Look at the first MiB of a file, or of a folder's files until one can be read."""
        files = [file for file in self.files() if self._stat(file).st_size]
        if not files:
            raise ValueError(f"{self.setting} is empty; give a text file or a folder of them")
        reasons = []
        for file in files:
            if not (reason := self._why_not_text(file)):
                return
            reasons.append(reason)
        others = f" (and {len(reasons) - 1} other files are not text)" if len(reasons) > 1 else ""
        raise ValueError(f"{self.setting} is not text: {reasons[0]}{others}; give files in UTF-8")

    def segments(self, columns: Columns, skipped: Skipped) -> Iterator[Segment]:
        for document in self.documents:
            if not self.headed and not self._stat(document[0]).st_size:
                skipped.note(document[0], "is empty")
            elif document[0].endswith((*LINES, *TABLES)):
                yield from self._rows(document[0], columns, skipped)
            else:
                yield from ended(self._joined(document, skipped))

    def _rows(self, file: str, columns: Columns, skipped: Skipped) -> Iterator[Segment]:
        documents = line_documents if file.endswith(LINES) else table_documents
        try:
            yield from documents(self.root / file, columns, partial(_note, skipped, file))
        except OSError as error:
            raise self._unreadable(file, error) from error
        except DamagedError as error:
            skipped.note(file, str(error))

    def _joined(self, files: list[str], skipped: Skipped) -> Iterator[Segment]:
        before = ""
        for file in files:
            try:
                yield from file_segments(self.root / file, before + (f"# {file}\n" if self.headed else ""))
                before = "\n"
            except OSError as error:
                raise self._unreadable(file, error) from error
            except DamagedError as error:
                skipped.note(file, str(error))

    def _why_not_text(self, file: str) -> str:
        """The reason why a file's first MiB is not text, or "" where it is, or is a table."""
        try:
            if not file.endswith(tuple(TABLES)):
                for _ in decoded(self.root / file, limit=SNIFF_BYTES):
                    pass
        except OSError as error:
            raise self._unreadable(file, error) from error
        except DamagedError as error:
            return f"{file} {error}"
        return ""

    def _stat(self, file: str) -> os.stat_result:
        try:
            return os.stat(self.root / file)
        except OSError as error:
            raise self._unreadable(file, error) from error

    def _unreadable(self, file: str, error: OSError) -> ValueError:
        return ValueError(f"{self.setting}: {file} cannot be read: {error.strerror}")


def _note(skipped: Skipped, file: str, what: str, why: str) -> None:
    skipped.note(f"{file} {what}", why)


@dataclass(frozen=True)
class Hub:
    """A dataset of the Hugging Face hub. Its rows are taken as they are when it is first prepared."""

    setting: str
    name: str  # OWNER/NAME
    config: str | None
    split: str
    streaming: bool  # false: downloaded as a whole first, into the cache of `datasets`

    def fingerprint(self) -> str:
        """Of the name alone: a prepared dataset needs no network."""
        return hashlib.sha256(repr((self.name, self.config, self.split)).encode()).hexdigest()

    def check(self) -> None:
        """Asks the hub for the first row."""
        for _ in self._asked():
            return
        raise ValueError(f"{self.setting} is empty")

    def would_read(self, path: Path) -> bool:
        return False

    def segments(self, columns: Columns, skipped: Skipped) -> Iterator[Segment]:
        for number, row in enumerate(self._asked()):
            yield from noted(row, columns, f"row {number}", skipped.note)

    def _asked(self) -> Iterator[Any]:
        """Its rows. Raises ValueError, in a line, where the hub does not give them."""
        from datasets import load_dataset  # noqa: PLC0415 - takes more than a second, and files do without it

        try:
            with quiet("datasets"), quiet("huggingface_hub"):
                yield from load_dataset(self.name, self.config, split=self.split, streaming=self.streaming)
        except Exception as error:  # without a network: OSErrors, its own, httpx's, RuntimeErrors of a closed client
            raise ValueError(
                f"{self.setting}: the hub does not give it ({type(error).__name__}: {' '.join(str(error).split())}); "
                "look at the name, hub:OWNER/NAME:CONFIG:SPLIT, and at the network, or give files"
            ) from error


def find_source(path: str | None, streaming: bool = True) -> Source:
    """What `data.path` means, None being the standard library. Raises ValueError where there is no such path."""
    if path is None:
        return _standard_library(Path(sysconfig.get_path("stdlib")))
    setting, where = f"data.path={path!r}", os.path.abspath(os.path.expanduser(path))
    if path.startswith(HUB):
        return _hub(setting, path.removeprefix(HUB), streaming)
    if not path or not os.path.lexists(where):
        raise ValueError(
            f"{setting} does not exist; give a text file, a folder of them, hub:OWNER/NAME, or null for Python's own "
            "library"
        )
    if os.path.isdir(where):
        return Files(setting, os.path.basename(where) or where, Path(where), _documents(where, setting), is_folder=True)
    if not os.path.isfile(where):
        raise ValueError(f"{setting} is neither a file nor a folder; give a text file or a folder of them")
    folder, file = os.path.split(where)
    return Files(setting, file, Path(folder), [[file]])


def _hub(setting: str, name: str, streaming: bool) -> Hub:
    parts = name.split(":")
    if not parts[0] or len(parts) > 3:
        raise ValueError(f"{setting}: give hub:OWNER/NAME, hub:OWNER/NAME:CONFIG or hub:OWNER/NAME:CONFIG:SPLIT")
    config, split = ([*parts[1:], ""][0] or None), ([*parts[2:], "train"][0])
    return Hub(setting, parts[0], config, split, streaming)


def _documents(folder: str, setting: str) -> list[list[str]]:
    files = _walk(folder, setting)
    saved = {os.path.dirname(file) for file in files if os.path.basename(file) == "dataset_info.json"}
    # Dataset.save_to_disk leaves two JSON files beside its .arrow files, which are not text
    files = [file for file in files if not (file.endswith(".json") and os.path.dirname(file) in saved)]
    return [[file] for file in files]


def _standard_library(root: Path) -> Files:
    """Every package one document and every single module one, in path order; tests are left out."""
    setting = "data.path=null (Python's standard library)"
    files = [name for name in _walk(root, setting, NOT_LIBRARY) if name.endswith(".py") and not _is_generated(name)]
    if not files:
        raise ValueError(f"{setting}: no source files in {root}; give data.path a text file or a folder of them")
    documents = [list(package) for _, package in groupby(files, key=lambda name: name.split("/")[0])]
    return Files(setting, f"standard library of Python {platform.python_version()}", root, documents, headed=True)


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
