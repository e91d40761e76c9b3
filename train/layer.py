"""A layer around its attention, as pure functions of tensors: project, turn, (attention), finish, and their gradients.

Gradients are written out, so that what is kept from forward is a choice (train/activations.py) and never autograd's,
and so that each function is one graph to torch.compile: no parameter belongs to a module there, which matters under
ZeRO-3, and nothing is traced twice.

Shapes: B rows, S tokens of this rank, H query heads, K key-value heads, D head dim, E = dim, M = mlp_dim.
  x, y (B, S, E): what comes into a layer and goes out      packed (B, S, (H + 2 K) D): q, k, v as projected
  q (B, S, H, D), k, v (B, S, K, D), out (B, S, H, D): around attention       middle (B, S, E): x + attention
  wide (B, S, 2 M): SwiGLU's gate and value                 cos, sin (B, S, 1, D): see `rotate`
Matrix products are in the weights' dtype; everything between them in fp32 (fp64 for fp64), rounded once.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ringspan.parallel.parts import within


class LayerWeights(NamedTuple):
    attention_norm: Tensor  # (E,)
    qkv: Tensor  # ((H + 2 K) D, E)
    q_norm: Tensor | None  # (D,); None: queries and keys are not normalised
    k_norm: Tensor | None
    attention_out: Tensor  # (E, H D)
    mlp_norm: Tensor  # (E,)
    gate_and_value: Tensor  # (2 M, E)
    mlp_out: Tensor  # (E, M)


class Sizes(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int
    eps: float  # of every norm


def project(x: Tensor, w: LayerWeights, sizes: Sizes) -> Tensor:
    """packed"""
    return F.linear(norm(x, w.attention_norm, sizes.eps), w.qkv)


def turn(packed: Tensor, cos: Tensor, sin: Tensor, w: LayerWeights, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """q and k, normalised and at their positions; v is as it is packed: see `values`."""
    q, k, _ = unpack(packed, sizes)
    if w.q_norm is not None and w.k_norm is not None:
        q, k = norm(q, w.q_norm, sizes.eps), norm(k, w.k_norm, sizes.eps)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def unpack(packed: Tensor, sizes: Sizes) -> list[Tensor]:
    """q, k, v as projected: views."""
    heads = packed.view(*packed.shape[:-1], -1, sizes.head_dim)
    return list(heads.split((sizes.heads, sizes.kv_heads, sizes.kv_heads), dim=2))


def finish(x: Tensor, out: Tensor, w: LayerWeights, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """(y, middle, wide)"""
    middle = x + F.linear(out.flatten(2), w.attention_out)
    wide = F.linear(norm(middle, w.mlp_norm, sizes.eps), w.gate_and_value)
    return middle + F.linear(swiglu(wide), w.mlp_out), middle, wide


def finish_backward(
    dy: Tensor, x: Tensor, out: Tensor, middle: Tensor | None, wide: Tensor | None, w: LayerWeights, sizes: Sizes
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    """((dmiddle, dout), gradients of w from attention_out on); middle and wide are computed again where they are None.

    dmiddle is the gradient of x too, as far as it does not come through attention.
    """
    if middle is None:
        middle = x + F.linear(out.flatten(2), w.attention_out)
    normed = norm(middle, w.mlp_norm, sizes.eps)
    if wide is None:
        wide = F.linear(normed, w.gate_and_value)
    hidden, dwide = swiglu_backward(dy @ w.mlp_out, wide)
    dmlp_out = weight_gradient(dy, hidden)
    dgate_and_value = weight_gradient(dwide, normed)
    through_norm, dmlp_norm = norm_backward(dwide @ w.gate_and_value, middle, w.mlp_norm, sizes.eps)
    dmiddle = (dy + through_norm).to(dy.dtype)
    dattention_out = weight_gradient(dmiddle, out.flatten(2))
    dout = (dmiddle @ w.attention_out).view(out.shape)
    return (dmiddle, dout), (dattention_out, dmlp_norm, dgate_and_value, dmlp_out)


def project_backward(
    dmiddle: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    x: Tensor,
    packed: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    w: LayerWeights,
    sizes: Sizes,
) -> tuple[tuple[Tensor], tuple[Tensor | None, ...]]:
    """((dx,), gradients of w up to k_norm); packed is computed again where it is None."""
    normed = norm(x, w.attention_norm, sizes.eps)
    dq, dk = (rotate(d, cos, -sin) for d in (dq, dk))  # a turn's transpose is the turn back
    dq_norm = dk_norm = None
    if w.q_norm is not None and w.k_norm is not None:
        q, k, _ = unpack(F.linear(normed, w.qkv) if packed is None else packed, sizes)
        dq, dq_norm = norm_backward(dq, q, w.q_norm, sizes.eps)
        dk, dk_norm = norm_backward(dk, k, w.k_norm, sizes.eps)
    dpacked = torch.cat([d.to(x.dtype) for d in (dq, dk, dv)], dim=2).flatten(2)
    through_norm, dattention_norm = norm_backward(dpacked @ w.qkv, x, w.attention_norm, sizes.eps)
    dx = (dmiddle + through_norm).to(x.dtype)
    return (dx,), (dattention_norm, weight_gradient(dpacked, normed), dq_norm, dk_norm)


def norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """RMSNorm (Zhang and Sennrich, arXiv 1910.07467): on a GPU one kernel, of eight, also where nothing is compiled."""
    return F.rms_norm(x, gain.shape, gain, eps)


def norm_backward(dy: Tensor, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(dx, dgain), neither rounded."""
    x32, dy32 = widened(x), widened(dy)
    scale = (x32.square().mean(-1, keepdim=True) + eps).rsqrt()
    unit, dunit = x32 * scale, dy32 * gain
    dx = scale * (dunit - unit * (dunit * unit).mean(-1, keepdim=True))
    return dx, (dy32 * unit).flatten(0, -2).sum(0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, S, heads, D) turned by its position's angles, numbers i and i + D / 2 as a pair: of cos both halves are the
    same, sin's first is negative. Five operations, which is what the host's time of a decoded token is made of."""
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)  # products are as wide as cos and sin


def swiglu(wide: Tensor) -> Tensor:
    """silu(gate) x value (Shazeer, arXiv 2002.05202), (B, S, M)."""
    gate, value = wide.chunk(2, dim=-1)
    return (F.silu(widened(gate)) * value).to(wide.dtype)


def swiglu_backward(dhidden: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
    """(swiglu(wide), dwide)"""
    gate, value = widened(wide).chunk(2, dim=-1)
    d32, sigmoid = widened(dhidden), gate.sigmoid()
    silu = gate * sigmoid
    dgate = d32 * value * (sigmoid + silu * (1 - sigmoid))
    return (silu * value).to(wide.dtype), torch.cat((dgate, d32 * silu), dim=-1).to(wide.dtype)


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """Of W in y = x W^T."""
    return dy.flatten(0, 1).T @ x.flatten(0, 1)


def widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Parts:
    """The functions above as a layer calls them: compiled by ``backend`` ("inductor"), or as they are (None).

    fullgraph: a graph break would be an error. All layers share one compilation; another length of rows is another,
    and from the second on lengths are symbols.
    """

    def __init__(self, backend: str | None = None) -> None:
        def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
            function = torch.compile(function, backend=backend, fullgraph=True) if backend else function
            return within("mlp")(function)

        self.project, self.turn, self.finish = compiled(project), compiled(turn), compiled(finish)
        self.finish_backward, self.project_backward = compiled(finish_backward), compiled(project_backward)


class CompileClock:
    """Seconds that torch.compile has taken in this process since the clock was made."""

    def __init__(self) -> None:
        from torch._dynamo import callback  # noqa: PLC0415 - takes seconds, and only who compiles needs it

        self.seconds, self.started, self.told = 0.0, 0.0, 0.0
        callback.on_compile_start(self._start)
        callback.on_compile_end(self._end)

    def _start(self, *_: object) -> None:
        self.started = time.perf_counter()

    def _end(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self.started

    def news(self) -> float | None:
        """Seconds since it was last asked; None where nothing was compiled."""
        new, self.told = self.seconds - self.told, self.seconds
        return new or None
