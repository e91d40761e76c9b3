"""Flash attention over spans: exact, differentiable, memory linear in length, on whatever backend the device has.

Tiling and the recomputing backward are Dao et al., FlashAttention (arXiv 2205.14135, 2307.08691); blocks merge by
their log-sum-exp as in Milakov and Gimelshein's online softmax (arXiv 1805.02867).
"""

import functools
import importlib
import importlib.util
import itertools
import math
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringspan.kernels.plan import Plan, plan
from ringspan.kernels.spans import Spans, is_known

BACKENDS = ("hopper", "triton", "torch")  # fastest first: the order in which "auto" tries them
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
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
    Results are the same bits at each run, but for the gradient of q on Hopper GPUs, where that has its price and is so
    under ``torch.use_deterministic_algorithms``.
    ValueError: shapes, dtypes, a mask or a backend that do not fit.
    """
    masks = [spans] if isinstance(spans, (Spans, Plan)) else list(spans)
    if not masks:
        raise ValueError("spans is an empty list: give one mask or more")
    plans = [mask if isinstance(mask, Plan) else plan(mask, k.shape[1], q.device) for mask in masks]
    scale = check_inputs(q, k, v, plans, sinks, scale, softcap)
    _check_disjoint(masks)
    flat = [tensor for one in plans for tensor in one]
    out, lse = _Attention.apply(q, k, v, sinks, flat, scale, softcap, pick_backend(backend, q, k, v))
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
    out: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(out, lse) of one block of keys, merged into what earlier blocks gave; not differentiable.

    ``into`` is (out, lse) in the accumulator's dtype (fp32; fp64 for fp64 inputs). Its lse is updated in place; its
    out too when ``out_dtype`` (default q's) is its dtype, else the result is a new tensor of ``out_dtype``, or ``out``,
    which has q's shape and may be some heads of a wider tensor. ``backend`` is "auto", or what ``pick_backend`` gave
    for the whole call: a ring does not ask again at each block.
    """
    module = _backend(pick_backend(backend, q, k, v) if backend == "auto" else backend)
    out_dtype = q.dtype if out_dtype is None else out_dtype
    if out is not None:
        assert out.shape == q.shape, f"out {tuple(out.shape)}, q {tuple(q.shape)}"
        assert out.dtype == out_dtype, f"out is {out.dtype}, not {out_dtype}"
        assert into is None or into[0].dtype != out_dtype, "the result is in place already"
    return module.forward(q, k, v, plan, scale=scale, softcap=softcap, into=into, out_dtype=out_dtype, out=out)


def attention_delta(dout: Tensor, out: Tensor, dlse: Tensor | None = None) -> Tensor:
    """rowsum(dout * out) - dlse, (batch, heads, queries) in the accumulator's dtype: once a layer, not once a block."""
    if out.device.type == "cuda" and out.dtype != torch.float64 and _has_triton():
        return importlib.import_module("ringspan.kernels.triton_statistics").delta(dout, out, dlse)
    wide = accumulator(out.dtype)
    delta = (dout.to(wide) * out.to(wide)).sum(dim=-1).transpose(1, 2).contiguous()
    return delta if dlse is None else delta - dlse


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
    fresh: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of one block of keys, given the lse and delta of all of them.

    A gradient that is given (accumulator's dtype, contiguous) is added to in place; one that is None comes back
    new, in its input's dtype. With ``fresh``, dk and dv are given but hold nothing yet, and are written whole. dk and
    dv sum the query heads of their group in a fixed order.
    """
    module = _backend(pick_backend(backend, q, k, v) if backend == "auto" else backend)
    assert not fresh or (dk is not None and dv is not None), "fresh: dk and dv are given"
    return module.backward(
        dout, q, k, v, lse, delta, plan, scale=scale, softcap=softcap, dq=dq, dk=dk, dv=dv, fresh=fresh
    )


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
    p = (sinks.to(lse.dtype)[None, :, None] - lse).exp().masked_fill(lse == -torch.inf, 0.0)  # no key, and no sink
    return -(p * delta).sum(dim=(0, 2)).to(sinks.dtype)


def pick_backend(name: str, q: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> str:
    """The backend that runs: ``name``, or for "auto" the fastest one that can run these; k and v default to q's like.

    ValueError: an unknown name, or a backend asked for by name that cannot run them, and why.
    """
    k, v = q if k is None else k, q if v is None else v
    if name == "auto":
        # Triton's interpreter is for tests: slower than plain PyTorch, so never picked without being asked for.
        tried = BACKENDS if q.device.type == "cuda" else ("torch",)
        return next(backend for backend in tried if refusal(backend, q, k, v) is None)
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r}: must be one of auto, {', '.join(BACKENDS)}")
    if why := refusal(name, q, k, v):
        raise ValueError(f"backend={name!r} cannot run here: {why}; use backend='auto'")
    return name


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plans: Sequence[Plan],
    sinks: Tensor | None,
    scale: float | None,
    softcap: float,
) -> float:
    """The scale. ValueError with the values, where what attention is given does not fit together or is no number."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4 or k.shape != v.shape:
        raise ValueError(f"{shapes}: q is (batch, queries, heads, dim), k and v are (batch, keys, kv_heads, dim)")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{shapes}: batch and dim must agree")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{shapes}: heads={q.shape[2]} must be a multiple of kv_heads={k.shape[2]}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: they need one dtype, bf16, fp16, fp32 or fp64")
    devices = [x.device for x in (q, k, v, *(one.lo for one in plans), *([] if sinks is None else [sinks]))]
    if any(device != q.device for device in devices):
        raise ValueError(f"q, k, v, masks and sinks are on {', '.join(map(str, devices))}: move them to {q.device}")
    for one in plans:
        if one.lo.shape[1] != q.shape[1] or one.query_lo.shape[1] != k.shape[1] or one.lo.shape[0] not in (1, len(q)):
            raise ValueError(
                f"{shapes}: the mask is for {one.lo.shape[1]} queries, {one.query_lo.shape[1]} keys "
                f"and {one.lo.shape[0]} rows"
            )
    if sinks is not None and sinks.shape != (q.shape[2],):
        raise ValueError(f"sinks {tuple(sinks.shape)}: one logit a head, ({q.shape[2]},)")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap={softcap}: must be 0, which is none, or more")
    if scale is None:
        return q.shape[-1] ** -0.5
    if not 0 <= scale < math.inf:
        raise ValueError(f"scale={scale}: must be 0 or more; negate q instead")
    return scale


def _check_disjoint(masks: Sequence[Spans | Plan]) -> None:
    """ValueError: a key that two of them show to one query, where that can be seen: it would count twice."""
    for (i, a), (j, b) in itertools.combinations(enumerate(masks), 2):
        if is_known(a.lo) and is_known(b.lo) and bool((a.lo.maximum(b.lo) < a.hi.minimum(b.hi)).any()):
            raise ValueError(f"spans {i} and {j} of the list share keys: make them disjoint, by `padded` or `&`")


def refusal(name: str, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the backend cannot run these; None if it can."""
    if name == "torch":
        return None
    if not _has_triton():
        return "triton is not installed"
    return _backend(name).supports(q, k, v)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _backend(name: str) -> ModuleType:
    return importlib.import_module(f"ringspan.kernels.{name}_backend")


def _plans(flat: Sequence[Tensor]) -> list[Plan]:
    size = len(Plan._fields)
    return [Plan(*flat[at : at + size]) for at in range(0, len(flat), size)]


class _Attention(torch.autograd.Function):
    """Autograd around the two operators: a Function of ours costs a fifth of what torch.library's own does a call."""

    @staticmethod
    def forward(ctx, q, k, v, sinks, plans, *settings):  # type: ignore[no-untyped-def]
        out, lse = torch.ops.ringspan.attention(q, k, v, sinks, plans, *settings)
        ctx.save_for_backward(q, k, v, sinks, out, lse, *plans)
        ctx.settings = settings
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):  # type: ignore[no-untyped-def]
        q, k, v, sinks, out, lse, *plans = ctx.saved_tensors
        dq, dk, dv, dsinks = torch.ops.ringspan.attention_backward(
            dout, dlse, q, k, v, sinks, out, lse, plans, *ctx.settings
        )
        return dq, dk, dv, None if sinks is None else dsinks, None, *[None] * len(ctx.settings)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    plans: Sequence[Tensor],
    scale: float,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    masks, module = _plans(plans), _backend(backend)  # picked by `attention`, which has checked that it can
    result = None if sinks is None else sink_start(q, sinks)
    for mask in masks:
        out_dtype = q.dtype if mask is masks[-1] else accumulator(q.dtype)
        result = module.forward(q, k, v, mask, scale=scale, softcap=softcap, into=result, out_dtype=out_dtype)
    assert result is not None, "attention without a mask"
    return result


def _backward(
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
    masks, module = _plans(plans), _backend(backend)  # picked by `attention`, which has checked that it can
    delta = attention_delta(dout, out, dlse)
    several = len(masks) > 1
    grads: list[Tensor | None] = [
        torch.zeros(x.shape, dtype=accumulator(x.dtype), device=x.device) if several else None for x in (q, k, v)
    ]
    for mask in masks:
        dq, dk, dv = grads
        grads = list(
            module.backward(dout, q, k, v, lse, delta, mask, scale=scale, softcap=softcap, dq=dq, dk=dk, dv=dv)
        )
    dq, dk, dv = (grad.to(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True) if grad is not None)
    return dq, dk, dv, q.new_empty(0) if sinks is None else sink_gradient(sinks, lse, delta)


def fake_forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *_: object) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of (out, lse), for torch.compile; the ring's are the same."""
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=accumulator(q.dtype))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


def fake_backward(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of (dq, dk, dv, dsinks); dsinks is empty where there are none."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv, q.new_empty(0) if sinks is None else torch.empty_like(sinks)


def define_operators(
    name: str,
    settings: str,
    forward: Callable[..., object],
    backward: Callable[..., object],
    *,
    backward_settings: str | None = None,
    fake: Callable[..., object] = fake_backward,
) -> None:
    """torch.ops.ringspan.NAME and NAME_backward: functional, and one each to torch.compile and to checkpointing.

    ``settings`` are what both take after the tensors, in torch's schema language; ``backward_settings`` replaces them
    where the backward pass takes more. ``fake`` gives the shapes and dtypes of its results.
    """
    tensors = "Tensor q, Tensor k, Tensor v, Tensor? sinks"
    _define(f"{name}({tensors}, {settings}) -> (Tensor, Tensor)", forward, fake_forward)
    _define(
        f"{name}_backward(Tensor dout, Tensor dlse, {tensors}, Tensor out, Tensor lse, {backward_settings or settings})"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        backward,
        fake,
    )


def _define(schema: str, run: Callable[..., object], fake: Callable[..., object]) -> None:
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ringspan::{name}", fake, lib=LIBRARY)


LIBRARY = torch.library.Library("ringspan", "FRAGMENT")
define_operators("attention", "Tensor[] plans, float scale, float softcap, str backend", _forward, _backward)
