"""What a step is fed: this rank's shards of its rows with the plans of their masks, made one step ahead."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ringspan.kernels.spans import Spans
from ringspan.parallel.attention import SequenceAttention
from ringspan.parallel.ring import RingPlan
from ringspan.train.packing import PackedRows


class MicroBatch(NamedTuple):
    tokens: Tensor  # int64 (rows, positions of this rank), as are labels and positions
    labels: Tensor  # shifted already; -100 where there is none
    positions: Tensor  # in the document
    ring_plan: RingPlan
    attended: int  # (query, key) pairs of one head, over the whole of its rows


class Batches:
    """The micro-batches of each step on this rank: row r of a step belongs to data group r % data."""

    def __init__(
        self, rows: PackedRows, attend: SequenceAttention, micro_batch: int, accumulation: int, device: torch.device
    ) -> None:
        self.rows, self.attend, self.device = rows, attend, device
        self.micro_batch = micro_batch
        self.rows_of_a_step = micro_batch * accumulation * attend.mesh.data
        self.positions = attend.local_positions(rows.seq_len).numpy()

    def load(self, rows_seen: int) -> list[MicroBatch]:
        """Those of the step after ``rows_seen`` rows. Reads this rank's shards alone; no rank is talked to."""
        mesh = self.attend.mesh
        mine = self.rows.order(rows_seen, self.rows_of_a_step)[mesh.data_rank :: mesh.data]
        return [self._assemble(mine[i : i + self.micro_batch]) for i in range(0, len(mine), self.micro_batch)]

    def _assemble(self, rows: list[int]) -> MicroBatch:
        shards = torch.from_numpy(np.array([self.rows.load(row, self.positions) for row in rows]))
        if self.device.type == "cuda":
            shards = shards.pin_memory()
        tokens, labels, positions = shards.to(self.device, non_blocking=True).unbind(dim=1)
        spans = Spans.packed([self.rows.lengths(row) for row in rows])
        ring_plan = self.attend.plan(spans, self.device)
        return MicroBatch(tokens, labels, positions, ring_plan, int(spans.pairs().sum()))


class Prefetch:
    """``load(rows_seen)`` of the next step in a background thread, while this one is computed."""

    def __init__(self, load: Callable[[int], list[MicroBatch]], device: torch.device) -> None:
        self.load, self.device = load, device
        self.thread = ThreadPoolExecutor(max_workers=1, initializer=self._enter)
        self.at: int | None = None
        self.coming: Future[list[MicroBatch]] | None = None

    def _enter(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a thread starts on device 0

    def take(self, rows_seen: int, then: int) -> list[MicroBatch]:
        """The step after ``rows_seen`` rows; the one after ``then`` rows is begun."""
        coming = self.coming if self.at == rows_seen else None
        taken = (coming or self.thread.submit(self.load, rows_seen)).result()
        self.at, self.coming = then, self.thread.submit(self.load, then)
        return taken

    def close(self) -> None:
        self.thread.shutdown(cancel_futures=True)
