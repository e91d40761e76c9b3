"""Muon: hidden matrices move along their momentum, made orthogonal; all else by AdamW.

Muon is Jordan et al.'s (2024, https://kellerjordan.github.io/posts/muon/); its update is scaled to the size of AdamW's
(Liu et al., arXiv 2502.16982), so that one learning rate and weight decay serve both. DeepSpeed's own Muon, at most
stages, makes gradients orthogonal before it clips them: a norm of 1 is then the update's, whatever the gradient. To it
this one is an optimizer of flat tensors like any other: momentum is summed by element, wherever the element lies. Only
to be made orthogonal must a matrix be whole: the ranks that hold parts of one send them to one rank, and get their
parts of the update back.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ringspan.train.agree import of_every_rank
from ringspan.train.state import MOMENTUM, Run

ITERATIONS = 5  # every singular value above 0.002 of the norm is then between 0.68 and 1.21
QUINTIC = (3.4445, -4.7750, 2.0315)  # the odd polynomial of each iteration: steepest at 0, where small values start
LIKE_ADAMW = 0.2  # root mean square of AdamW's update over its learning rate, as it is measured
TINY = 1e-7  # a matrix of a smaller norm is left small

Shapes = Sequence[tuple[int, int]]  # (rows, columns) of each matrix of a parameter that stacks them


class Shared(NamedTuple):
    """A matrix, and who has it."""

    rows: int
    columns: int
    parts: list[tuple[int, int]]  # of each rank, in the order of the elements: (first in its flat tensor, how many)

    @property
    def size(self) -> int:
        return self.rows * self.columns

    @property
    def scale(self) -> float:
        """Makes the root mean square of an orthogonal matrix, 1 / sqrt(its longer side), that of AdamW's update."""
        return LIKE_ADAMW * max(self.rows, self.columns) ** 0.5

    @property
    def split(self) -> bool:
        return all(size < self.size for _, size in self.parts)


class Muon(torch.optim.AdamW):
    """Muon for the groups of parameters that say ``muon=True``, fused AdamW for the others.

    ``matrices`` has the shapes of what Muon moves, by the parameter's name. `place` comes before the first `step`.
    Matrices become orthogonal on ``device``: in bf16 on a GPU, as all of Muon's authors have it, else in fp32.
    """

    def __init__(
        self, groups: list[dict[str, Any]], matrices: Mapping[str, Shapes], device: torch.device, **settings: Any
    ) -> None:
        super().__init__(groups, **settings)
        self.matrices, self.device = matrices, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.shared: dict[int, list[Shared]] = {}  # by the id of the flat tensor, the largest matrix first

    def place(self, runs: Iterable[Run], flats: Sequence[Tensor]) -> None:
        """Where in ``flats``, which the optimizer updates, this rank has which elements; all ranks together."""
        index = {id(flat): i for i, flat in enumerate(flats)}
        mine = {r.name: (r.start, r.stop, r.at, index[id(r.flat)]) for r in runs if r.name in self.matrices}
        every, found = of_every_rank(mine), defaultdict[int, list[Shared]](list)
        for name, shapes in self.matrices.items():
            flat = next(rank[name][-1] for rank in every if name in rank)  # the same on all
            first = 0
            for rows, columns in shapes:
                stop = first + rows * columns
                parts = [overlap(*rank[name][:3], first, stop) if name in rank else (0, 0) for rank in every]
                found[flat].append(Shared(rows, columns, parts))
                first = stop
        # Matrices of like sizes go together, so that no rank waits long for another's
        self.shared = {id(flats[i]): sorted(those, key=lambda m: -m.size) for i, those in found.items()}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        groups = self.param_groups
        for group in groups:
            for flat in group["params"] if group["muon"] else ():
                self._move(flat, group["lr"], group["momentum"], group["weight_decay"])
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    def _move(self, flat: Tensor, lr: float, beta: float, weight_decay: float) -> None:
        state, gradient = self.state[flat], flat.grad
        assert gradient is not None
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(flat)
        state[MOMENTUM].lerp_(gradient, 1 - beta)
        flat.mul_(1 - lr * weight_decay)
        weights, gradient, momentum = (x.reshape(-1) for x in (flat, gradient, state[MOMENTUM]))

        def ahead(at: int, size: int) -> Tensor:
            """The momentum of the next step, were its gradient the same (Nesterov)."""
            here = slice(at, at + size)
            return gradient[here].lerp(momentum[here], beta).to(self.device, self.dtype)

        for matrix, at, update in self._updates(self.shared[id(flat)], ahead):
            moved = weights[at : at + update.numel()]
            moved.add_(update.to(moved.device), alpha=-lr * matrix.scale)

    def _updates(
        self, matrices: list[Shared], ahead: Callable[[int, int], Tensor]
    ) -> Iterable[tuple[Shared, int, Tensor]]:
        """(matrix, where it begins in the flat tensor, elements) of each part that this rank has."""
        rank, world = dist.get_rank(), dist.get_world_size()
        for matrix in matrices:
            at, size = matrix.parts[rank]
            if size and not matrix.split:
                yield matrix, at, orthogonal(ahead(at, size).view(matrix.rows, matrix.columns)).reshape(-1)
        split = [matrix for matrix in matrices if matrix.split]
        for start in range(0, len(split), world):
            some = split[start : start + world]
            for matrix, update in zip(some, exchanged(some, ahead), strict=True):
                yield matrix, matrix.parts[rank][0], update


def exchanged(matrices: list[Shared], ahead: Callable[[int, int], Tensor]) -> tuple[Tensor, ...]:
    """This rank's parts of the updates of at most as many matrices as ranks: rank i makes the i-th orthogonal."""
    rank, world = dist.get_rank(), dist.get_world_size()
    parts = [matrix.parts[rank] for matrix in matrices]
    sent = [size for _, size in parts] + [0] * (world - len(matrices))
    mine = matrices[rank] if rank < len(matrices) else None
    received = [size for _, size in mine.parts] if mine else [0] * world
    leaving = torch.cat([ahead(*part) for part in parts])
    whole = leaving.new_empty(sum(received))
    dist.all_to_all_single(whole, leaving, received, sent)
    if mine:
        whole = orthogonal(whole.view(mine.rows, mine.columns)).reshape(-1)
    dist.all_to_all_single(leaving, whole, sent, received)
    return leaving.split(sent)[: len(matrices)]


def overlap(start: int, stop: int, at: int, first: int, last: int) -> tuple[int, int]:
    """Of elements start to stop, which lie at ``at``, those from first to last: (where they lie, how many)."""
    begin, end = max(start, first), min(stop, last)
    return (at + begin - start, end - begin) if begin < end else (0, 0)


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T of its singular value decomposition U S V^T, by Newton and Schulz's iteration of products alone."""
    a, b, c = QUINTIC
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix  # its products with itself are then the small ones
    x = x / x.norm().clamp(min=TINY)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrix.shape[0] > matrix.shape[1] else x
