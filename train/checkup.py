"""check=true: whether a run could start, found out in seconds, on the processes that it would run on.

The configuration has been checked by then (train/config.py). Here the ranks talk to each other as they would in
training, the data is opened, and memory is counted against the machine's. Rank 0 prints a line for each.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_group, _set_pg_timeout

from ringspan.parallel.mesh import Mesh
from ringspan.parallel.transport import Lane, open_lane
from ringspan.parallel.ulysses import to_heads, to_positions
from ringspan.train import budget
from ringspan.train.agree import from_rank_zero, of_every_rank
from ringspan.train.corpus import is_corpus
from ringspan.train.data import DataConfig, prepared_folder, text_folder
from ringspan.train.documents import find_source
from ringspan.train.initial import find_weights
from ringspan.train.loop import attention_of, pick_device
from ringspan.train.needle import IDS
from ringspan.train.reading import Columns, Skipped, Unreadable
from ringspan.train.rows import Text
from ringspan.train.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from ringspan.train.config import TrainConfig

ANSWER_SECONDS = 60  # NCCL's first connection takes some; who has not answered by then is not reached
SEGMENTS = 8  # read of text that has not been tokenised yet: 8 MiB at most
KEYS = 64  # of a rank, that go round
NETWORK = "where hosts have several networks, name one: NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0"


def checkup(config: TrainConfig, stream: TextIO | None = None) -> None:
    """All ranks of the default group together. ValueError: what would not do, when all has been looked at."""
    _set_pg_timeout(timedelta(seconds=ANSWER_SECONDS), _get_default_group())
    run = _Run(config, stream or sys.stdout)
    looks = (run.configuration, run.communication, run.data, run.memory)  # each needs those before it
    failed = [look.__name__ for look in looks if not run.tells(look.__name__, look)]
    if failed:
        raise ValueError(f"check=true: this run would fail, by its {' and its '.join(failed)}; see above")


class Opened(NamedTuple):
    words: str
    folders: list[Path]  # of tokens that are there already
    vocab_size: int


class _Run:
    def __init__(self, config: TrainConfig, stream: TextIO) -> None:
        self.config, self.stream, self.device = config, stream, pick_device()
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.vocab_size: int | None = None

    def tells(self, name: str, look: Callable[[], str]) -> bool:
        """Whether no rank finds a mistake there; rank 0 prints what was found."""
        words, mistake = "", None
        try:
            words = look()
        except ValueError as error:
            mistake = str(error)
        except RuntimeError as error:  # the ranks do not reach each other, and could not agree on anything more
            raise ValueError(f"{name}: {' '.join(str(error).split())}; {NETWORK}") from error
        mistake = next((one for one in of_every_rank(mistake) if one), None)
        if self.rank == 0:
            print(f"{name:<14}{'FAILED' if mistake else 'ok':<8}{mistake or words}", file=self.stream, flush=True)
        return mistake is None

    def configuration(self) -> str:
        c = self.config
        size = c.model.matmul_parameters(vocab_size=0) / 1e6
        return f"{size:,.2f} M parameters in layers, {c.steps:,} steps, rows of {c.seq_len:,} tokens"

    def communication(self) -> str:
        """An all-reduce over all ranks, an exchange on each ring and one between ranks that trade heads."""
        c, started = self.config, time.perf_counter()
        hosts = len(set(of_every_rank(socket.gethostname())))
        mesh = Mesh.create(*c.parallel.sizes(self.world), self.device.type)
        attend, picked = attention_of(c, mesh, self.device)
        self.add_up()
        pass_on(mesh, attend.transport, self.device)
        trade(mesh, self.device)
        where = f"{self.world} processes on {hosts} host{'s' if hosts > 1 else ''}"
        axes = f"data {mesh.data} x ring {mesh.ring} x ulysses {mesh.ulysses}"
        ways = ", ".join(f"{name} {value}" for name, value in picked.items())
        return f"{where}, {axes}: all have answered, {time.perf_counter() - started:.1f} s; {ways}"

    def add_up(self) -> None:
        total = torch.tensor(self.rank + 1.0, device=self.device)
        dist.all_reduce(total)
        if total.item() != self.world * (self.world + 1) / 2:
            raise ValueError(f"rank {self.rank}: an all-reduce of rank + 1 gave {total.item()} of {self.world} ranks")

    def data(self) -> str:
        opened = from_rank_zero(lambda: open_data(self.config))
        first = find_weights(self.config.init, self.config.model)
        self.vocab_size = first.vocab_size if first else self.config.model.vocabulary(opened.vocab_size)
        for path in (*opened.folders, Path(self.config.run_dir)):
            if not path.is_dir():
                raise ValueError(
                    f"{socket.gethostname()} does not find {path}: data.path, data.cache and run_dir have to be on a "
                    "file system that all hosts share"
                )
        return opened.words

    def memory(self) -> str:
        if self.vocab_size is None:
            raise ValueError("not counted, as the size of the vocabulary is the data's")
        job = budget.job_of(self.config, self.world, self.vocab_size, self.device.type)
        machine = budget.machine_here(self.device, self.world)
        words = budget.in_words(job, machine)
        if not budget.budget(job, machine).fits:
            raise ValueError(words.removeprefix("WARNING: "))
        return words


def pass_on(mesh: Mesh, transport: str, device: torch.device) -> None:
    """Keys to the next rank of the ring, over the wire that training would take. ValueError: others arrive."""
    if mesh.ring == 1:
        return
    to, source = (mesh.ring_rank + 1) % mesh.ring, (mesh.ring_rank - 1) % mesh.ring
    keys = torch.full((1, KEYS, 1, 8), float(mesh.ring_rank), device=device)
    lane = open_lane(transport, mesh.ring_group, device, Lane("check", 1, keys.nbytes))
    exchange = lane.exchange((keys, -keys), to, KEYS, source, "the exchange of check=true")
    came = exchange.wait()
    right = bool((came[0] == source).all()) and bool((came[1] == -source).all())
    exchange.done()
    if not right:
        raise ValueError(f"rank {mesh.ring_rank} of a ring got other keys than rank {source} has sent over {transport}")


def trade(mesh: Mesh, device: torch.device) -> None:
    """Heads for positions, and back. ValueError: they are not the same then."""
    x = torch.randn(1, KEYS, mesh.ulysses, 8, device=device)
    if not torch.equal(to_positions(to_heads(x, mesh.ulysses_group), mesh.ulysses_group), x):
        raise ValueError(f"rank {mesh.ulysses_rank} of those that trade heads got others back than it gave")


def open_data(config: TrainConfig) -> Opened:
    """The first row of each length, where the text is tokenised; else the first tokens. ValueError: there are none."""
    sources = config.data.sources()
    folders = [folder for one in sources if (folder := tokenised(one))]
    if len(folders) < len(sources):
        words = "; ".join(first_tokens(one) for one in sources if not tokenised(one))
        size = load_tokenizer(config.data.tokenizer).vocab_size + (IDS if config.data.needles else 0)
        return Opened(words, folders, size)
    text = Text(folders, config.data)
    text.held_out(config.seq_len)
    lengths = dict.fromkeys([config.seq_len, *(phase.seq_len for phase in config.phases)])
    rows = ", ".join(first_row(text, seq_len, config.seed) for seq_len in lengths)
    return Opened(f"{text.name}, {text.tokens:,} tokens; {rows}", folders, text.vocab_size)


def tokenised(config: DataConfig) -> Path | None:
    """The folder of a source's tokens, if they are there already."""
    if prepared := prepared_folder(config):
        return prepared
    folder = text_folder(config, find_source(config.path, config.streaming))
    return folder if is_corpus(folder) else None


def first_row(text: Text, seq_len: int, seed: int) -> str:
    rows = text.rows(seq_len, seed)
    (row,) = rows.order(0, 1)
    labels = rows.load(row, np.arange(seq_len))[1]
    return f"{len(rows):,} rows of {seq_len:,}, the first with {int((labels >= 0).sum()):,} labels"


def first_tokens(config: DataConfig) -> str:
    """Of text that the run will tokenise when it starts."""
    source, tokenizer = find_source(config.path, config.streaming), load_tokenizer(config.tokenizer)
    skipped = Skipped(source.setting, config.unreadable is Unreadable.refuse)
    tokens = 0
    for segment in islice(source.segments(Columns(config.column, config.mask_column), skipped), SEGMENTS):
        ids = tokenizer.encode([segment.content])[0] if isinstance(segment.content, str) else segment.content
        if len(ids) and int(ids.max()) >= tokenizer.vocab_size:
            raise ValueError(
                f"{source.setting} has token {int(ids.max())}, and data.tokenizer={config.tokenizer!r} knows "
                f"{tokenizer.vocab_size}; give the tokenizer of those tokens"
            )
        tokens += len(ids)
    if not tokens:
        raise ValueError(f"{source.setting}: there is no text in it; left out: {skipped.first or 'nothing'}")
    return f"{source.name}: its first {tokens:,} tokens; the start of the run, or launch/prepare.py, makes the others"
