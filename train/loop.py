"""The loop: from a checked configuration, on a process group that is there, to a trained model and its curve."""

from __future__ import annotations

import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ringspan.parallel.attention import SequenceAttention
from ringspan.parallel.mesh import Mesh
from ringspan.parallel.workers import under_torchrun
from ringspan.train import checkpoint
from ringspan.train.corpus import Corpus
from ringspan.train.data import prepare
from ringspan.train.engine import Engine
from ringspan.train.metrics import RunLog, flops_per_step, plain, record
from ringspan.train.model import GPT, Activations
from ringspan.train.optim import learning_rate
from ringspan.train.packing import PackedRows
from ringspan.train.step import Batches, MicroBatch, Prefetch

if TYPE_CHECKING:
    from ringspan.train.config import TrainConfig  # which needs LoopConfig

Value = TypeVar("Value")


class Backend(str, Enum):
    auto = "auto"  # the fastest that can run: hopper, triton, torch
    torch = "torch"
    triton = "triton"
    hopper = "hopper"


@dataclass(kw_only=True)
class LoopConfig:
    micro_batch: int = 1  # rows of each data group in one forward
    accumulation: int = 1  # forwards of one update
    activations: Activations = Activations.keep  # what a layer keeps for backward
    attention: Backend = Backend.auto
    log_every: int = 1  # steps
    save_every: int = 0  # steps between checkpoints; 0: only at the end

    def __post_init__(self) -> None:
        for name, least in (("micro_batch", 1), ("accumulation", 1), ("log_every", 1), ("save_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"train.{name}={getattr(self, name)}: must be {least} or more")


def train(config: TrainConfig, run_dir: str) -> float:
    """Train to ``config.steps``, all ranks of the default group together; the last step's loss.

    SIGTERM and SIGINT end the step, save and raise SystemExit(0). ValueError: data, a checkpoint or sizes that do not
    fit, or a loss that is no longer finite.
    """
    with signals() as stop:
        trainer = Trainer(config, run_dir)
        try:
            return trainer.run(stop)
        finally:
            trainer.close()


class StepResult(NamedTuple):
    loss_sum: Tensor  # of this rank's tokens, on the device
    tokens: Tensor  # label tokens of all ranks, on the device
    grad_norm: float  # of the whole gradient, before clipping
    attended: int  # pairs in the rows of this data group


class Trainer:
    """One run: ``done`` is how far it has come, and all of its state besides the engine's."""

    def __init__(self, config: TrainConfig, run_dir: str) -> None:
        self.config, self.run_dir, self.device = config, run_dir, pick_device()
        self.mesh = Mesh.create(*config.parallel.sizes(dist.get_world_size()), self.device.type)
        self.corpus = Corpus(from_rank_zero(lambda: prepare(config.data)))
        self.vocab_size = -(-self.corpus.vocab_size // 64) * 64  # matrix products are quickest at multiples of 64
        self.resumed = from_rank_zero(lambda: checkpoint.find(run_dir, config.resume))
        self.done = self.start_or_resume()
        self.attend = SequenceAttention(self.mesh, config.parallel.layout.value, config.train.attention.value)
        self.picked = self.attend.pick(self.query())  # ValueError: a backend that cannot run here
        self.engine = Engine(self.build, config.engine, config.optim, config.train.accumulation, self.device)
        if self.resumed:
            self.engine.load(self.resumed)
        rows = PackedRows(self.corpus, config.seq_len, config.seed, config.data.cross_document)
        self.batches = Batches(rows, self.attend, config.train.micro_batch, config.train.accumulation, self.device)
        self.prefetch = Prefetch(self.batches.load, self.device)
        self.log = RunLog(run_dir, config, rank=dist.get_rank(), first_step=self.done.step)
        self.log.banner(self.facts())
        self.logged_step = self.done.step
        self.seconds = self.data_seconds = 0.0  # of the steps since then

    def start_or_resume(self) -> checkpoint.Saved:
        """ValueError: the checkpoint is of another shape than this run; told before any model is built."""
        c = self.config
        fresh = checkpoint.Saved(
            step=0,
            tokens=0,
            rows_seen=0,
            loss=math.nan,
            world=self.mesh.world,
            zero=c.engine.zero,
            dtype=str(c.engine.resolve(self.device.type)),
            vocab_size=self.vocab_size,
            config=plain(asdict(c)),
        )
        if self.resumed is None:
            return fresh
        saved = checkpoint.read(self.resumed)
        checkpoint.require_same(saved, fresh, self.resumed)
        return replace(saved, config=fresh.config)

    def query(self) -> Tensor:
        """One like those that attention will see."""
        m, dtype = self.config.model, self.config.engine.resolve(self.device.type)
        return torch.empty(1, 1, m.n_heads, m.head_dim, dtype=dtype, device=self.device)

    def facts(self) -> dict[str, Any]:
        """What a reader of the log has to know; told once."""
        c, m = self.config, self.config.model
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {
            "corpus": f"{self.corpus.name}, {len(self.corpus.tokens):,} tokens, {len(self.batches.rows):,} rows"
            + (f", {len(self.corpus.skipped):,} files left out, not being text" if self.corpus.skipped else ""),
            "unigram_entropy": round(self.corpus.unigram_entropy, 4),
            "model": {"parameters": self.engine.parameters, "in_matrices": m.matmul_parameters(self.vocab_size)},
            "mesh": {"data": self.mesh.data, "ring": self.mesh.ring, "ulysses": self.mesh.ulysses},
            "attention": self.picked,
            "engine": {"device": device, "dtype": str(self.engine.dtype), "zero": c.engine.zero},
            "step": {
                "rows": self.batches.rows_of_a_step,
                "tokens": self.batches.rows_of_a_step * c.seq_len,
                "tokens_of_a_rank": c.train.micro_batch * len(self.batches.positions),
            },
            "resumed": str(self.resumed) if self.resumed else "no",
        }

    def build(self, device: torch.device, dtype: torch.dtype) -> GPT:
        c = self.config
        return GPT(c.model, self.vocab_size, self.attend, c.train.activations, seed=c.seed, device=device, dtype=dtype)

    def run(self, stop: Callable[[], bool]) -> float:
        c = self.config
        while self.done.step < c.steps:
            result = self.timed_step()
            if self.done.step % c.train.log_every == 0 or self.done.step == c.steps:
                self.log_step(result)
            if any_rank(stop()) and self.done.step < c.steps:
                self.leave()
            if self.done.step == c.steps or (c.train.save_every and self.done.step % c.train.save_every == 0):
                self.save()
        self.log.verdict(self.done.loss, self.corpus.unigram_entropy)
        return self.done.loss

    def timed_step(self) -> StepResult:
        started = time.perf_counter()
        result = self.step()
        self.seconds += time.perf_counter() - started  # the gradient's norm has waited for the device
        return result

    def step(self) -> StepResult:
        micro_batches = self.next_micro_batches()
        tokens = self.count_labels_no_sync(micro_batches)
        loss_sum = self.accumulate(micro_batches, tokens)
        grad_norm = self.engine.step(self.lr())
        self.require_finite("gradient norm", grad_norm)
        self.advance()
        return StepResult(loss_sum, tokens, grad_norm, sum(mb.attended for mb in micro_batches))

    def next_micro_batches(self) -> list[MicroBatch]:
        started = time.perf_counter()
        seen = self.done.rows_seen
        micro_batches = self.prefetch.take(seen, then=seen + self.batches.rows_of_a_step)
        self.data_seconds += time.perf_counter() - started
        return micro_batches

    def count_labels_no_sync(self, micro_batches: list[MicroBatch]) -> Tensor:
        """Of all ranks: every label is on one rank of its data group, so each counts once."""
        tokens = torch.stack([(mb.labels >= 0).sum() for mb in micro_batches]).sum()
        dist.all_reduce(tokens)
        return tokens.clamp_(min=1)  # a step of padding alone has a loss of 0, not of 0 / 0

    def accumulate(self, micro_batches: list[MicroBatch], tokens: Tensor) -> Tensor:
        """Forward and backward of each; this rank's sum of token losses."""
        loss_sum = torch.zeros((), device=self.device)
        for number, mb in enumerate(micro_batches, start=1):
            loss = self.engine.loss_sum(mb.tokens, mb.labels, mb.positions, mb.ring_plan)
            self.engine.backward(loss, tokens, last=number == len(micro_batches))
            loss_sum += loss.detach()
        return loss_sum

    def lr(self) -> float:
        return learning_rate(self.config.optim, self.done.step + 1, self.config.steps)

    def require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise ValueError(
                f"step {self.done.step + 1}: the {what} is {value}; lower optim.lr (now {self.config.optim.lr}) or "
                "raise optim.warmup_steps"
            )

    def advance(self) -> None:
        self.done.step += 1
        self.done.rows_seen += self.batches.rows_of_a_step
        self.done.tokens += self.batches.rows_of_a_step * self.config.seq_len

    def log_step(self, result: StepResult) -> None:
        loss, attended = self.totals(result)
        self.require_finite("loss", loss)
        self.done.loss = loss
        c, rows, steps = self.config, self.batches.rows_of_a_step, self.done.step - self.logged_step
        flops = flops_per_step(
            c.model.matmul_parameters(self.vocab_size),
            rows * c.seq_len,
            n_layers=c.model.n_layers,
            n_heads=c.model.n_heads,
            head_dim=c.model.head_dim,
            attended=attended,
        )
        self.log.step(
            record(
                step=self.done.step,
                tokens=self.done.tokens,
                loss=loss,
                grad_norm=result.grad_norm,
                lr=learning_rate(c.optim, self.done.step, c.steps),
                step_tokens=rows * c.seq_len,
                step_flops=flops,
                step_seconds=self.seconds / steps,
                data_seconds=self.data_seconds / steps,
                world=self.mesh.world,
                device=self.device,
            )
        )
        self.seconds, self.data_seconds, self.logged_step = 0.0, 0.0, self.done.step

    def totals(self, result: StepResult) -> tuple[float, int]:
        """(loss a label token, attended pairs) of the step, over all ranks. Waits for the device."""
        sums = torch.tensor([0.0, result.attended], dtype=torch.float64, device=self.device)
        sums[0] = result.loss_sum / result.tokens
        dist.all_reduce(sums)
        loss, attended = sums.tolist()
        return loss, round(attended / (self.mesh.ring * self.mesh.ulysses))  # each rank of a data group counts its rows

    def save(self) -> Path:
        return checkpoint.save(self.engine, self.run_dir, self.done)

    def leave(self) -> NoReturn:
        """All ranks have agreed to stop here."""
        path = self.save()
        self.log.say(f"stopped after step {self.done.step}, saved {path}; to go on: {resume_command(self.config)}")
        raise SystemExit(0)

    def close(self) -> None:
        self.prefetch.close()
        self.log.close()


def pick_device() -> torch.device:
    """What the process group is for: this rank's GPU under NCCL, else the CPU."""
    if "nccl" in dist.get_backend_config():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def from_rank_zero(make: Callable[[], Value]) -> Value:
    """``make()`` of rank 0 on every rank; a ValueError too."""
    box: list[tuple[Value | None, str | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            box = [(make(), None)]
        except ValueError as error:
            box = [(None, str(error))]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    value, mistake = box[0]
    if mistake is not None:
        raise ValueError(mistake)
    return cast(Value, value)


def any_rank(flag: bool) -> bool:
    """Whether it is so on any rank: then all leave at the same step. On the CPU, beside what a GPU does."""
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


@contextmanager
def signals() -> Iterator[Callable[[], bool]]:
    """The first SIGTERM or SIGINT makes the function it gives return True, the second raises SystemExit."""
    received: list[int] = []

    def hear(number: int, _: object) -> None:
        received.append(number)
        if len(received) > 1:
            raise SystemExit(128 + number)

    before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resume_command(config: TrainConfig) -> str:
    """The command that this process was started by, in the same folder again, whatever the run's name was made of."""
    ours = {"name": config.name, "run_dir": config.run_dir}
    if {"-m", "--multirun"} & set(sys.argv):
        return f"the job's own values, without -m, and run_dir={shlex.quote(config.run_dir)}"
    kept = [argument for argument in sys.argv[1:] if argument.partition("=")[0] not in (*ours, "resume")]
    start = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"] if under_torchrun() else ["python"]
    return shlex.join([*start, sys.argv[0], *kept, *(f"{name}={value}" for name, value in ours.items())])
