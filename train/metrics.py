"""What is measured of a run: the names of metrics.jsonl and how its numbers are made. docs/metrics.md defines each."""

import re
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

GIB = 2**30
METRICS = (
    "step",
    "tokens",
    "train/loss",
    "train/grad_norm",
    "train/lr",
    "train/skipped",
    "perf/tokens_per_second_per_gpu",
    "perf/mfu",
    "perf/step_seconds",
    "perf/data_seconds",
    "perf/save_seconds",
    "perf/exposed_comm_seconds",
    "perf/ring_imbalance",
    "memory/weights_gib",
    "memory/optimizer_gib",
    "memory/activations_gib",
    "memory/gradients_gib",
    "memory/transport_gib",
    "memory/peak_allocated_gib",
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


class Ranks(str, Enum):
    first = "first"  # rank 0
    all = "all"  # each with its rank before every line; then nobody rewrites a line


@dataclass(kw_only=True)
class LoggerConfig:
    wandb: WandbMode = WandbMode.auto  # where the run is recorded besides its own folder
    project: str = "ringspan"  # of W&B
    group: str | None = None  # of runs to be compared; a sweep's folder, unless given
    ranks: Ranks = Ranks.first  # who prints, beside warnings and errors


def flops_per_step(
    matrix_parameters: int,
    tokens: float,
    *,
    n_layers: int,
    n_heads: int,
    head_dim: int,
    attended: float,
    frozen: int = 0,
) -> float:
    """Forward and backward FLOPs that a step needs; recomputation is not counted.

    A token costs 6 per parameter in a matrix product, 2 of them for its gradient, which ``frozen`` ones have not, and
    12 per layer, head dimension and key it really attends to: causal half, documents and windows. ``attended`` is the
    number of (query, key) pairs of one head, all rows together, the mean of the layers.
    """
    return (6.0 * matrix_parameters - 2.0 * frozen) * tokens + 12.0 * n_layers * n_heads * head_dim * attended


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
    step_tokens: float,
    step_flops: float,
    step_seconds: float,
    data_seconds: float,
    save_seconds: float,
    exposed_comm_seconds: float,
    ring_imbalance: float,
    skipped: int,
    memory: Mapping[str, float | None],
    world: int,
    device: torch.device,
) -> Record:
    """One object of metrics.jsonl. ``step_tokens`` and ``step_flops`` are of a step over all ``world`` ranks,
    ``memory`` is GiB by part."""
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
        "perf/exposed_comm_seconds": exposed_comm_seconds,
        "perf/ring_imbalance": ring_imbalance,
        **{f"memory/{part}_gib": size for part, size in memory.items()},
        "memory/peak_allocated_gib": allocated,
        "memory/peak_reserved_gib": reserved,
    }


def plain(value: Any) -> Any:
    """Dicts, lists, numbers and strings only, for JSON and W&B: an Enum becomes its value."""
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, Enum):
        return value.value
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
