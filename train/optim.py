"""The optimizer: its settings, which parameters decay, and the learning rate of every step."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

import torch
from torch import nn

from ringspan.train.model import GPT
from ringspan.train.muon import Muon


class Optimizer(str, Enum):
    adamw = "adamw"  # for all parameters
    muon = "muon"  # for the matrices of the layers; embedding, head and norms by AdamW


@dataclass(kw_only=True)
class OptimConfig:
    name: Optimizer = Optimizer.adamw  # what updates the weights
    lr: float = 3e-4  # the highest, reached when the warm-up ends
    beta1: float = 0.9  # of the mean of gradients
    beta2: float = 0.95  # of the mean of their squares
    eps: float = 1e-8  # added to the root of that
    momentum: float = 0.95  # Muon's, of the mean of gradients
    weight_decay: float = 0.1  # of matrices; norms do not decay
    warmup_steps: int = 10  # of a linear rise to lr; then a cosine to the last step
    min_lr: float = 0.1  # the last step's learning rate, as a fraction of lr

    def __post_init__(self) -> None:
        rules = (
            ("lr", self.lr > 0, "above 0"),
            ("beta1", 0 <= self.beta1 < 1, "0 or more and below 1"),
            ("beta2", 0 <= self.beta2 < 1, "0 or more and below 1"),
            ("eps", self.eps > 0, "above 0"),
            ("momentum", 0 <= self.momentum < 1, "0 or more and below 1"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("warmup_steps", self.warmup_steps >= 0, "0 or more"),
            ("min_lr", 0 <= self.min_lr <= 1, "a fraction of optim.lr, from 0 to 1"),
        )
        for name, holds, allowed in rules:
            if not holds:
                raise ValueError(f"optim.{name}={getattr(self, name)}: must be {allowed}")


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Of step 1 to ``steps``: linear to lr at step ``warmup_steps``, then a cosine to min_lr x lr at the last step."""
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    floor = config.lr * config.min_lr
    return floor + (config.lr - floor) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def optimizer_of(model: nn.Module, config: OptimConfig, device: torch.device) -> torch.optim.AdamW:
    """What ``config`` names; Muon is for `GPT`, which tells its matrices."""
    if config.name is Optimizer.adamw:
        return adamw(model.parameters(), config)
    matrices = cast(GPT, model).matrices()
    rest = groups_of((p for name, p in model.named_parameters() if name not in matrices), config.weight_decay)
    hidden = [p for name, p in model.named_parameters() if name in matrices]
    groups = [{**group, "muon": False} for group in rest]
    groups.append({"params": hidden, "muon": True, "weight_decay": config.weight_decay, "momentum": config.momentum})
    return Muon(groups, matrices, device, **settings(config))


def adamw(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) in two groups: matrices decay, vectors do not."""
    return torch.optim.AdamW(groups_of(parameters, config.weight_decay), **settings(config))


def groups_of(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    every = [p for p in parameters if p.requires_grad]
    # Under ZeRO-3 a parameter's own shape is that of nothing; ds_shape is the whole's.
    matrices = [p for p in every if len(getattr(p, "ds_shape", p.shape)) >= 2]
    vectors = [p for p in every if len(getattr(p, "ds_shape", p.shape)) < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]  # DeepSpeed takes no empty one


def settings(config: OptimConfig) -> dict[str, Any]:
    # Fused: one pass over memory on a GPU, and on a CPU too, which has the update where ZeRO offloads it.
    return {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps, "fused": True}
