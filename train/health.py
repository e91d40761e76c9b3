"""Whether a run is well: spikes of the loss, and what each layer did in a step whose gradient is not finite."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ringspan.train.files import why, write_json

MEMORY = 0.98  # of the mean and the spread: the last 50 logged losses
LEARNED = 20  # logged losses before one can be a spike
SPIKE = 6.0  # standard deviations above the mean: not once in a run by chance


class Spikes:
    """Tells losses that stand out from those before them."""

    def __init__(self) -> None:
        self.mean = self.variance = 0.0
        self.seen = 0

    def see(self, loss: float) -> str | None:
        """What there is to say of the next logged loss; None if it is like those before it."""
        if not math.isfinite(loss):
            return None  # counted as a skipped step
        limit = self.mean + SPIKE * math.sqrt(self.variance)
        spike = f"loss spike: {loss:.3f} after a mean of {self.mean:.3f}" if loss > limit else None
        if self.seen < LEARNED:
            spike = None
        self._learn(min(loss, limit) if spike else loss)  # or the next one would pass for usual
        return spike

    def _learn(self, loss: float) -> None:
        self.seen += 1
        weight = max(1 - MEMORY, 1 / self.seen)
        off = loss - self.mean
        self.mean += weight * off
        self.variance = (1 - weight) * (self.variance + weight * off * off)


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, dict[str, Any]]]:
    """What comes out of each layer while forward and backward run inside: by layer, in the order of forward."""
    told: dict[str, dict[str, Any]] = {}
    # Items of a list, but not of a list in a list, and what has no parts, as an embedding or the last norm
    parts = ((name, part) for name, part in model.named_modules() if re.fullmatch(r"\D+(\.\d+)?", name))
    layers = {name: part for name, part in parts if name[-1].isdigit() or not [*part.children()]}

    def hook(name: str) -> Any:
        def see(_: nn.Module, __: Any, output: Any) -> None:
            output = output if torch.is_tensor(output) else output[0]
            told.setdefault(name, {"output": statistics(output)})
            if output.requires_grad:
                output.register_hook(lambda gradient: told[name].update(gradient=statistics(gradient)))

        return see

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield told
    finally:
        for handle in handles:
            handle.remove()


def statistics(x: Tensor) -> dict[str, float]:
    """Sizes as text would show them: NaN and infinity, which JSON has not, are counted and left out."""
    x = x.detach().float()
    finite = torch.where(x.isfinite(), x, 0)
    bad = int((~x.isfinite()).sum())
    return {"not_finite": bad, "largest": float(finite.abs().max()), "mean": float(finite.mean())}


def report(path: Path, facts: dict[str, Any], ranks: list[list[dict[str, Any]]]) -> str:
    """Write what every rank's micro-batches did; where the first number that is not finite came from, and the file.

    Each micro-batch is {"rows": ..., "loss_sum": ..., "layers": what `watched` gave}.
    """
    first = first_not_finite(ranks) or "in no layer when computed again"
    told = [{"rank": rank, "micro_batches": seen} for rank, seen in enumerate(ranks)]
    try:
        write_json(path, {**facts, "ranks": told})
    except OSError as error:
        return f"{first}; the layers could not be written: {why(error, path)}"
    return f"{first}; all layers are in {path}"


def first_not_finite(ranks: list[list[dict[str, Any]]]) -> str | None:
    """In the order of computation: outputs from the first layer on, then gradients from the last.

    Rings carry what is not finite to other ranks within a layer: of those that have it, the one that has most is told.
    """
    for part in ("output", "gradient"):
        for parts in zip(*ranks, strict=True):  # one micro-batch of every rank
            layers = list(parts[0]["layers"])
            for name in layers if part == "output" else reversed(layers):
                counts = [seen["layers"][name].get(part, {}).get("not_finite", 0) for seen in parts]
                if worst := max(counts):
                    rank = counts.index(worst)
                    return f"first in the {part} of {name} on rank {rank}, rows {parts[rank]['rows']}"
    return None
