"""What a run is measured by besides its own loss: text that it is not trained on, and needles in long rows.

Loss, bits a byte, loss by position in the document: a model that uses its context predicts late tokens better than
early ones. Needles by depth and length: whether it finds what is far away.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ringspan.parallel.attention import SequenceAttention
from ringspan.train.measured import Measured
from ringspan.train.needle import DEPTHS, NEEDLES, SHORTEST, Questions
from ringspan.train.packing import IGNORE, Rows
from ringspan.train.rows import Text
from ringspan.train.step import Batches, MicroBatch

BLANK = -1  # the row that has nothing but padding
LENGTHS = (16, 8, 4, 2, 1)  # needles are looked for in rows of seq_len over these

# (loss, whether the likeliest token is the label) of each label of a micro-batch, both (B, S)
TokenLosses = Callable[[MicroBatch], tuple[Tensor, Tensor]]


@dataclass(kw_only=True)
class EvaluationConfig:
    every: int = 0  # steps between evaluations, and one at the end; 0: none
    rows: int = 16  # of held-out text, and of needles at each length

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("rows", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"evaluation.{name}={getattr(self, name)}: must be {least} or more")


class Once:
    """The first n of some rows, in the order of training, then blank ones: ranks may take more than there are."""

    def __init__(self, rows: Rows, n: int):
        self.rows, self.seq_len = rows, rows.seq_len
        self.taken = rows.order(0, min(n, len(rows)))

    def __len__(self) -> int:
        return len(self.taken)

    def order(self, rows_seen: int, n: int) -> list[int]:
        return [self.taken[i] if i < len(self) else BLANK for i in range(rows_seen, rows_seen + n)]

    def lengths(self, row: int) -> list[int]:
        return [self.seq_len] if row == BLANK else self.rows.lengths(row)

    def load(self, row: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if row != BLANK:
            return self.rows.load(row, positions)
        return np.zeros_like(positions), np.full_like(positions, IGNORE), np.maximum(positions, 0)


class Evaluation:
    """Made and called by all ranks together, for rows of one length."""

    def __init__(
        self,
        config: EvaluationConfig,
        text: Text,
        seq_len: int,
        attend: SequenceAttention,
        micro_batch: int,
        device: torch.device,
    ):
        self.config, self.text, self.device = config, text, device

        def batches(rows: Rows) -> Batches:
            return Batches(Once(rows, config.rows), attend, micro_batch, 1, device)

        held_out = text.held_out(seq_len) if config.every else None
        self.held_out = None if held_out is None else batches(held_out)
        wanted = LENGTHS if config.every and text.config.needles else ()
        lengths = [seq_len // part for part in wanted if seq_len // part >= SHORTEST]
        needles = [text.needles(seq_len, 0, length) for length in lengths]
        self.needles = [(length, rows, batches(rows)) for length, rows in zip(lengths, needles, strict=True)]
        self.starts = range_starts(seq_len, device)

    def due(self, step: int, steps: int) -> bool:
        return bool(self.config.every) and (step % self.config.every == 0 or step == steps)

    def measure(self, token_losses: TokenLosses) -> Measured:
        measured = Measured()
        if self.held_out:
            measured.loss, measured.by_position = loss_by_position(self.held_out, self.starts, token_losses)
            if tokens_per_byte := self.text.tokens_per_byte():
                measured.bits_per_byte = measured.loss * tokens_per_byte / math.log(2)
        measured.needles = {
            length: found_by_depth(rows, batches, token_losses) for length, rows, batches in self.needles
        }
        return measured


def range_starts(seq_len: int, device: torch.device) -> Tensor:
    """Of the ranges that positions are counted in, two for each doubling: int64."""
    starts = sorted({start for k in range(64) for start in (2**k, 3 * 2**k // 2) if start < seq_len})
    return torch.tensor([0, *starts], device=device)


def loss_by_position(
    batches: Batches, starts: Tensor, token_losses: TokenLosses
) -> tuple[float, list[tuple[int, float]]]:
    """(loss of a label, the same of each range of positions that has labels, by where it starts), over all ranks."""
    sums = torch.zeros(2, len(starts), dtype=torch.float64, device=starts.device)  # of losses, labels
    for mb in micro_batches(batches):
        losses, _ = token_losses(mb)
        labelled = mb.labels != IGNORE
        where = torch.bucketize(mb.positions[labelled], starts, right=True) - 1
        sums[0].index_add_(0, where, losses[labelled].double())
        sums[1].index_add_(0, where, torch.ones_like(where, dtype=torch.float64))
    totals, counts = summed(sums).tolist()
    each = zip(starts.tolist(), totals, counts, strict=True)
    return sum(totals) / max(1, sum(counts)), [(start, total / n) for start, total, n in each if n]


def found_by_depth(rows: Questions, batches: Batches, token_losses: TokenLosses) -> list[float]:
    """Share of the needles at each depth that are found: each token of the answer is the likeliest one.

    ``batches`` are those of ``rows``; the tokens of an answer may be on several ranks.
    """
    mesh, (first, size) = batches.attend.mesh, rows.questions
    counts = []  # of each micro-batch: of every row's questions, the tokens that are the likeliest, and all
    for mb in micro_batches(batches):
        _, hits = token_losses(mb)
        row, column = (mb.labels != IGNORE).nonzero(as_tuple=True)
        question = (mb.positions[row, column] - first) // size
        count = torch.zeros(2, mesh.data, len(mb.labels), NEEDLES, dtype=torch.float64, device=mb.labels.device)
        for of_all, what in zip(count, (hits[row, column], torch.ones_like(row)), strict=True):
            of_all[mesh.data_rank].index_put_((row, question), what.double(), accumulate=True)
        counts.append(count)
    right, asked = summed(torch.stack(counts, dim=1)).flatten(1, -2)
    shares = ((right == asked) & (asked > 0)).sum(dim=0) / (asked > 0).sum(dim=0)
    return [shares[question].item() for question in np.argsort(DEPTHS)]


def micro_batches(batches: Batches) -> Iterator[MicroBatch]:
    """All that there are, one forward after the other; every rank has as many."""
    for seen in range(0, len(batches.rows), batches.rows_of_a_step):
        yield from batches.load(seen)


def summed(values: Tensor) -> Tensor:
    """Over all ranks, each of which has labels of its own."""
    dist.all_reduce(values)
    return values
