"""The loop: from a checked configuration, on a process group that is there, to a trained model and its curve."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ringspan.kernels.attention import refusal
from ringspan.parallel.attention import SequenceAttention
from ringspan.parallel.mesh import Mesh
from ringspan.train import budget, checkpoint, manifest
from ringspan.train.agree import any_rank, from_rank_zero, of_every_rank
from ringspan.train.checkpoint import Checkpointer
from ringspan.train.data import prepare
from ringspan.train.engine import Engine, deterministic
from ringspan.train.evaluate import Evaluation
from ringspan.train.facts import facts
from ringspan.train.health import Spikes, report, watched
from ringspan.train.initial import open_weights
from ringspan.train.layer import CompileClock
from ringspan.train.meter import Meter
from ringspan.train.metrics import flops_per_step, plain, record
from ringspan.train.optim import learning_rate
from ringspan.train.phases import Phase, phase_at
from ringspan.train.profiling import Profiler
from ringspan.train.rows import Text
from ringspan.train.run_log import RunLog
from ringspan.train.step import Batches, MicroBatch, Prefetch
from ringspan.train.stopping import resume_command, signals
from ringspan.train.watchdog import Watchdog

if TYPE_CHECKING:
    from ringspan.train.config import TrainConfig  # which needs LoopConfig


def train(config: TrainConfig, run_dir: str) -> float:
    """Train to ``config.steps``, all ranks of the default group together; the last step's loss.

    SIGTERM, SIGINT and the wall-clock limit end the step, save and raise SystemExit(0). ValueError: data, a checkpoint
    or sizes that do not fit, a GPU's memory among them, a folder that cannot be written, or gradients that are no
    longer finite.
    """
    with signals() as stop, deterministic(config.deterministic), closing(watchdog(config, run_dir)) as watch:
        torch.manual_seed(config.seed)  # checkpoints hold torch's random states
        trainer = Trainer(config, run_dir, watch)
        try:
            with trainer.memory_explained():
                return trainer.run(stop)
        finally:
            trainer.close()


def watchdog(config: TrainConfig, run_dir: str) -> Watchdog:
    store, world = dist.distributed_c10d._get_default_store(), dist.get_world_size()
    return Watchdog(Path(run_dir, "hang"), config.train.hang_seconds, store, rank=dist.get_rank(), world=world)


class StepResult(NamedTuple):
    loss_sum: Tensor  # of this rank's tokens, on the device
    tokens: Tensor  # label tokens of all ranks, on the device
    grad_norm: float  # of the whole gradient, before clipping
    imbalance: float  # of the ring, mean of this data group's micro-batches


class Trainer:
    """One run: ``done`` is how far it has come, and all of its state besides the engine's."""

    def __init__(self, config: TrainConfig, run_dir: str, watch: Watchdog) -> None:
        self.config, self.run_dir, self.watch, self.device = config, run_dir, watch, pick_device()
        self.started = time.monotonic()
        self.mesh = Mesh.create(*config.parallel.sizes(dist.get_world_size()), self.device.type)
        self.text = Text(from_rank_zero(lambda: prepare(config.data)), config.data)
        self.initial = open_weights(config.init, config.model, self.text.vocab_size)
        self.vocab_size = self.initial.vocab_size if self.initial else config.model.vocabulary(self.text.vocab_size)
        self.resumed, self.refused = checkpoint.choose(run_dir, config.resume)
        self.changes: list[str] = []  # of the configuration since the checkpoint
        self.done = self.start_or_resume()
        size = 12 * config.model.parameters(self.vocab_size)  # bytes of a checkpoint: weights and two moments, in fp32
        from_rank_zero(lambda: checkpoint.check_writable(run_dir, size))
        self.attend, self.picked = attention_of(config, self.mesh, self.device)
        self.compiling = CompileClock()
        self.job = budget.job_of(config, self.mesh.world, self.vocab_size, self.device.type)
        self.machine = budget.machine_here(self.device, self.mesh.world)
        with self.memory_explained():
            make = config.model.maker(config, self.vocab_size, self.attend)
            self.engine = Engine(make, config.engine, config.optim, config.train.accumulation, self.device)
        if self.resumed:
            checkpoint.load(self.engine.state, self.resumed, self.device)
        elif self.initial:
            self.engine.state.restore(self.initial, [], {})
        t = config.train
        self.checkpoints = Checkpointer(run_dir, keep=t.keep, every=t.keep_every, best=t.keep_best)
        for phase in config.phases:
            self.text.rows(phase.seq_len, config.seed)  # ValueError: a later phase would find no document
        self.first_phase = Phase(seq_len=config.seq_len)
        self.enter(phase_at(config.phases, self.first_phase, self.done.step))
        self.log = RunLog(run_dir, config, rank=dist.get_rank(), first_step=self.done.step)
        self.log.banner(facts(self))
        self.profiler = Profiler(config.profile, run_dir, self.device, self.log.say)
        self.meter = Meter(self.device, self.engine.state)
        self.skipped_in_a_row, self.spikes = 0, Spikes()

    def memory_explained(self) -> AbstractContextManager[None]:
        return budget.explained(self.job, self.machine, lambda: f"step {self.done.step + 1}")

    def start_or_resume(self) -> checkpoint.Saved:
        """ValueError: the checkpoint is of another shape than this run; told before any model is built."""
        c = self.config
        fresh = checkpoint.Saved(
            step=0,
            tokens=0,
            rows_seen=0,
            loss=math.nan,
            skipped=0,
            mesh={"data": self.mesh.data, "ring": self.mesh.ring, "ulysses": self.mesh.ulysses},
            zero=c.engine.zero,
            dtype=str(c.engine.resolve(self.device.type)),
            vocab_size=self.vocab_size,
            data=self.text.digest,
            config=plain(asdict(c)),
        )
        if self.resumed is None:
            return fresh
        saved = manifest.read_manifest(self.resumed).saved
        self.changes = manifest.require_same(saved, fresh, self.resumed)
        told = ("step", "tokens", "rows_seen", "loss", "skipped")
        return replace(fresh, **{name: getattr(saved, name) for name in told})

    def enter(self, phase: Phase) -> None:
        """Make ready for rows of a phase's length."""
        c, t = self.config, self.config.train
        rows = self.text.rows(phase.seq_len, c.seed)
        self.phase, self.batches = phase, Batches(rows, self.attend, t.micro_batch, t.accumulation, self.device)
        self.prefetch = Prefetch(self.batches.load, self.device)
        cast(Any, self.engine.model).expect(phase.seq_len, phase.rope_base)
        self.evaluation = Evaluation(c.evaluation, self.text, phase.seq_len, self.attend, t.micro_batch, self.device)

    def follow_phases(self) -> None:
        """The phase of the step to come. It starts with its first row, also after a checkpoint that lies before it."""
        phase = phase_at(self.config.phases, self.first_phase, self.done.step)
        if 0 < phase.step == self.done.step:
            self.done.rows_seen = 0
        if phase is not self.phase:
            self.prefetch.close()
            self.enter(phase)
            rows = len(self.batches.rows)
            self.log.say(f"step {self.done.step + 1}: rows of {phase.seq_len:,} tokens from here on, {rows:,} of them")

    def run(self, stop: Callable[[], bool]) -> float:
        c = self.config
        while self.done.step < c.steps:
            result = self.timed_step()
            if self.logs(self.done.step):
                self.log_step(result)
            if self.evaluation.due(self.done.step, c.steps):
                self.evaluate()
            if any_rank(stop() or self.out_of_time()) and self.done.step < c.steps:
                self.leave()
            if self.done.step == c.steps or (c.train.save_every and self.done.step % c.train.save_every == 0):
                self.save()
        self.finish_saving()
        self.log.verdict(self.done.loss, self.text.unigram_entropy)
        return self.done.loss

    def logs(self, step: int) -> bool:
        return step % self.config.train.log_every == 0 or step == self.config.steps

    def timed_step(self) -> StepResult:
        step = self.done.step + 1
        with self.profiler.step(step), self.meter.step(logged=self.logs(step)):
            result = self.step()
        if seconds := self.compiling.news():
            self.log.say(f"step {self.done.step}: {seconds:.1f} s of it were torch.compile's")
        self.watch.settle()
        return result

    def step(self) -> StepResult:
        self.follow_phases()
        micro_batches = self.next_micro_batches()
        tokens = self.count_labels_no_sync(micro_batches)
        loss_sum = self.accumulate(micro_batches, tokens)
        grad_norm = self.update()
        self.count_skipped(grad_norm, micro_batches, tokens)
        self.meter.count(self.tokens_of_a_step, sum(mb.attended for mb in micro_batches))
        self.advance()
        imbalance = sum(mb.imbalance for mb in micro_batches) / len(micro_batches)
        return StepResult(loss_sum, tokens, grad_norm, imbalance)

    def next_micro_batches(self) -> list[MicroBatch]:
        self.watch.at(f"step {self.done.step + 1}: data")
        seen = self.done.rows_seen
        with self.meter.timed("data"):
            return self.prefetch.take(seen, then=seen + self.batches.rows_of_a_step)

    def count_labels_no_sync(self, micro_batches: list[MicroBatch]) -> Tensor:
        """Of all ranks: every label is on one rank of its data group, so each counts once."""
        tokens = torch.stack([(mb.labels >= 0).sum() for mb in micro_batches]).sum()
        dist.all_reduce(tokens)
        return tokens.clamp_(min=1)  # a step of padding alone has a loss of 0, not of 0 / 0

    def accumulate(self, micro_batches: list[MicroBatch], tokens: Tensor) -> Tensor:
        """Forward and backward of each; this rank's sum of token losses."""
        loss_sum = torch.zeros((), device=self.device)
        for number, mb in enumerate(micro_batches, start=1):
            self.watch.at(f"step {self.done.step + 1}: forward and backward {number} of {len(micro_batches)}")
            loss = self.engine.loss_sum(mb.tokens, mb.labels, mb.positions, mb.ring_plan)
            if number == 1:
                self.meter.see("forward")
            self.engine.backward(loss, tokens, last=number == len(micro_batches))
            loss_sum += loss.detach()
        self.meter.see("backward")
        return loss_sum

    def lr(self) -> float:
        return learning_rate(self.config.optim, self.done.step + 1, self.config.steps)

    def update(self) -> float:
        self.watch.at(f"step {self.done.step + 1}: update")
        return self.engine.step(self.lr())

    def count_skipped(self, grad_norm: float, micro_batches: list[MicroBatch], tokens: Tensor) -> None:
        """ValueError: too many steps in a row had no finite gradient, which the engine then leaves out."""
        if math.isfinite(grad_norm):
            self.skipped_in_a_row = 0
            return
        self.done.skipped += 1
        self.skipped_in_a_row += 1
        self.log.say(f"step {self.done.step + 1}: the gradient norm is {grad_norm}; the step is skipped")
        if self.skipped_in_a_row >= self.config.train.skip_limit:
            raise ValueError(self.examine(micro_batches, tokens))

    def examine(self, micro_batches: list[MicroBatch], tokens: Tensor) -> str:
        """Compute the step again, looking at each layer; what was found, after it has been written down."""
        step, seen = self.done.step + 1, []
        for mb, rows in zip(micro_batches, self.batches.rows_after(self.done.rows_seen), strict=True):
            with watched(self.engine.model) as layers:
                loss = self.engine.loss_sum(mb.tokens, mb.labels, mb.positions, mb.ring_plan)
                self.engine.backward(loss, tokens, last=mb is micro_batches[-1])
            seen.append({"rows": rows, "loss_sum": str(loss.item()), "layers": layers})
        path = Path(self.run_dir, f"not-finite-{step:08d}.json")
        ranks, facts = of_every_rank(seen), {"step": step, "lr": self.lr(), "label_tokens": int(tokens)}
        where = from_rank_zero(lambda: report(path, facts, ranks))
        return (
            f"step {step}: the gradient norm is not finite, in {self.skipped_in_a_row} steps in a row ({where}); "
            f"lower optim.lr (now {self.config.optim.lr}) or raise optim.warmup_steps"
        )

    @property
    def tokens_of_a_step(self) -> int:
        return self.batches.rows_of_a_step * self.phase.seq_len

    def advance(self) -> None:
        self.done.step += 1
        self.done.rows_seen += self.batches.rows_of_a_step
        self.done.tokens += self.tokens_of_a_step

    def log_step(self, result: StepResult) -> None:
        tokens, pairs = self.meter.work()
        loss, attended, imbalance, exposed = self.totals(result, pairs)
        self.done.loss = loss if math.isfinite(loss) else self.done.loss
        if spike := self.spikes.see(loss):
            self.log.say(f"step {self.done.step}: {spike}")
        c, sizes = self.config, self.config.model.sizes
        flops = flops_per_step(
            c.model.matmul_parameters(self.vocab_size),
            tokens,
            n_layers=sizes.n_layers,
            n_heads=sizes.n_heads,
            head_dim=sizes.head_dim,
            attended=attended,
            frozen=c.model.frozen_parameters,
        )
        self.log.step(
            record(
                step=self.done.step,
                tokens=self.done.tokens,
                loss=loss,
                grad_norm=result.grad_norm,
                lr=learning_rate(c.optim, self.done.step, c.steps),
                step_tokens=tokens,
                step_flops=flops,
                exposed_comm_seconds=exposed,
                ring_imbalance=imbalance,
                skipped=self.done.skipped,
                memory=self.meter.memory(),
                world=self.mesh.world,
                device=self.device,
                **self.meter.take(),
            )
        )

    def evaluate(self) -> None:
        self.watch.at(f"step {self.done.step}: evaluation", slow=True)
        measured = self.evaluation.measure(
            lambda mb: self.engine.token_losses(mb.tokens, mb.labels, mb.positions, mb.ring_plan)
        )
        self.log.evaluation(self.done.step, self.done.tokens, measured)

    def totals(self, result: StepResult, pairs: float) -> tuple[float, float, float, float]:
        """(loss a label token, attended pairs, mean imbalance, a rank's seconds of exposed communication) of the step,
        over all ranks, of which this one's data group has so many ``pairs``. Waits for the device."""
        here = [0.0, pairs, result.imbalance, self.meter.exposed_seconds()]
        sums = torch.tensor(here, dtype=torch.float64, device=self.device)
        sums[0] = result.loss_sum / result.tokens
        dist.all_reduce(sums)
        loss, attended, imbalance, exposed = sums.tolist()
        sharing = self.mesh.ring * self.mesh.ulysses  # each rank of a data group counts its rows
        return loss, attended / sharing, imbalance / self.mesh.world, exposed / self.mesh.world

    def save(self) -> None:
        """Begin a checkpoint. Where the one before has failed the run goes on: it has what it had."""
        with self.meter.timed("save"):
            self.watch.at(f"step {self.done.step}: the checkpoint before this one", slow=True)
            if problem := self.checkpoints.wait():
                self.log.say(f"{problem}; training goes on")
            self.checkpoints.begin(self.engine.state, self.device, self.done)

    def finish_saving(self) -> None:
        """ValueError: the last checkpoint is not whole."""
        self.watch.at("the last checkpoint", slow=True)
        if problem := self.checkpoints.wait():
            raise ValueError(problem)

    def out_of_time(self) -> bool:
        hours = self.config.train.max_hours
        return bool(hours) and time.monotonic() - self.started > 3600 * hours

    def leave(self) -> NoReturn:
        """All ranks have agreed to stop here."""
        self.save()
        self.finish_saving()
        self.log.say(f"stopped and saved after step {self.done.step}; to go on: {resume_command(self.config)}")
        raise SystemExit(0)

    def close(self) -> None:
        self.checkpoints.close()
        self.prefetch.close()
        self.log.close()


def attention_of(config: TrainConfig, mesh: Mesh, device: torch.device) -> tuple[SequenceAttention, dict[str, str]]:
    """Attention on this mesh, and what was picked for the longest rows: see `pick`, which all ranks ask together.

    ValueError: train.attention cannot run here.
    """
    m, p, backend = config.model.sizes, config.parallel, config.train.attention.value
    dtype = config.engine.resolve(device.type)
    query = torch.empty(1, 1, m.n_heads, m.head_dim, dtype=dtype, device=device)  # one like those it will see
    if backend != "auto" and (why := refusal(backend, query, query, query)):
        raise ValueError(f"train.attention={backend} cannot run here: {why}; use train.attention=auto")
    attend = config.model.attention(mesh, p.layout.value, backend, strategy=p.strategy.value)
    longest = max([config.seq_len, *(phase.seq_len for phase in config.phases)])
    return attend, attend.pick(query, kv_heads=m.n_kv_heads, seq_len=longest)


def pick_device() -> torch.device:
    """What the process group is for: this rank's GPU under NCCL, else the CPU."""
    if "nccl" in dist.get_backend_config():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
