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
from ringspan.train.needle import DEPTHS, NEEDLES, SHORTEST
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
        self.needles = [(length, batches(text.needles(seq_len, 0, length))) for length in lengths]
        starts = sorted({start for k in range(64) for start in (2**k, 3 * 2**k // 2) if start < seq_len})
        self.starts = torch.tensor([0, *starts], device=device)  # of the ranges that positions are counted in

    def due(self, step: int, steps: int) -> bool:
        return bool(self.config.every) and (step % self.config.every == 0 or step == steps)

    def measure(self, token_losses: TokenLosses) -> Measured:
        measured = Measured()
        if self.held_out:
            sums, counts = self._by_position(self.held_out, token_losses)
            measured.loss = sum(sums) / max(1, sum(counts))
            if tokens_per_byte := self.text.tokens_per_byte():
                measured.bits_per_byte = measured.loss * tokens_per_byte / math.log(2)
            each = zip(self.starts.tolist(), sums, counts, strict=True)
            measured.by_position = [(start, total / n) for start, total, n in each if n]
        measured.needles = {length: self._found(length, rows, token_losses) for length, rows in self.needles}
        return measured

    def _found(self, length: int, batches: Batches, token_losses: TokenLosses) -> list[float]:
        """Share of the needles at each depth that are found."""
        counts = torch.zeros(2, NEEDLES, dtype=torch.float64, device=self.device)  # found, asked for
        depths = torch.from_numpy(DEPTHS).to(self.device)
        for mb in micro_batches(batches):
            _, hits = token_losses(mb)
            labelled = mb.labels != IGNORE
            depth = depths[(mb.positions[labelled] - (length - 2 * NEEDLES)) // 2]
            counts[0].index_add_(0, depth, hits[labelled].double())
            counts[1].index_add_(0, depth, torch.ones_like(depth, dtype=torch.float64))
        found, asked = summed(counts)
        return (found / asked).tolist()

    def _by_position(self, batches: Batches, token_losses: TokenLosses) -> tuple[list[float], list[float]]:
        """(sum of losses, labels) of each range of positions, over all ranks."""
        sums = torch.zeros(2, len(self.starts), dtype=torch.float64, device=self.device)
        for mb in micro_batches(batches):
            losses, _ = token_losses(mb)
            labelled = mb.labels != IGNORE
            where = torch.bucketize(mb.positions[labelled], self.starts, right=True) - 1
            sums[0].index_add_(0, where, losses[labelled].double())
            sums[1].index_add_(0, where, torch.ones_like(where, dtype=torch.float64))
        totals, counts = summed(sums).tolist()
        return totals, counts


def micro_batches(batches: Batches) -> Iterator[MicroBatch]:
    """All that there are, one forward after the other; every rank has as many."""
    for seen in range(0, len(batches.rows), batches.rows_of_a_step):
        yield from batches.load(seen)


def summed(values: Tensor) -> Tensor:
    """Over all ranks, each of which has labels of its own."""
    dist.all_reduce(values)
    return values
