"""What a run says of itself: metrics.jsonl, W&B, run.json and one progress line. Rank 0 alone writes and prints."""

import json
import math
import netrc
import os
import platform
import re
import resource
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, TextIO

import torch

from ringspan.train.files import Lines, keep_until, replace, why, write_json
from ringspan.train.measured import Measured
from ringspan.train.progress import Progress, in_words

GIB = 2**30
METRICS = (
    "step",
    "tokens",  # positions seen since the start of the run, over all ranks
    "train/loss",  # nats a label token, over all ranks
    "train/grad_norm",  # before clipping
    "train/lr",
    "train/skipped",  # steps since the start of the run whose gradient was not finite
    "perf/tokens_per_second_per_gpu",
    "perf/mfu",  # of the chip's dense bf16 peak; null where that is not known
    "perf/step_seconds",
    "perf/data_seconds",  # of a step, spent waiting for its batch
    "perf/save_seconds",  # a step, spent between steps on taking a checkpoint
    "perf/ring_imbalance",  # sum over the ring's steps of the slowest rank's tiles, over the mean rank's, minus 1
    "memory/peak_allocated_gib",  # on a CPU both are the process's peak resident memory
    "memory/peak_reserved_gib",
)
Record = dict[str, float | None]

# Dense bf16 with fp32 accumulation, FLOP/s, from the makers' data sheets. The first entry whose words all stand in
# the device's name counts, so the special case comes before the plain one.
PEAKS: tuple[tuple[str, float], ...] = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 150e12),
    ("A10", 125e12),
    ("RTX A6000", 155e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
)


class WandbMode(str, Enum):
    auto = "auto"  # WANDB_MODE where it is set, else online where there is a key, else offline
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(kw_only=True)
class LoggerConfig:
    wandb: WandbMode = WandbMode.auto
    project: str = "ringspan"
    group: str | None = None  # of runs to be compared; a sweep's folder, unless given


def flops_per_step(
    matrix_parameters: int, tokens: int, *, n_layers: int, n_heads: int, head_dim: int, attended: int
) -> float:
    """Forward and backward FLOPs that a step needs; recomputation is not counted.

    A token costs 6 per parameter in a matrix product, and 12 per layer, head dimension and key it really attends to:
    causal half, documents and windows. ``attended`` is the number of (query, key) pairs of one head, all rows together.
    """
    return 6.0 * matrix_parameters * tokens + 12.0 * n_layers * n_heads * head_dim * attended


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the chip; None for a CPU or a chip that PEAKS does not list."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of(device_name: str) -> float | None:
    words = set(re.split(r"[\s-]+", device_name))  # "NVIDIA A100-SXM4-80GB" is an A100 and not an A10
    return next((peak for chip, peak in PEAKS if words.issuperset(chip.split())), None)


def peak_memory_gib(device: torch.device) -> tuple[float, float]:
    """(allocated, reserved) at most since the start; on a CPU the process's peak resident memory for both."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB, torch.cuda.max_memory_reserved(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
    return resident, resident


def record(
    *,
    step: int,
    tokens: int,
    loss: float,
    grad_norm: float,
    lr: float,
    step_tokens: int,
    step_flops: float,
    step_seconds: float,
    data_seconds: float,
    save_seconds: float,
    ring_imbalance: float,
    skipped: int,
    world: int,
    device: torch.device,
) -> Record:
    """One object of metrics.jsonl. ``step_tokens`` and ``step_flops`` are of one step over all ``world`` ranks."""
    peak = peak_flops(device)
    allocated, reserved = peak_memory_gib(device)
    return {
        "step": step,
        "tokens": tokens,
        "train/loss": loss,
        "train/grad_norm": grad_norm,
        "train/lr": lr,
        "train/skipped": skipped,
        "perf/tokens_per_second_per_gpu": step_tokens / step_seconds / world,
        "perf/mfu": step_flops / step_seconds / world / peak if peak else None,
        "perf/step_seconds": step_seconds,
        "perf/data_seconds": data_seconds,
        "perf/save_seconds": save_seconds,
        "perf/ring_imbalance": ring_imbalance,
        "memory/peak_allocated_gib": allocated,
        "memory/peak_reserved_gib": reserved,
    }


def versions() -> dict[str, str]:
    told = ("ringspan", "torch", "triton", "deepspeed", "numpy", "datasets")  # those of them that are installed
    packages = {package.name: package.version for package in distributions() if package.name in told}
    return {"python": platform.python_version(), **packages}


class RunLog:
    """The log of one run in ``run_dir``. A no-op on every rank but 0.

    A disk that is full when the run starts is a ValueError. Later it ends no run: it is told once, lines wait in memory
    until there is room, and W&B, which drops what it cannot write, is told to be without them.

    Args:
        config: the TrainConfig, as it was checked.
        first_step: steps already done. 0 starts a fresh log and a new W&B run; else lines of later steps, which the
            run is about to repeat, are dropped, and W&B goes on in the run that the folder remembers.
    """

    def __init__(
        self, run_dir: str, config: Any, *, rank: int = 0, first_step: int = 0, stream: TextIO | None = None
    ) -> None:
        self.active = rank == 0
        if not self.active:
            return
        self.folder, self.steps, self.config = Path(run_dir), config.steps, plain(asdict(config))
        self.progress = Progress(config.steps, stream or sys.stdout)
        self.problem: str | None = None  # that the user has been told of
        with needing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in ("metrics.jsonl", "evaluations.jsonl"):
                keep_until(self.folder / name, first_step)
            self.lines = Lines(self.folder / "metrics.jsonl")
            self.evaluations = Lines(self.folder / "evaluations.jsonl")
            self.wandb = start_wandb(self.folder, self.config, config.logger, fresh=first_step == 0)

    def banner(self, facts: Mapping[str, Any]) -> None:
        """Print ``facts`` (what was picked, the mesh, sizes) once, and keep them with the configuration and versions.

        run.json has the keys config, versions, started, command and those of ``facts``.
        """
        if not self.active:
            return
        said = plain(dict(facts))
        started = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": sys.argv}
        with needing(self.folder):
            write_json(self.folder / "run.json", {"config": self.config, "versions": versions(), **started, **said})
        self.wandb.config.update({"run": said}, allow_val_change=True)
        for name, value in {**said, "wandb": self._wandb_place(), "folder": str(self.folder)}.items():
            self.progress.say(f"{name:>12}  {in_words(value)}")

    def _wandb_place(self) -> str:
        if self.wandb.disabled:
            return "disabled"
        return f"offline; upload: wandb sync {self.wandb.settings.sync_dir}" if self.wandb.offline else self.wandb.url

    def step(self, record: Record) -> None:
        """A logged step: ``record`` has exactly the names in METRICS."""
        if not self.active:
            return
        assert tuple(record) == METRICS, set(record) ^ set(METRICS)
        finite = {name: value if value is not None and math.isfinite(value) else None for name, value in record.items()}
        self._tell(self.lines.add(json.dumps(finite)))  # NaN and infinity, which JSON has not, are null
        self._to_wandb(lambda run: run.log({name: value for name, value in record.items() if value is not None}))
        self.progress.step(record)

    def evaluation(self, step: int, tokens: int, measured: Measured) -> None:
        if not self.active:
            return
        problem = self.evaluations.add(json.dumps({"step": step, "tokens": tokens, **measured.record()}))
        self._tell(problem or self._draw(measured.drawings()))
        self._to_wandb(lambda run: run.log({"tokens": tokens, **measured.numbers(), **measured.plots()}))
        self.progress.say(f"step {step}: {measured.in_words()}")

    def _draw(self, pictures: dict[str, str]) -> str | None:
        for name, picture in pictures.items():
            path = self.folder / name
            try:
                replace(path, picture)
            except OSError as error:
                return why(error, path)
        return None

    def _tell(self, problem: str | None) -> None:
        """Of a problem with the disk, when it comes and when it has gone."""
        if problem and not self.problem:
            wandb = "; W&B may miss them" if self.wandb and not self.wandb.disabled else ""
            self.progress.say(f"log: {problem}; training goes on, and lines wait in memory until there is room{wandb}")
        if self.problem and not problem:
            self.progress.say("log: there is room again, and every line is written")
        self.problem = problem

    def _to_wandb(self, act: Callable[[Any], object]) -> None:
        if self.wandb is None:
            return
        try:
            act(self.wandb)
        except OSError as error:  # its own process has gone
            self.wandb = None
            self.progress.say(f"W&B has stopped ({error}); training goes on, and metrics.jsonl has every step")

    def verdict(self, loss: float, unigram_entropy: float) -> None:
        """The last loss against what a model would reach that knows token frequencies and no context."""
        if not self.active:
            return
        sign, meaning = ("<", "context helps") if loss < unigram_entropy else (">=", "no use of context yet")
        self._to_wandb(lambda run: run.summary.update({"unigram_entropy": unigram_entropy}))
        self.progress.say(f"loss {loss:.3f} {sign} unigram entropy {unigram_entropy:.3f} nats a token: {meaning}")

    def say(self, line: str) -> None:
        """One line for the user, from rank 0, below the progress line."""
        if self.active:
            self.progress.say(line)

    def close(self) -> None:
        if not self.active:
            return
        problems = {lines: lines.flush() for lines in (self.lines, self.evaluations)}
        for lines, problem in problems.items():
            if problem:
                self.progress.say(f"log: {problem}; its last {len(lines.waiting.splitlines())} lines are lost")
        if not any(problems.values()):
            self._tell(None)
        self.progress.end()
        self._to_wandb(lambda run: run.finish())


@contextmanager
def needing(folder: Path) -> Iterator[None]:
    """ValueError, instead of an OSError: the log of a run cannot be begun."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"run_dir={folder}: {why(error, folder)}; make room, or give another") from error


def plain(value: Any) -> Any:
    """Dicts, lists, numbers and strings only, for JSON and W&B: an Enum becomes its value."""
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, Enum):
        return value.value
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def start_wandb(folder: Path, config: dict[str, Any], logger: LoggerConfig, *, fresh: bool) -> Any:
    """The W&B run of this folder: a new one, or the one that wandb_id remembers. Its files stay inside the folder."""
    import wandb  # noqa: PLC0415 - it takes a second, on every rank, and one of them needs it

    id_file = folder / "wandb_id"
    if fresh or not id_file.exists():
        replace(id_file, secrets.token_hex(4) + "\n")
    run = wandb.init(
        project=logger.project,
        name=config["name"],
        group=logger.group,
        id=id_file.read_text(encoding="utf-8").strip(),
        resume="allow",
        mode=wandb_mode(logger.wandb),
        dir=str(folder),
        config=config,
        settings=wandb.Settings(console="off", silent=True),  # RunLog prints, and says where to look
    )
    run.define_metric("tokens")
    run.define_metric("*", step_metric="tokens")  # and never log(step=): W&B drops a step it has seen before a resume
    return run


def wandb_mode(asked: WandbMode) -> Any:
    """One of online, offline and disabled. An online run without a key would stop and ask for one."""
    if asked is not WandbMode.auto:
        return asked.value
    return os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")


def has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    host = re.sub(r"^https?://|/.*$", "", os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):  # no such file, or one for other programs to understand
        return False
