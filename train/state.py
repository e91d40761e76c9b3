"""What DeepSpeed keeps of a model in training, by the parameters' own names: each rank's share, as runs of elements.

At every ZeRO stage a rank's optimizer updates flat fp32 tensors that hold runs of some parameters. A run is given by a
parameter's name and its first element in it, so what one mesh or stage has written any other can read.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

MASTER = "master"  # the fp32 weights; every other kind is named as the optimizer's state names it
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
MOMENTUM = "momentum_buffer"  # of Muon


class Run(NamedTuple):
    """Elements ``start`` to ``stop`` of parameter ``name``, from ``at`` on in ``flat``, which the optimizer updates."""

    name: str
    start: int
    stop: int
    flat: Tensor
    at: int

    def of(self, kind: Tensor) -> Tensor:
        """Its elements of a tensor of the optimizer's that has the shape of ``flat``."""
        return kind.detach().view(-1)[self.at : self.at + self.stop - self.start]


class Source(Protocol):
    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop``, 1-D."""


class State:
    """The optimizer's state of a DeepSpeed engine, and its way back. ``muon`` names the parameters that Muon moves."""

    def __init__(self, engine: Any, zero: int, muon: Collection[str] = ()) -> None:
        self.engine, self.zero, self.muon = engine, zero, muon
        named: dict[str, Any] = dict(engine.module.named_parameters())  # DeepSpeed adds attributes
        self.parameters = {name: p for name, p in named.items() if p.requires_grad}
        self.frozen = [p for p in named.values() if not p.requires_grad]  # beside adapters; nothing to save
        self.runs = list(self._runs())

    def shapes(self) -> dict[str, list[int]]:
        return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in self.parameters.items()}

    def _runs(self) -> Iterator[Run]:
        for name, p in self.parameters.items():
            if self.zero == 0:  # every rank updates everything
                yield Run(name, 0, p.numel(), p, 0)
            elif self.zero == 3:
                group, at, size = self.engine.optimizer.grad_position[self.engine.optimizer.get_param_id(p)]
                start = dist.get_rank() * size
                if start < p.ds_numel:  # else this rank has nothing but padding
                    flat = self.engine.optimizer.fp32_partitioned_groups_flat[group]
                    yield Run(name, start, min(start + size, p.ds_numel), flat, at)
            elif (part := p._hp_mapping) is not None:
                start, flat = part.lp_fragment_address.start, self.flats()[part.param_group_index]
                yield Run(name, start, start + part.lp_fragment_address.numel, flat, part.hp_fragment_address.start)

    def flats(self) -> list[Tensor]:
        """All tensors that this rank's optimizer updates."""
        if self.zero == 0:
            return list(self.parameters.values())
        if self.zero == 3:
            return self.engine.optimizer.fp32_partitioned_groups_flat
        if hasattr(self.engine.optimizer, "fp32_groups_flat_partition"):  # what sums micro-batches in fp32 at stage 1
            return self.engine.optimizer.fp32_groups_flat_partition
        return self.engine.optimizer.single_partition_of_fp32_groups

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.engine.optimizer if self.zero == 0 else self.engine.optimizer.optimizer

    def to_save(self) -> Iterator[tuple[str, str, int, Tensor]]:
        """(kind, name, first element, elements) of all that is this rank's to write, views on the device."""
        for run in self.runs:
            states = self.optimizer.state[run.flat]
            tensors = {MASTER: run.flat, **{kind: x for kind, x in states.items() if _is_like(x, run.flat)}}
            for kind, tensor in tensors.items():
                start, whole = run.start, run.of(tensor)
                if self.zero == 0:  # the same on all ranks: each writes its share
                    rank, world = dist.get_rank(), dist.get_world_size()
                    start, stop = (len(whole) * i // world for i in (rank, rank + 1))
                    whole = whole[start:stop]
                if len(whole):
                    yield kind, run.name, start, whole

    def scalars(self) -> dict[str, float]:
        """What the optimizer keeps once for all elements: how often it has updated."""
        states = self.optimizer.state[self.flats()[0]]
        return {kind: float(x) for kind, x in states.items() if not _is_like(x, self.flats()[0])}

    def restore(self, source: Source, kinds: Iterable[str], scalars: Mapping[str, float]) -> None:
        """Take from ``source`` what this rank updates. Without ``kinds`` the weights alone; all ranks together."""
        moments = any(kind != MASTER for kind in kinds)
        for run in self.runs:
            run.of(run.flat).copy_(source.read(MASTER, run.name, run.start, run.stop))
            state, by_muon = self.optimizer.state[run.flat], run.name in self.muon
            if moments and not by_muon:
                state.update({kind: self._scalar(value, run.flat) for kind, value in scalars.items()})
            for kind in ((MOMENTUM,) if by_muon else MOMENTS) if moments else ():
                if kind not in state:
                    state[kind] = torch.zeros_like(run.flat, requires_grad=False)
                run.of(state[kind]).copy_(source.read(kind, run.name, run.start, run.stop))
        self._spread()

    def _scalar(self, value: float, flat: Tensor) -> Tensor:
        fused = self.optimizer.defaults.get("fused")  # then torch wants its count of steps on the device
        return torch.tensor(value, dtype=torch.float32, device=flat.device if fused else "cpu")

    def _spread(self) -> None:
        """From the fp32 weights to the model's own, on all ranks."""
        optimizer = self.engine.optimizer
        if self.zero in (1, 2):
            optimizer.update_lp_params()
        elif self.zero == 3:
            optimizer.checkpoint_event_prologue()  # shards what is kept whole: its copy is of the old weights
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            optimizer.checkpoint_event_epilogue()


def _is_like(state: Any, flat: Tensor) -> bool:
    return torch.is_tensor(state) and state.shape == flat.shape
