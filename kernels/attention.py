"""Flash attention over spans: exact, differentiable, memory linear in length, on whatever backend the device has.

Tiling and the recomputing backward are Dao et al., FlashAttention (arXiv 2205.14135, 2307.08691); blocks merge by
their log-sum-exp as in Milakov and Gimelshein's online softmax (arXiv 1805.02867).
"""

import importlib
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ringspan.kernels.plan import Plan, plan
from ringspan.kernels.spans import Spans

BACKENDS = ("torch", "triton")
Mask = Spans | Plan | Sequence[Spans | Plan]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Mask,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q.k) v over the keys that ``spans`` lets each query see; differentiable, compile-able.

    q is (batch, queries, heads, dim), k and v are (batch, keys, kv_heads, dim) with heads a multiple of kv_heads;
    bf16, fp16, fp32 or fp64, any strides. ``spans`` may be several disjoint ones, or Plans made before. ``scale``
    defaults to dim ** -0.5; ``softcap`` c > 0 bends scores to c tanh(score / c); ``sinks`` (heads,) are logits that
    take part in the softmax without a value. Returns out like q, and with ``return_lse`` also the natural-log sum of
    exponents, fp32 (batch, heads, queries), whose gradient is honoured. A query without keys gives 0 and -inf.
    ValueError: shapes, dtypes or a backend that do not fit.
    """
    masks = [spans] if isinstance(spans, (Spans, Plan)) else list(spans)
    plans = [mask if isinstance(mask, Plan) else plan(mask.to(q.device), k.shape[1]) for mask in masks]
    check_shapes(q, k, v, plans, sinks)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    flat = [tensor for one in plans for tensor in one]
    out, lse = _attention(q, k, v, sinks, flat, scale, softcap, pick_backend(backend, q))
    return (out, lse) if return_lse else out


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    scale: float,
    softcap: float = 0.0,
    into: tuple[Tensor, Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(out, lse) of one block of keys, merged into what earlier blocks gave; not differentiable.

    ``into`` is (out, lse) in the accumulator's dtype (fp32; fp64 for fp64 inputs). Its lse is updated in place; its
    out too when ``out_dtype`` (default q's) is its dtype, else the result is a new tensor of ``out_dtype``.
    """
    module = _backend(pick_backend(backend, q))
    return module.forward(
        q, k, v, plan, scale=scale, softcap=softcap, into=into, out_dtype=q.dtype if out_dtype is None else out_dtype
    )


def attention_delta(dout: Tensor, out: Tensor, dlse: Tensor | None = None) -> Tensor:
    """rowsum(dout * out) - dlse, (batch, heads, queries) in the accumulator's dtype: once a layer, not once a block."""
    wide = accumulator(out.dtype)
    delta = torch.empty(out.shape[0], out.shape[2], out.shape[1], dtype=wide, device=out.device)
    # In slices of the sequence: the products in fp32 are twice the size of out, and need not all exist at once.
    for part, dout_part, out_part in zip(
        delta.split(_DELTA_ROWS, dim=2), dout.split(_DELTA_ROWS, dim=1), out.split(_DELTA_ROWS, dim=1), strict=True
    ):
        part.copy_((dout_part.to(wide) * out_part.to(wide)).sum(dim=-1).transpose(1, 2))
    return delta if dlse is None else delta.sub_(dlse)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    plan: Plan,
    *,
    scale: float,
    softcap: float = 0.0,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of one block of keys, given the lse and delta of all of them.

    A gradient that is given (accumulator's dtype, contiguous) is added to in place; one that is None comes back
    new, in its input's dtype. dk and dv sum the query heads of their group in a fixed order.
    """
    module = _backend(pick_backend(backend, q))
    return module.backward(dout, q, k, v, lse, delta, plan, scale=scale, softcap=softcap, dq=dq, dk=dk, dv=dv)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and of lse: fp32, and fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def sink_start(q: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) before any key: sinks are attention's first accumulator, and kernels know nothing of them."""
    wide = accumulator(q.dtype)
    lse = sinks.to(wide)[None, :, None].expand(q.shape[0], -1, q.shape[1])
    return torch.zeros(q.shape, dtype=wide, device=q.device), lse.clone(memory_format=torch.contiguous_format)


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """d loss / d sinks: a sink is a key whose value is 0, so its score's gradient is p (0 - delta)."""
    p = (sinks.to(lse.dtype)[None, :, None] - lse).exp()
    return -(p * delta).sum(dim=(0, 2)).to(sinks.dtype)


def pick_backend(name: str, q: Tensor) -> str:
    """The backend that runs: ``name``, or for "auto" the fastest one that q's device and dtype allow.

    ValueError: an unknown name, or a backend asked for by name that cannot run q.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend={name!r}: must be one of auto, {', '.join(BACKENDS)}")
    refusal = _triton_refusal(q)
    if name == "triton" and refusal:
        raise ValueError(f"backend='triton' cannot run here: {refusal}; use backend='torch' or 'auto'")
    if name == "auto":
        return "torch" if refusal or q.device.type != "cuda" else "triton"
    return name


def check_shapes(q: Tensor, k: Tensor, v: Tensor, plans: Sequence[Plan], sinks: Tensor | None) -> None:
    """ValueError with the values, where q, k, v, the masks and the sinks do not fit together."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4 or k.shape != v.shape:
        raise ValueError(f"{shapes}: q is (batch, queries, heads, dim), k and v are (batch, keys, kv_heads, dim)")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{shapes}: batch and dim must agree")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{shapes}: heads={q.shape[2]} must be a multiple of kv_heads={k.shape[2]}")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: they need one floating dtype")
    for one in plans:
        if one.lo.shape[1] != q.shape[1] or one.query_lo.shape[1] != k.shape[1] or one.lo.shape[0] not in (1, len(q)):
            raise ValueError(
                f"{shapes}: the mask is for {one.lo.shape[1]} queries, {one.query_lo.shape[1]} keys "
                f"and {one.lo.shape[0]} rows"
            )
    if sinks is not None and sinks.shape != (q.shape[2],):
        raise ValueError(f"sinks {tuple(sinks.shape)}: one logit a head, ({q.shape[2]},)")


_DELTA_ROWS = 4096


def _triton_refusal(q: Tensor) -> str | None:
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtype {q.dtype} is not bf16, fp16 or fp32"
    if q.shape[-1] > 256:
        return f"head dim {q.shape[-1]} is above 256"
    if q.device.type == "cuda":
        capability = torch.cuda.get_device_capability(q.device)
        return None if capability >= (8, 0) else f"compute capability {capability} is below (8, 0)"
    # Triton fixes its interpreter mode when it is imported, from this variable alone.
    interpreter = os.environ.get("TRITON_INTERPRET") == "1"
    return None if q.device.type == "cpu" and interpreter else f"no CUDA device (q is on {q.device})"


def _backend(name: str) -> ModuleType:
    return importlib.import_module(f"ringspan.kernels.{name}_backend")


def _plans(flat: Sequence[Tensor]) -> list[Plan]:
    size = len(Plan._fields)
    return [Plan(*flat[at : at + size]) for at in range(0, len(flat), size)]


@torch.library.custom_op("ringspan::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    plans: Sequence[Tensor],
    scale: float,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    masks = _plans(plans)
    result = None if sinks is None else sink_start(q, sinks)
    for mask in masks:
        out_dtype = q.dtype if mask is masks[-1] else accumulator(q.dtype)
        result = attention_forward(
            q, k, v, mask, scale=scale, softcap=softcap, into=result, out_dtype=out_dtype, backend=backend
        )
    assert result is not None, "attention without a mask"
    return result


@_attention.register_fake
def _(q, k, v, sinks, plans, scale, softcap, backend):  # type: ignore[no-untyped-def]
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=accumulator(q.dtype))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@torch.library.custom_op("ringspan::attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    plans: Sequence[Tensor],
    scale: float,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    masks = _plans(plans)
    delta = attention_delta(dout, out, dlse)
    several = len(masks) > 1
    grads: list[Tensor | None] = [
        torch.zeros(x.shape, dtype=accumulator(x.dtype), device=x.device) if several else None for x in (q, k, v)
    ]
    for mask in masks:
        dq, dk, dv = grads
        grads = list(
            attention_backward(
                dout, q, k, v, lse, delta, mask, scale=scale, softcap=softcap, dq=dq, dk=dk, dv=dv, backend=backend
            )
        )
    dq, dk, dv = (grad.to(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True) if grad is not None)
    return dq, dk, dv, q.new_empty(0) if sinks is None else sink_gradient(sinks, lse, delta)


@_attention_backward.register_fake
def _(dout, dlse, q, k, v, sinks, out, lse, plans, scale, softcap, backend):  # type: ignore[no-untyped-def]
    grads = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return *grads, q.new_empty(0) if sinks is None else torch.empty_like(sinks)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, sinks, plans, ctx.scale, ctx.softcap, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, sinks, *output, *plans)
    ctx.n_plans = len(plans)


def _gradients(ctx, dout, dlse):  # type: ignore[no-untyped-def]
    q, k, v, sinks, out, lse, *plans = ctx.saved_tensors
    dq, dk, dv, dsinks = _attention_backward(
        dout, dlse, q, k, v, sinks, out, lse, plans, ctx.scale, ctx.softcap, ctx.backend
    )
    return dq, dk, dv, None if sinks is None else dsinks, [None] * ctx.n_plans, None, None, None


_attention.register_autograd(_gradients, setup_context=_setup)
