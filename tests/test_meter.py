"""Every metric of a small run against numbers worked out by hand beside it, and docs/metrics.md against the code."""

import itertools
import json
import math
import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import logging_cost
import pytest
import torch
import torch.distributed as dist
from test_parity import SEQ_LEN, job, write_texts

from ringspan.parallel import transport
from ringspan.train import metrics
from ringspan.train.checkpoint import Checkpointer
from ringspan.train.engine import Engine
from ringspan.train.loop import Trainer, watchdog
from ringspan.train.measured import Measured
from ringspan.train.meter import Meter, held
from ringspan.train.metrics import GIB, METRICS
from ringspan.train.progress import Progress
from ringspan.train.run_log import Best
from ringspan.train.step import Prefetch

ROOT = Path(__file__).parents[1]
DATA, SAVE, LATE = 0.05, 0.08, 0.1  # seconds that are added to each
PEAK = 1e12
STEPS = 4  # of which the first one is skipped, and each second one is logged


@contextmanager
def around(owner: Any, name: str, wrap: Callable[..., Any]) -> Iterator[None]:
    """``owner.name`` is ``wrap(it, *arguments)`` meanwhile."""
    real = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **named: wrap(real, *arguments, **named))
    try:
        yield
    finally:
        setattr(owner, name, real)


class Observer:
    """What a rank does in each step, seen from outside."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def step(self, real: Any, trainer: Trainer) -> Any:
        rows = trainer.batches.rows_after(trainer.done.rows_seen)
        lengths = [trainer.batches.rows.lengths(row) for micro_batch in rows for row in micro_batch]
        self.seen.append({"lengths": lengths, "losses": [], "labels": 0, "wait": 0.0, "save": 0.0})
        return self.timed("step", 0.0)(real, trainer)

    def loss_sum(self, real: Any, engine: Engine, tokens: Any, labels: Any, *others: Any) -> Any:
        if dist.get_rank() == 0:
            time.sleep(LATE)
        loss = real(engine, tokens, labels, *others)
        self.seen[-1]["losses"].append(loss.item())
        self.seen[-1]["labels"] += int((labels >= 0).sum())
        return loss

    def update(self, real: Any, engine: Engine, lr: float) -> float:
        gradients = [p.grad for p in engine.model.parameters()]
        if len(self.seen) == 1:
            gradients[0].fill_(math.nan)
        self.seen[-1] |= {"lr": lr, "norm": math.sqrt(sum(g.double().square().sum().item() for g in gradients))}
        return real(engine, lr)

    def timed(self, what: str, more: float) -> Callable[..., Any]:
        """Seconds of all calls in a step, each of which takes so many more."""

        def act(real: Any, *arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            if more:
                time.sleep(more)
            result = real(*arguments, **named)
            self.seen[-1][what] = self.seen[-1].get(what, 0.0) + time.perf_counter() - started
            return result

        return act


def observed(config) -> tuple[list[dict[str, Any]], dict[str, list[int]]]:
    """On a rank: what each step was, and the shapes of the model's parameters."""
    observer = Observer()
    with ExitStack() as stack:
        for owner, name, wrap in (
            (Trainer, "step", observer.step),
            (Engine, "loss_sum", observer.loss_sum),
            (Engine, "step", observer.update),
            (transport._Works, "wait", observer.timed("wait", 0.0)),
            (Prefetch, "take", observer.timed("take", DATA)),
            (Trainer, "save", observer.timed("save", 0.0)),
            (Checkpointer, "begin", observer.timed("begin", SAVE)),
            (metrics, "peak_flops", lambda real, device: PEAK),
        ):
            stack.enter_context(around(owner, name, wrap))
        trainer = Trainer(config, config.run_dir, stack.enter_context(closing(watchdog(config, config.run_dir))))
        trainer.run(lambda: False)
        trainer.close()
    assert trainer.checkpoints.superfluous.keywords == {"keep": 1, "every": 3, "best": True}
    return observer.seen, {name: list(p.shape) for name, p in trainer.engine.model.named_parameters()}


@pytest.fixture(scope="module")
def small(tmp_path_factory, ranks) -> SimpleNamespace:
    """A run of two ranks, its lines, and what its ranks saw."""
    root = tmp_path_factory.mktemp("meter")
    text = write_texts(root / "text", 5, 90)
    loop = {"log_every": 2, "save_every": 1, "keep": 1, "keep_every": 3, "keep_best": True}
    config = job(root, "small", text, mesh=(1, 2, 1), zero=0, steps=STEPS, layout="striped", **loop)
    (first, shapes), (second, _) = ranks(2)(observed, config, timeout=200)
    lines = [json.loads(line) for line in Path(config.run_dir, "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(tuple(line) == METRICS for line in lines)
    return SimpleNamespace(config=config, lines=lines, ranks=(first, second), shapes=shapes)


def logged(small) -> Iterator[tuple[dict, list[dict]]]:
    """Each line, with what its step was on each rank."""
    for line in small.lines:
        yield line, [rank[line["step"] - 1] for rank in small.ranks]


def test_of_training(small):
    for line, ranks in logged(small):
        assert line["tokens"] == line["step"] * 8 * SEQ_LEN
        total, labels = (sum(x) for x in zip(*((sum(r["losses"]), r["labels"]) for r in ranks), strict=True))
        assert line["train/loss"] == pytest.approx(total / labels, rel=1e-6)
        assert line["train/grad_norm"] == pytest.approx(ranks[0]["norm"], rel=1e-6)
        assert line["train/lr"] == ranks[0]["lr"] == pytest.approx(1e-2 * line["step"] / 5)  # 5 steps of warm-up
        assert line["train/skipped"] == 1


def test_of_time(small):
    """Clocks beside the code's own; a process may be kept waiting between the two."""
    first = small.ranks[0]
    for line, ranks in logged(small):
        two = first[line["step"] - 2 : line["step"]]
        for name, what in (("step", "step"), ("data", "take")):
            assert line[f"perf/{name}_seconds"] == pytest.approx(sum(step[what] for step in two) / 2, abs=0.03)
        assert line["perf/tokens_per_second_per_gpu"] == pytest.approx(8 * SEQ_LEN / line["perf/step_seconds"] / 2)
        assert line["perf/data_seconds"] >= DATA
        saves = {2: first[:1], 4: first[1:3]}[line["step"]]  # that after step 4 is in no line
        assert line["perf/save_seconds"] == pytest.approx(sum(step["save"] for step in saves) / 2, abs=0.03)
        assert line["perf/save_seconds"] >= len(saves) / 2 * SAVE
        exposed = sum(one["wait"] for one in ranks) / 2
        assert line["perf/exposed_comm_seconds"] == pytest.approx(exposed, abs=0.03)
        assert exposed >= LATE / 2 * 0.9  # rank 1 waits for rank 0, which comes late, and the mean is of both


def test_of_work(small):
    m = small.config.model
    products = sum(math.prod(shape) for name, shape in small.shapes.items() if len(shape) == 2 and "embed" not in name)
    for line, ranks in logged(small):
        # A document's tokens attend to themselves and to those before; forward is two products of 2 FLOPs for each
        # pair, head and dimension, backward four
        two = small.ranks[0][line["step"] - 2 : line["step"]]
        pairs = sum(i + 1 for step in two for row in step["lengths"] for n in row for i in range(n)) / 2
        flops = 3 * 2 * products * 8 * SEQ_LEN + 3 * 2 * 2 * pairs * m.n_layers * m.n_heads * m.head_dim
        assert line["perf/mfu"] == pytest.approx(flops / line["perf/step_seconds"] / 2 / PEAK)
        # A rank's half of a row is one tile. Step 0 of the ring: each rank has those of its 8 rows; step 1: rank 1 has
        # those rows whose documents begin on rank 0, which waits for it
        across = sum(SEQ_LEN // 2 not in itertools.accumulate(row) for row in ranks[0]["lengths"])
        assert 0 < across <= 8
        assert line["perf/ring_imbalance"] == pytest.approx((8 + across) / ((8 + 8 + across) / 2) - 1)


def test_of_memory(small):
    numbers, tensors = sum(map(math.prod, small.shapes.values())), len(small.shapes)
    for line in small.lines:
        assert line["memory/weights_gib"] * GIB == pytest.approx(4 * numbers)  # fp32, whole on each rank
        assert line["memory/optimizer_gib"] * GIB == pytest.approx(8 * numbers + 4 * tensors)  # two moments, a count
        assert line["memory/transport_gib"] == 0
        assert line["memory/activations_gib"] is None
        assert line["memory/gradients_gib"] is None
        assert line["memory/peak_allocated_gib"] == line["memory/peak_reserved_gib"]
        assert 0.05 < line["memory/peak_allocated_gib"] < resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_the_banner_says_what_to_expect(small):
    told = json.loads(Path(small.config.run_dir, "run.json").read_text())
    assert told["expected"].keys() == {"memory/peak_allocated_gib", "perf/step_seconds"}
    assert told["expected"]["perf/step_seconds"] == "not known for cpu"
    assert told["machine"]["hosts"] == 1
    assert re.fullmatch(r"2 x cpu \(\d+ cores\)", told["machine"]["ranks"])


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def test_what_is_elsewhere_or_the_model_s_is_not_counted_twice():
    p, q = tensor(3, 5, dtype=torch.bfloat16), tensor(0, dtype=torch.bfloat16)
    q.ds_tensor = tensor(7, dtype=torch.bfloat16)  # ZeRO-3's shard
    flat, away = tensor(11), tensor(13, dtype=torch.float64).to("meta")
    kept = {flat: {"exp_avg": tensor(11), "step": 3}, away: {"exp_avg": away}, p: {"exp_avg": tensor(3, 5)}}
    state: Any = SimpleNamespace(frozen=[], parameters={"p": p, "q": q}, optimizer=SimpleNamespace(state=kept))
    assert held(state, torch.device("cpu")) == (2 * 15 + 2 * 7, 4 * 11 + 4 * 11 + 4 * 15)


def test_memory_of_a_gpu_is_what_the_allocator_has_more_than_before(monkeypatch):
    """On a GPU that is not there: its allocator is asked in a step that is to be logged, and in no other."""
    now = [5 * GIB]
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: now[0])
    monkeypatch.setattr("ringspan.train.meter.recorded", lambda device: ExitStack())
    state: Any = SimpleNamespace(frozen=[], parameters={}, optimizer=SimpleNamespace(state={}))
    meter = Meter(torch.device("cuda"), state)
    for is_logged in (True, False):
        with meter.step(logged=is_logged):
            for moment, size in (("forward", 9), ("backward", 7)):
                now[0] = size * GIB
                meter.see(moment)
        parts = meter.memory()
        assert (parts["activations"], parts["gradients"]) == ((4, 2) if is_logged else (None, None))
        now[0] = 5 * GIB


def test_a_logged_step_costs_little():
    """Without W&B, which benchmarks/logging_cost.py has as well: half a percent of a 1B model's step on two H200."""
    device, progress = torch.device("cpu"), Progress(10**6, logging_cost.Terminal())
    one = logging_cost.a_record(1, device)
    assert tuple(one) == METRICS
    acts = (logging_cost.measuring(device), lambda i: progress.step(one), lambda i: logging_cost.a_record(i, device))
    assert sum(logging_cost.seconds(act, 15) for act in acts) < 0.005 * 1.3


def names_on(page: str, title: str) -> list[str]:
    """First column of the table below that title."""
    _, _, below = page.partition(f"## {title}\n")
    return re.findall(r"^\| `([^`]+)` \|", below.partition("\n## ")[0], flags=re.MULTILINE)


def test_the_page_has_every_name_in_its_place():
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert names_on(page, "metrics.jsonl") == list(METRICS)
    measured = Measured(1.0, 1.0, [(0, 1.0), (1, 1.0)], needles={64: [1.0]}, by_length={64: 1.0})
    evaluated = ["step", "tokens", *measured.record()]
    assert sorted(names_on(page, "evaluations.jsonl")) == sorted(name.replace("64", "LENGTH") for name in evaluated)
    best = Best(("train/loss", "eval/loss"))
    best.see({"step": 1, "train/loss": 1.0})
    best.see({"step": 1, "eval/loss": 1.0})
    summary = [*best.summary(), "unigram_entropy", *(set(measured.plots()) - set(measured.numbers()))]
    assert sorted(names_on(page, "W&B")) == sorted(summary)
