"""AdamW's settings, which parameters decay, and the learning rate of every step."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(kw_only=True)
class OptimConfig:
    lr: float = 3e-4  # the highest, reached when the warm-up ends
    beta1: float = 0.9  # of the mean of gradients
    beta2: float = 0.95  # of the mean of their squares
    eps: float = 1e-8  # added to the root of that
    weight_decay: float = 0.1  # of matrices; norms do not decay
    warmup_steps: int = 10  # of a linear rise to lr; then a cosine to the last step
    min_lr: float = 0.1  # the last step's learning rate, as a fraction of lr

    def __post_init__(self) -> None:
        rules = (
            ("lr", self.lr > 0, "above 0"),
            ("beta1", 0 <= self.beta1 < 1, "0 or more and below 1"),
            ("beta2", 0 <= self.beta2 < 1, "0 or more and below 1"),
            ("eps", self.eps > 0, "above 0"),
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


def adamw(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) in two groups: matrices decay, vectors do not."""
    every = list(parameters)
    # Under ZeRO-3 a parameter's own shape is that of nothing; ds_shape is the whole's.
    matrices = [p for p in every if len(getattr(p, "ds_shape", p.shape)) >= 2]
    vectors = [p for p in every if len(getattr(p, "ds_shape", p.shape)) < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    # Fused: one pass over memory on a GPU, and on a CPU too, which has the update where ZeRO offloads it.
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
