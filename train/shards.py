"""Segments of documents to shards of tokens, in several processes; killed at any time, the next one goes on.

    write_shards(folder, segments, partial(load_tokenizer, "bytes"), workers=8, told=lambda shard: None)

Segments go to the processes in units of UNIT_CHARACTERS or a little more, and come back as tokens in the same order,
so that the files do not depend on how many processes there are or on when one was killed.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from ringspan.train.corpus import Shard
from ringspan.train.files import replace
from ringspan.train.reading import Segment
from ringspan.train.tokenizer import Tokenizer

UNIT_CHARACTERS = 1 << 20  # of text, tokenised by one process at once: less than a second, so that all end together
SHARD_TOKENS = 1 << 24  # what a kill may cost, and what is opened at once; a shard ends with the unit that reaches it
UNITS_AHEAD = 2  # for each process: enough that none waits, and memory stays bounded
TOKEN_CHARACTERS = 4  # what a token counts as where documents are token ids already


class Unit(NamedTuple):
    """Tokens of some segments."""

    tokens: np.ndarray  # of the corpus's dtype (tokens,)
    mask: np.ndarray | None  # uint8 (tokens,), 0 where a token is no label; None where all are
    ends: np.ndarray  # int64 (documents that end here,), behind which token
    bytes: np.ndarray  # int64 (documents that end here,), of their text in this unit
    open_bytes: int  # of the text behind the last end
    segments: int


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write_shards(
    folder: Path,
    segments: Iterable[Segment],
    load: Callable[[], Tokenizer],
    *,
    workers: int = 1,
    told: Callable[[Shard], None] = lambda shard: None,
) -> list[Shard]:
    """Tokenise into an existing folder, going on behind the whole shards that it has. Returns all shards.

    load: gives the tokenizer, in each process anew; picklable
    told: is called with each shard when it is written, or found
    Raises ValueError where a token id is not in the tokenizer's vocabulary.
    """
    shards = whole_shards(folder)
    for shard in shards:
        told(shard)
    todo = islice(segments, sum(shard.segments for shard in shards), None)
    writer = Writer(folder, len(shards), shards[-1].open_bytes if shards else 0)
    with tokenised(units(todo), load, workers) as done:
        for unit in done:
            if shard_ := writer.add(unit):
                shards.append(shard_)
                told(shard_)
    if shard_ := writer.finish():
        shards.append(shard_)
        told(shard_)
    return shards


def whole_shards(folder: Path) -> list[Shard]:
    """The shards that are there from the first on; what follows the first that is missing or damaged is deleted."""
    shards: list[Shard] = []
    while True:
        file = folder / f"{len(shards):05}.json"
        try:
            shard = Shard(**json.loads(file.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            break
        if not shard.is_whole(folder):
            break
        shards.append(shard)
    kept = {path.name for shard in shards for path in (*shard.files(folder), folder / f"{shard.name}.json")}
    for path in folder.iterdir():
        if path.name[:5].isdigit() and path.name not in kept:
            path.unlink()
    return shards


@dataclass
class Writer:
    """Units to shards, one after the other."""

    folder: Path
    number: int  # of the next shard
    open_bytes: int  # of the document that the shard before has left open
    units: list[Unit] = field(default_factory=list)

    def add(self, unit: Unit) -> Shard | None:
        """The shard that the unit has filled."""
        self.units.append(unit)
        return self.finish() if sum(len(unit.tokens) for unit in self.units) >= SHARD_TOKENS else None

    def finish(self) -> Shard | None:
        """The shard of what is left, its record written last."""
        if not self.units:
            return None
        name, sizes = f"{self.number:05}", [len(unit.tokens) for unit in self.units]
        starts = np.cumsum([0, *sizes[:-1]])
        ends = np.concatenate([unit.ends + start for unit, start in zip(self.units, starts, strict=True)])
        parts = {
            "tokens": [unit.tokens for unit in self.units],
            "documents": [np.stack([ends, self._bytes()], axis=1).astype("<i8")],
        }
        if masked := any(unit.mask is not None for unit in self.units):
            parts["mask"] = [np.ones(len(u.tokens), np.uint8) if u.mask is None else u.mask for u in self.units]
        digest = hashlib.sha256()
        for kind, arrays in parts.items():
            with open(self.folder / f"{name}.{kind}", "wb") as file:
                for raw in (array.tobytes() for array in arrays):
                    file.write(raw)
                    digest.update(raw)
        shard = Shard(
            name=name,
            tokens=sum(sizes),
            documents=len(ends),
            segments=sum(unit.segments for unit in self.units),
            open_bytes=self.open_bytes,
            masked=masked,
            sha256=digest.hexdigest(),
        )
        replace(self.folder / f"{name}.json", json.dumps(asdict(shard)) + "\n")
        self.number, self.units = self.number + 1, []
        return shard

    def _bytes(self) -> np.ndarray:
        """Of each document that ends in the shard; `open_bytes` becomes those of the one that does not."""
        found = [np.empty(0, np.int64)]
        for unit in self.units:
            counted = unit.bytes.copy()
            if len(counted):
                counted[0] += self.open_bytes
                self.open_bytes = 0
            self.open_bytes += unit.open_bytes
            found.append(counted)
        return np.concatenate(found)


def units(segments: Iterable[Segment]) -> Iterator[list[Segment]]:
    unit: list[Segment] = []
    size = 0
    for segment in segments:
        unit.append(segment)
        size += len(segment.content) * (1 if isinstance(segment.content, str) else TOKEN_CHARACTERS)
        if size >= UNIT_CHARACTERS:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


@contextmanager
def tokenised(todo: Iterator[list[Segment]], load: Callable[[], Tokenizer], workers: int) -> Iterator[Iterator[Unit]]:
    """The units' tokens in order. With one worker, or one unit, in this process."""
    first = list(islice(todo, 2))
    if workers == 1 or len(first) < 2:
        tokenizer = load()
        yield (tokenise(tokenizer, unit) for unit in chain(first, todo))
        return
    # Never fork: this process may have threads, and a GPU. The processes leave with it, however it is killed.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (load,))
    try:
        yield _in_order(pool, chain(first, todo), workers * UNITS_AHEAD)
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, todo: Iterable[list[Segment]], ahead: int) -> Iterator[Unit]:
    coming: deque[Future[Unit]] = deque()
    try:
        for unit in todo:
            with script_hidden():  # a process may be started here
                coming.append(pool.submit(_tokenise_here, unit))
            if len(coming) >= ahead:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a process that tokenises died, for want of memory perhaps: give data.workers a lower number"
        ) from error


@contextmanager
def script_hidden() -> Iterator[None]:
    """Processes that are started here do not import the script that runs, for which torch and Hydra take seconds."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


_tokenizer: list[Tokenizer] = []  # of this process, if it is one of a pool: an initializer has no other way to give


def _start(load: Callable[[], Tokenizer]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many processes as cores already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which ends these
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _tokenizer.append(load())


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _tokenise_here(unit: list[Segment]) -> Unit:
    return tokenise(_tokenizer[0], unit)


def tokenise(tokenizer: Tokenizer, unit: list[Segment]) -> Unit:
    """Ids of all segments, and `end_of_document` behind the last one of each document unless it ends with that."""
    texts = iter(tokenizer.encode([segment.content for segment in unit if isinstance(segment.content, str)]))
    ids = [next(texts) if isinstance(one.content, str) else _known(one.content, tokenizer) for one in unit]
    closing = [one.last and not _is_closed(one, mine, tokenizer) for one, mine in zip(unit, ids, strict=True)]
    stops = np.cumsum([len(mine) + more for mine, more in zip(ids, closing, strict=True)])
    tokens = np.empty(stops[-1], token_dtype(tokenizer.vocab_size))
    mask = None if all(one.trained is True for one in unit) else np.ones(len(tokens), np.uint8)
    for one, mine, more, stop in zip(unit, ids, closing, stops.tolist(), strict=True):
        start = stop - len(mine) - more
        tokens[start : start + len(mine)] = mine
        if more:
            tokens[stop - 1] = tokenizer.end_of_document
        if mask is not None:
            mask[start : stop - more] = one.trained
            mask[stop - more : stop] = np.asarray(one.trained).flat[-1]
    sizes = [len(one.content.encode()) if isinstance(one.content, str) else 0 for one in unit]
    last = np.array([one.last for one in unit])
    document = np.cumsum(last) - last  # of each segment, from 0 in this unit
    counted = np.bincount(document, weights=sizes, minlength=int(last.sum()) + 1).astype(np.int64)
    return Unit(
        tokens=tokens,
        mask=None if mask is None or mask.all() else mask,
        ends=stops[last].astype(np.int64),
        bytes=counted[: int(last.sum())],
        open_bytes=int(counted[int(last.sum()) :].sum()),
        segments=len(unit),
    )


def _is_closed(segment: Segment, ids: np.ndarray, tokenizer: Tokenizer) -> bool:
    return not isinstance(segment.content, str) and ids[-1] == tokenizer.end_of_document


def _known(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    if ids.max() >= tokenizer.vocab_size:
        raise ValueError(
            f"token id {ids.max()} in the text, and data.tokenizer knows {tokenizer.vocab_size}: give the tokenizer "
            "that made the ids"
        )
    return ids
