"""What a step is fed: this rank's shards of its rows with the plans of their masks, made one step ahead."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ringspan.kernels.spans import Spans
from ringspan.parallel.attention import SequenceAttention
from ringspan.parallel.layout import Layout
from ringspan.parallel.parts import within
from ringspan.train.packing import Rows


class MicroBatch(NamedTuple):
    tokens: Tensor  # int64 (rows, positions of this rank), as are labels and positions
    labels: Tensor  # shifted already; -100 where there is none
    positions: Tensor  # in the document
    ring_plan: Any  # what the model needs of its mask
    attended: float  # (query, key) pairs of one head, the mean of the layers, over the whole of its rows
    imbalance: float  # how much longer than its mean rank the ring computes: see `lockstep_imbalance`


class Batches:
    """The micro-batches of each step on this rank: row r of a step belongs to data group r % data."""

    def __init__(
        self, rows: Rows, attend: SequenceAttention, micro_batch: int, accumulation: int, device: torch.device
    ) -> None:
        self.rows, self.attend, self.device = rows, attend, device
        self.micro_batch = micro_batch
        self.rows_of_a_step = micro_batch * accumulation * attend.mesh.data

    def load(self, rows_seen: int) -> list[MicroBatch]:
        """Those of the step after ``rows_seen`` rows. Reads this rank's shards alone; no rank is talked to."""
        return [self._assemble(rows) for rows in self.rows_after(rows_seen)]

    def rows_after(self, rows_seen: int) -> list[list[int]]:
        """The rows of each micro-batch of the step after ``rows_seen`` rows."""
        mesh = self.attend.mesh
        mine = self.rows.order(rows_seen, self.rows_of_a_step)[mesh.data_rank :: mesh.data]
        return [mine[i : i + self.micro_batch] for i in range(0, len(mine), self.micro_batch)]

    def layout(self, rows: list[int]) -> tuple[Spans, Layout]:
        """The mask of a micro-batch of these rows, and where its positions are: one layout for all rows."""
        spans = Spans.packed([self.rows.lengths(row) for row in rows])
        return spans, self.attend.layout(spans)

    def facts(self, rows_seen: int) -> dict[str, float]:
        """Of the first micro-batch after ``rows_seen`` rows, for a log's reader."""
        rows = self.rows_after(rows_seen)[0]
        spans, layout = self.layout(rows)
        return {
            "tokens_of_a_rank": len(rows) * layout.part_rows(self.attend.mesh.ulysses),
            "chunks_of_a_rank": max(map(len, layout.chunks)),
            "ring_imbalance": round(self.attend.imbalance(spans, layout), 4),
        }

    def _assemble(self, rows: list[int]) -> MicroBatch:
        spans, layout = self.layout(rows)
        mine = self.attend.local_positions(layout).numpy()
        shards = torch.from_numpy(np.array([self.rows.load(row, mine) for row in rows]))
        if self.device.type == "cuda":
            shards = shards.pin_memory()
        tokens, labels, positions = shards.to(self.device, non_blocking=True).unbind(dim=1)
        ring_plan = self.attend.plans(spans, self.device, layout)
        imbalance = self.attend.imbalance(spans, layout)
        return MicroBatch(tokens, labels, positions, ring_plan, self.attend.pairs(spans), imbalance)


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

    @within("data")
    def take(self, rows_seen: int, then: int) -> list[MicroBatch]:
        """The step after ``rows_seen`` rows; the one after ``then`` rows is begun."""
        coming = self.coming if self.at == rows_seen else None
        taken = (coming or self.thread.submit(self.load, rows_seen)).result()
        self.at, self.coming = then, self.thread.submit(self.load, then)
        return taken

    def close(self) -> None:
        self.thread.shutdown(cancel_futures=True)
