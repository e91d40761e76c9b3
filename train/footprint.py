"""Bytes of a model's activations, seen and not counted: a forward and a backward pass run on the meta device.

Of our own layers train/memory.py counts what they hold. Those of Transformers are autograd's, which keeps twice as much
of a Llama's; what it keeps of any other model nobody has written down.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode

from ringspan.kernels.attention import accumulator, fake_backward, fake_forward

TOKENS = 2**16  # so many that what does not grow with them is nothing beside them


class Footprint(NamedTuple):
    """Bytes a token."""

    kept: float  # from forward for backward, by all layers
    layer: float  # beside it, at the worst moment of the backward pass


class Live(TorchDispatchMode):
    """Bytes of the tensors that are alive, now and at most, less those in ``known``."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen = {x.untyped_storage()._cdata for x in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in self.seen:
                storage = x.untyped_storage()
                self.seen.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def footprint(hidden_states: Callable[[Tensor, Callable[..., Tensor]], Tensor], held: list[Tensor]) -> Footprint:
    """``hidden_states(tokens, attend)`` of a model on the meta device, of which ``held`` is there already."""
    for p in held:
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))  # counted elsewhere
    tokens = torch.zeros(1, TOKENS, dtype=torch.int64, device="meta")
    with Live([*held, tokens]) as live:
        hidden = hidden_states(tokens, lambda q, k, v, **_: _Attention.apply(q, k, v))
        kept = live.most = live.now
        hidden.backward(torch.empty_like(hidden))
    return Footprint(kept / TOKENS, (live.most - kept) / TOKENS)


class _Attention(torch.autograd.Function):
    """What attention keeps and allocates, without its numbers; in backward the sums of a ring."""

    @staticmethod
    def forward(ctx, q, k, v):  # type: ignore[no-untyped-def]
        out, lse = fake_forward(q, k, v, None)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        q, k, v, _, lse = ctx.saved_tensors
        sums = [torch.empty_like(x, dtype=accumulator(x.dtype)) for x in (q, k, v)]
        dq, dk, dv, _ = fake_backward(dout, lse, q, k, v, None)
        del sums
        return dq, dk, dv
