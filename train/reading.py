"""Files and rows to segments of documents, a bounded part of them in memory at a time; what cannot be read is noted.

A document is the segments up to one with `last`. Each is tokenised by itself, so that a long text is cut, at the ends
of lines, into parts that several processes tokenise at once. Empty documents are none.
"""

import codecs
import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SEGMENT_CHARACTERS = 1 << 20  # longer texts are cut
READ_BYTES = 1 << 22  # of a file at once
NAMED = 1000  # names kept of what was left out; the count goes on
TRAINED_ROLE = "assistant"  # of a chat's turns, those whose tokens are labels
TABLES = {".parquet": "parquet", ".arrow": "arrow"}  # suffixes of files and what `datasets` calls their formats
LINES = (".jsonl", ".ndjson")


class Segment(NamedTuple):
    content: str | np.ndarray  # text, or token ids: int64 (tokens,)
    trained: bool | np.ndarray = True  # whether its tokens are labels; of token ids, bool (tokens,)
    last: bool = False  # of its document


class Unreadable(str, Enum):
    """What becomes of files and rows that cannot be read."""

    skip = "skip"  # left out, named and counted
    refuse = "refuse"  # the first one ends the preparation


class DamagedError(ValueError):
    """A file that cannot be read to its end; the message is to be written behind its name."""


@dataclass(frozen=True)
class Columns:
    """Where rows of tables, JSONL files and hub datasets have a document."""

    content: str = "text"  # text, a list of token ids, or a list of chat turns {"role": ..., "content": ...}
    mask: str | None = None  # beside token ids: a list of as many 0 and 1; 0 is no label


@dataclass
class Skipped:
    """What is left out of a source, in the order it is met."""

    setting: str  # to begin an error with: "data.path='books'"
    refuse: bool = False
    names: list[str] = field(default_factory=list)
    count: int = 0
    first: str = ""  # of them, with the reason

    def note(self, what: str, why: str) -> None:
        """Raises ValueError where nothing may be left out."""
        if self.refuse:
            raise ValueError(f"{self.setting}: {what} {why}; mend or remove it, or give data.unreadable=skip")
        self.first = self.first or f"{what} {why}"
        self.count += 1
        if len(self.names) < NAMED:
            self.names.append(what)


def ended(segments: Iterable[Segment]) -> Iterator[Segment]:
    """The segments of one document that are not empty, the last one marked."""
    held: Segment | None = None
    for segment in segments:
        if len(segment.content):
            if held is not None:
                yield held
            held = segment
    if held is not None:
        yield held._replace(last=True)


def text_segments(parts: Iterable[str], trained: bool = True) -> Iterator[Segment]:
    """A text that comes in parts, in segments of SEGMENT_CHARACTERS or less, cut behind line ends where it has any."""
    held = ""
    for part in parts:
        held += part
        while len(held) > SEGMENT_CHARACTERS:
            stop = held.rfind("\n", 0, SEGMENT_CHARACTERS) + 1 or SEGMENT_CHARACTERS
            yield Segment(held[:stop], trained)
            held = held[stop:]
    yield Segment(held, trained)


def decoded(path: Path, limit: int | None = None) -> Iterator[str]:
    """A file's text, a part of READ_BYTES at a time; line ends as they are, a byte order mark taken off.

    limit: bytes to look at; the last character may then be cut.
    Raises DamagedError and OSError.
    """
    decoder, at = codecs.getincrementaldecoder("utf-8")(), 0
    with open(path, "rb") as file:
        while True:
            raw = file.read(READ_BYTES if limit is None else min(READ_BYTES, limit - at))
            pending = len(decoder.getstate()[0])
            if (nul := raw.find(0)) >= 0:
                raise DamagedError(f"has a NUL byte at byte {at + nul}")
            try:
                text = decoder.decode(raw, final=not raw and at != limit)
            except UnicodeDecodeError as error:
                raise DamagedError(f"is not UTF-8 at byte {at - pending + error.start}") from error
            yield text.removeprefix("\ufeff") if at == 0 else text
            at += len(raw)
            if not raw:
                return


def file_segments(path: Path, before: str) -> Iterator[Segment]:
    """A text file's segments, `before` in front. Raises DamagedError before the first of them, or never; OSError."""
    if path.stat().st_size <= READ_BYTES:
        text: Iterable[str] = list(decoded(path))
    else:
        for _ in decoded(path):  # to its end, so that no half of a file is taken: 100 times quicker than tokenizers
            pass
        text = decoded(path)
    yield from text_segments(chain([before], text))


def line_documents(path: Path, columns: Columns, note: Callable[[str, str], None]) -> Iterator[Segment]:
    """A document a line of a JSONL file. A line that is none is noted as "line 3"."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)
            except (ValueError, RecursionError):
                note(f"line {number}", "is not JSON")
                continue
            yield from noted(row, columns, f"line {number}", note)


def table_documents(path: Path, columns: Columns, note: Callable[[str, str], None]) -> Iterator[Segment]:
    """A document a row of a Parquet or Arrow file, a batch at a time. Raises DamagedError where that breaks off."""
    import pyarrow  # noqa: PLC0415 - as datasets, below
    from datasets import load_dataset  # noqa: PLC0415 - takes more than a second, and text files do without it
    from datasets.exceptions import DatasetsError  # noqa: PLC0415

    number = 0
    with tempfile.TemporaryDirectory() as cache, quiet("datasets"):  # else it leaves files in the user's cache
        try:
            rows = load_dataset(
                TABLES[path.suffix], data_files=[str(path)], split="train", streaming=True, cache_dir=cache
            )
            for row in rows:
                yield from noted(row, columns, f"row {number}", note)
                number += 1
            if not number:
                raise DamagedError("has no rows")
        except (pyarrow.ArrowException, DatasetsError, OSError, EOFError) as error:
            said = " ".join(str(error).split())
            raise DamagedError(f"is damaged: {number:,} rows could be read, then: {said}") from error


@contextmanager
def quiet(logger: str) -> Iterator[None]:
    """A library tells by its log what it then raises, or draws bars."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def noted(row: Any, columns: Columns, what: str, note: Callable[[str, str], None]) -> Iterator[Segment]:
    """The row's document, or a note why there is none."""
    try:
        segments = list(ended(row_segments(row, columns)))
    except ValueError as error:
        note(what, str(error))
        return
    if not segments:
        note(what, "is empty")
    yield from segments


def row_segments(row: Any, columns: Columns) -> Iterator[Segment]:
    """Raises ValueError with what is wrong, to be written behind the row's number."""
    if not isinstance(row, dict) or columns.content not in row:
        there = f"; it has {', '.join(map(str, row))}" if isinstance(row, dict) and row else ""
        raise ValueError(f'has no "{columns.content}" (data.column){there}')
    value = row[columns.content]
    if columns.mask is not None:
        yield _ids(value, columns.content, _mask_of(row, columns.mask))
    elif isinstance(value, str):
        yield from _text(value, True)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield from _chat(value)
    elif isinstance(value, list):
        yield _ids(value, columns.content, None)
    else:
        raise ValueError(f'has no text, token ids or chat turns under "{columns.content}", but {type(value).__name__}')


def _text(text: str, trained: bool) -> Iterator[Segment]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"has half of a surrogate pair at character {error.start}") from error
    yield from text_segments((text[at : at + READ_BYTES] for at in range(0, len(text), READ_BYTES)), trained)


def _chat(turns: list[Any]) -> Iterator[Segment]:
    """A line "<|role|>", then what was said; the latter is trained on where the role is TRAINED_ROLE."""
    for turn in turns:
        said = turn if isinstance(turn, dict) else {}
        role, content = said.get("role"), said.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError('has a chat turn without text under "role" and "content"')
        yield from _text(f"<|{role}|>\n", False)
        yield from _text(f"{content}\n", role == TRAINED_ROLE)


def _mask_of(row: dict[str, Any], name: str) -> list[Any]:
    if not isinstance(mask := row.get(name), list):
        raise ValueError(f'has no list under "{name}" (data.mask_column)')
    return mask


def _ids(value: Any, name: str, mask: list[Any] | None) -> Segment:
    if not isinstance(value, list) or not all(type(token) is int and 0 <= token < 1 << 32 for token in value):
        raise ValueError(f'has something else than token ids under "{name}"')
    if mask is None:
        return Segment(np.array(value, np.int64), np.ones(len(value), bool))
    if len(mask) != len(value) or any(one not in (0, 1) for one in mask):
        raise ValueError(f"has a mask of {len(mask)} values for {len(value)} tokens, or others than 0 and 1")
    return Segment(np.array(value, np.int64), np.array(mask, bool))
