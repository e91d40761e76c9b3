"""What layers keep from forward for backward, and where.

A layer is one node of autograd's. Of what its gradients need it keeps what the policy names, on the device or in the
host's memory, and computes the rest again, in tiles of the sequence where it is asked to. Whatever is computed again is
the same function of the same tensors, so every policy gives the same gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ringspan.train.host import HostMemory
from ringspan.train.layer import LayerWeights, Parts, Sizes, unpack, widened

Tiled = Callable[..., tuple[Tensor, ...]]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (B, S, H, D), k and v (B, S, K, D) -> (B, S, H, D)


class Activations(str, Enum):
    """What a layer keeps from forward for backward."""

    keep = "keep"  # the results of all matrix products and of attention: only what is elementwise is computed again
    recompute_keep_attention = "recompute_keep_attention"  # its input and attention's (out, lse): no ring runs twice
    recompute = "recompute"  # its input; forward runs again in backward, ring included


class Offload(str, Enum):
    """Where it waits."""

    none = "none"  # on the device
    cpu = "cpu"  # in pinned host memory; copied while the layer after it is computed, and back while the one before is


@dataclass(frozen=True, kw_only=True)
class Policy:
    activations: Activations = Activations.keep
    recompute_layers: int = 1  # layers that share one kept input
    offload: Offload = Offload.none
    mlp_tile: int = 0  # tokens of a row that all but attention is computed for at once; 0: all
    compiler: str | None = None  # torch.compile's backend for it; None: not compiled


ATTENTION = {"ringspan::ring_attention", "ringspan::gather_attention", "ringspan::attention"}
EXCHANGES = {"ringspan::ulysses_exchange"}


class Layers:
    """Runs a model's layers as a policy says."""

    def __init__(self, policy: Policy, sizes: Sizes, device: torch.device) -> None:
        self.policy, self.sizes, self.parts = policy, sizes, Parts(policy.compiler)
        self.memory = HostMemory(device) if policy.offload is Offload.cpu else None

    def __call__(self, layers: nn.ModuleList, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """``layer(x, cos, sin, run)`` of each; a layer calls ``run(its LayerWeights, x, cos, sin)``."""
        k = self.policy.recompute_layers
        if k == 1 or not torch.is_grad_enabled():
            run = Run(self, attend, self.policy.activations, self.memory)
            for layer in layers:
                x = layer(x, cos, sin, run)
            return x
        for first in range(0, len(layers), k):
            x = self._segment(layers[first : first + k], x, cos, sin, attend)
        return x

    def _segment(self, layers: nn.ModuleList, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """Layers of which only the first one's input is kept, and attention's results if the policy keeps them. In
        backward they run once more, and then each keeps its input and attention's results until its own backward."""
        keeps_attention = self.policy.activations is Activations.recompute_keep_attention
        runs = [Run(self, attend, Activations.recompute_keep_attention, None) for _ in layers]
        for run in runs if keeps_attention else []:
            run.results = []
        counts: list[int] = []  # results of attention's operators that wait for each layer's second forward
        needs_grad, waiting = x.requires_grad, cast(Any, [x])  # waiting: a list of tensors, or the host's parcel

        def forward() -> Tensor:
            tensors: Any = waiting if isinstance(waiting, list) else cast(HostMemory, self.memory).take(waiting)
            y, *attended = tensors
            for run, n in zip(runs, counts, strict=False):
                run.known, attended = attended[:n] or None, attended[n:]
            y = y if y.requires_grad else y.requires_grad_(needs_grad)
            for layer, run in zip(layers, runs, strict=True):
                y = layer(y, cos, sin, run)
            return cast(Tensor, y)

        y = cast(Tensor, checkpoint(forward, use_reentrant=False, preserve_rng_state=False))  # nothing is random
        kept = [x.detach()]
        for run in runs:
            counts.append(len(run.results or []))
            kept += run.results or []
            run.results = None
        waiting = kept if self.memory is None else self.memory.put(kept)
        return y


class Kept(NamedTuple):
    """What waits for a layer's backward; None is computed again."""

    x: Tensor
    packed: Tensor | None
    middle: Tensor | None
    wide: Tensor | None
    attended: tuple[Tensor, ...]  # results of attention's operators, in the order in which they ran


class Run:
    """How a layer is run: forward, and backward from what it has kept."""

    def __init__(self, layers: Layers, attend: Attend, keeps: Activations, memory: HostMemory | None) -> None:
        self.parts, self.sizes, self.tile = layers.parts, layers.sizes, layers.policy.mlp_tile
        self.attend, self.keeps, self.memory = attend, keeps, memory
        self.operators = {Activations.keep: ATTENTION | EXCHANGES, Activations.recompute: set[str]()}.get(
            keeps, ATTENTION
        )
        self.known: list[Tensor] | None = None  # what attention's operators gave before, for a second forward
        self.results: list[Tensor] | None = None  # what they give in a first one; None: nobody will ask

    def __call__(self, weights: LayerWeights, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.forward(x, cos, sin, weights)[0]
        return cast(Tensor, _Layer.apply(self, x, cos, sin, *weights))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, w: LayerWeights) -> tuple[Tensor, Kept]:
        packed, (q, k, v) = self._queries(x, cos, sin, w)
        attended: tuple[Tensor, ...] = ()
        if self.operators:  # inside, each operation costs some us
            with Once(self.operators, self.known) as once:
                out = self.attend(q, k, v)
            self.known, attended = None, tuple(once.results)
        else:
            out = self.attend(q, k, v)
        del q, k, v
        if self.results is not None:
            self.results += attended
        if self.keeps is Activations.keep and not self.tile:
            y, middle, wide = self.parts.finish(x, out, w, self.sizes)
            return y, Kept(x, packed, middle, wide, attended)
        (y,) = in_tiles(lambda x, out: self.parts.finish(x, out, w, self.sizes)[:1], self.tile, x, out)
        return y, Kept(x, packed, None, None, attended)

    def _queries(self, x: Tensor, cos: Tensor, sin: Tensor, w: LayerWeights) -> tuple[Tensor | None, Sequence[Tensor]]:
        """packed if it is kept; (q, k, v)"""

        def queries(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
            packed = self.parts.project(x, w, self.sizes)
            return (*self.parts.turn(packed, cos, sin, w, self.sizes), unpack(packed, self.sizes)[2])

        if self.keeps is not Activations.keep:
            return None, in_tiles(queries, self.tile, x, cos, sin)
        (packed,) = in_tiles(lambda x: (self.parts.project(x, w, self.sizes),), self.tile, x)
        return packed, self._turned(packed, cos, sin, w)

    def _turned(self, packed: Tensor, cos: Tensor, sin: Tensor, w: LayerWeights) -> tuple[Tensor, ...]:
        turn = self.parts.turn
        q, k = in_tiles(lambda *inputs: turn(*inputs, w, self.sizes), self.tile, packed, cos, sin)
        return q, k, unpack(packed, self.sizes)[2]

    def backward(
        self, dy: Tensor, kept: Kept, cos: Tensor, sin: Tensor, w: LayerWeights
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """(dx, gradients of w)"""
        x, packed, middle, wide, attended = kept
        if packed is None and not self.tile:
            packed = self.parts.project(x, w, self.sizes)
        queries = self._queries(x, cos, sin, w)[1] if packed is None else self._turned(packed, cos, sin, w)
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in queries]
            with Once(self.operators, attended or None):
                out = self.attend(*leaves)
        (dmiddle, dout), of_finish = self._summed(
            lambda *parts: self.parts.finish_backward(*parts, w, self.sizes), dy, x, out.detach(), middle, wide
        )
        dq, dk, dv = torch.autograd.grad(out, leaves, dout)
        del out, leaves, dout
        (dx,), of_project = self._summed(
            lambda *parts: self.parts.project_backward(*parts, w, self.sizes), dmiddle, dq, dk, dv, x, packed, cos, sin
        )
        gradients = zip((*of_project, *of_finish), w, strict=True)
        return dx, tuple(None if g is None else g.to(cast(Tensor, p).dtype) for g, p in gradients)

    def _summed(self, function: Callable[..., Any], *inputs: Tensor | None) -> Any:
        """``function(*inputs)``, which is (results by token, gradients of weights), in tiles: their gradients are
        added up in the accumulator's dtype."""
        sums: list[Tensor | None] = []

        def of_tile(*parts: Tensor | None) -> tuple[Tensor, ...]:
            by_token, gradients = function(*parts)
            if not sums:
                sums.extend(None if g is None else widened(g) if self.tile else g for g in gradients)
            else:
                for total, g in zip(sums, gradients, strict=True):
                    if total is not None:
                        total.add_(g)
            return by_token

        return in_tiles(of_tile, self.tile, *inputs), tuple(sums)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, x, cos, sin, *weights):  # type: ignore[no-untyped-def]
        # Detached: to torch.compile what needs a gradient is another kind of tensor, to be compiled for once more.
        y, kept = run.forward(x.detach(), cos, sin, LayerWeights(*weights))
        tensors = [*kept[:4], *kept.attended]
        ctx.run, ctx.waiting = run, None
        if run.memory is not None:
            ctx.waiting, tensors = run.memory.put(tensors), []
        # The parameters themselves and not views of them, which under ZeRO-3 would keep what was gathered alive.
        ctx.save_for_backward(cos, sin, *weights, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        cos, sin, *rest = ctx.saved_tensors
        n = len(LayerWeights._fields)
        weights, tensors = LayerWeights(*rest[:n]), rest[n:]
        del rest
        if ctx.waiting is not None:
            tensors, ctx.waiting = ctx.run.memory.take(ctx.waiting), None
        x, packed, middle, wide, *attended = tensors
        kept = Kept(x, packed, middle, wide, tuple(attended))
        dx, gradients = ctx.run.backward(dy, kept, cos, sin, weights)
        return None, dx, None, None, *gradients


class Once(TorchDispatchMode):
    """Inside, ``operators`` give what they gave before, if that is known, and their results are remembered."""

    def __init__(self, operators: set[str], known: Sequence[Tensor] | None) -> None:
        super().__init__()
        self.operators, self.known = operators, None if known is None else iter(known)
        self.results: list[Tensor] = []

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.name() not in self.operators:
            return function(*args, **(kwargs or {}))
        n = len(function._schema.returns)
        if self.known is None:
            given = function(*args, **(kwargs or {}))
        else:
            again = [next(self.known).detach() for _ in range(n)]  # autograd makes its own mark on each
            given = again if n > 1 else again[0]
        self.results += [x.detach() for x in (given if n > 1 else [given])]
        return given


def in_tiles(function: Tiled, tile: int, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """``function(*inputs)`` for ``tile`` tokens at a time: dim 1 of all that it takes and gives. 0: for all at once."""
    n = next(x.shape[1] for x in inputs if x is not None)
    if not tile or n <= tile:
        return tuple(function(*inputs))
    whole: tuple[Tensor, ...] = ()
    for part in tiles(n, tile):
        results = function(*(None if x is None else x[:, part] for x in inputs))
        if not whole:
            whole = tuple(x.new_empty((x.shape[0], n, *x.shape[2:])) for x in results)
        for all_of_it, x in zip(whole, results, strict=True):
            all_of_it[:, part] = x
        del results
    return whole


def tiles(n: int, tile: int) -> Iterator[slice]:
    """Runs of at most ``tile`` of n tokens, as equal as can be, so that few lengths are compiled."""
    count = -(-n // tile)
    size = -(-n // count)
    return (slice(start, min(start + size, n)) for start in range(0, n, size))
