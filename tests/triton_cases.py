"""Cases that the Triton backend is held to, on a GPU or in Triton's CPU interpreter, against float64.

Not a test module: interpreter mode is fixed when triton is imported, so these run in a process of their own there.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from unittest import mock

import torch
from reference import attention_reference, naive_attention
from torch import Tensor

from ringspan.kernels import triton_backend, triton_split
from ringspan.kernels.plan import Plan, plan
from ringspan.kernels.spans import Spans
from ringspan.kernels.triton_statistics import delta


@dataclass(frozen=True)
class Case:
    """One call: B batch, S queries, T keys, H query heads, K kv heads, D head dim; `mask` is a name of MASKS."""

    mask: str = "random"
    dtype: torch.dtype = torch.float32
    batch: int = 1
    queries: int = 100
    keys: int = 100
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 32
    softcap: float = 0.0
    into: bool = False  # merge with earlier blocks, add to given gradients
    fused: bool = False  # q, k and v are views of one projection
    seed: int = 0


def check(case: Case, device: str, block: int | None = None) -> None:
    """Forward and every gradient, against float64; AssertionError with the case and the two errors.

    `block`: rows and columns of every tile, in place of the configurations that ship; odd seeds keep offsets.
    """
    with ExitStack() as stack:
        if block is not None:
            config = triton_backend.Config(block, block, 4, 1, keep_offsets=case.seed % 2 == 1)
            for table in (triton_backend.FORWARD, triton_backend.DQ, triton_backend.DKDV):
                stack.enter_context(mock.patch.dict(table, dict.fromkeys(table, config)))
        _check(case, device)


def check_split(case: Case, device: str) -> None:
    """``check`` where few keys are enough for splitting them."""
    with (
        mock.patch.multiple(triton_split, MIN_KEYS=1, BLOCKS=1),
        mock.patch.object(triton_backend, "split_forward", wraps=triton_split.split_forward) as split,
    ):
        _check(case, device)
    assert split.called, case


def _check(case: Case, device: str) -> None:
    generator = torch.Generator().manual_seed(case.seed)
    q, k, v, dout = _inputs(case, generator, device)
    spans = MASKS[case.mask](case, generator).to(device)
    before = _earlier(case, generator, device) if case.into else None
    scale = case.head_dim**-0.5
    truth = _truth(case, q, k, v, dout, spans, before, scale)
    plain = _plain(case, q, k, v, dout, spans, scale)
    mask = plan(spans, case.keys)
    _check_forward(case, q, k, v, mask, before, scale, truth, plain)
    _check_backward(case, q, k, v, dout, mask, scale, truth, plain, generator)


def _check_forward(
    case: Case, q: Tensor, k: Tensor, v: Tensor, mask: Plan, before: tuple[Tensor, Tensor] | None, scale: float,
    truth: list[Tensor], plain: list[float],
) -> None:  # fmt: skip
    wide = torch.float32 if case.into and case.seed % 2 else case.dtype  # a ring's steps write fp32, its last one not
    given = None if before is None else (before[0].clone(), before[1].clone())
    view = None  # some heads of a wider tensor, where the result is not in place
    if case.seed % 3 and (given is None or given[0].dtype != wide):
        view = torch.full((*q.shape[:2], q.shape[2] + 1, q.shape[3]), torch.nan, dtype=wide, device=q.device)[:, :, 1:]
    out, lse = triton_backend.forward(
        q, k, v, mask, scale=scale, softcap=case.softcap, into=given, out_dtype=wide, out=view
    )
    assert view is None or out is view
    assert out.dtype == wide
    assert lse.dtype == torch.float32
    assert given is None or (lse is given[1] and (out is given[0]) == (wide == torch.float32))
    _close(case, "out", out, truth[0], plain[0])
    empty = truth[1] == -torch.inf
    assert torch.equal(lse == -torch.inf, empty), f"{case}: lse must be -inf in just the rows without keys"
    # Products of the inputs are exact and their sums fp32, whatever the inputs' dtype.
    bound = (16 + case.softcap) * torch.finfo(torch.float32).eps * _size(truth[1][~empty])
    error = _error(lse[~empty], truth[1][~empty])
    assert error <= bound, f"{case}: lse is off by {error:.3e}, the bound is {bound:.3e}"
    if before is not None:  # rows without keys in this block: not a bit of them moves
        idle = (mask.lo >= mask.hi).expand(case.batch, -1)
        assert torch.equal(out[idle], before[0][idle].to(wide)), f"{case}: out of a row without keys changed"
        assert torch.equal(lse.transpose(1, 2)[idle], before[1].transpose(1, 2)[idle]), f"{case}: its lse changed"


def _check_backward(
    case: Case, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: Plan, scale: float,
    truth: list[Tensor], plain: list[float], generator: torch.Generator,
) -> None:  # fmt: skip
    out, lse, *gradients = truth
    delta = (dout.double() * out).sum(-1).transpose(1, 2).float().contiguous()
    start = [torch.randn(x.shape, generator=generator).to(q.device) if case.into else None for x in (q, k, v)]
    fresh = case.into and case.seed % 3 == 0
    if fresh:
        start[1:] = [torch.full_like(x, torch.nan, dtype=torch.float32) for x in (k, v)]
    sums = [None if x is None else x.clone(memory_format=torch.contiguous_format) for x in start]
    given = dict(zip(("dq", "dk", "dv"), sums, strict=True))
    got = triton_backend.backward(
        dout, q, k, v, lse.float(), delta, mask, scale=scale, softcap=case.softcap, fresh=fresh, **given
    )
    # ds = p (dout.v - delta): with few keys the two nearly cancel, and delta's rounding stays
    terms = _size(delta)
    for i, name in enumerate(given):
        assert got[i].dtype == (torch.float32 if case.into else case.dtype)
        assert start[i] is None or got[i] is sums[i]
        first = None if fresh and i else start[i]
        _close(
            case, name, got[i], gradients[i] if first is None else gradients[i] + first.double(), plain[i + 1], terms
        )


def _inputs(case: Case, generator: torch.Generator, device: str) -> list[Tensor]:
    """q, k, v, dout."""

    def normal(rows: int, heads: int) -> Tensor:
        shape = (case.batch, rows, heads, case.head_dim)
        return torch.randn(shape, generator=generator).to(device, case.dtype)

    if not case.fused:
        inputs = ((case.queries, case.heads), (case.keys, case.kv_heads), (case.keys, case.kv_heads))
        return [normal(*shape) for shape in (*inputs, inputs[0])]
    assert case.queries == case.keys
    every = normal(case.queries, case.heads + 2 * case.kv_heads)
    dout = normal(case.heads, case.queries).transpose(1, 2)  # another order of dims than q's
    return [*every.split((case.heads, case.kv_heads, case.kv_heads), dim=2), dout]


def _earlier(case: Case, generator: torch.Generator, device: str) -> tuple[Tensor, Tensor]:
    """(out, lse) of earlier blocks; the first rows had no keys there."""
    out = torch.randn((case.batch, case.queries, case.heads, case.head_dim), generator=generator)
    lse = torch.randn((case.batch, case.heads, case.queries), generator=generator) * 3
    out[:, : case.queries // 3], lse[:, :, : case.queries // 3] = 0.0, -torch.inf
    return out.to(device), lse.to(device)


def _truth(
    case: Case, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, spans: Spans,
    before: tuple[Tensor, Tensor] | None, scale: float,
) -> list[Tensor]:  # fmt: skip
    """float64 (out, lse, dq, dk, dv)."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, lse = attention_reference(*leaves, spans.lo, spans.hi, scale, case.softcap, into=before)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout.double())]


def _plain(case: Case, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, spans: Spans, scale: float) -> list[float]:
    """Errors of out, dq, dk, dv where plain PyTorch computes them in the inputs' dtype."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = naive_attention(*leaves, spans.lo, spans.hi, scale, case.softcap)
    got = [out, *torch.autograd.grad(out, leaves, dout)]
    want = _truth(case, q, k, v, dout, spans, None, scale)
    return [_error(x, y) for x, y in zip(got, (want[0], *want[2:]), strict=True)]


def _error(got: Tensor, want: Tensor) -> float:
    return (got.double() - want).abs().max().item() if want.numel() else 0.0


def _size(values: Tensor) -> float:
    """The largest magnitude, at least 1."""
    return max(1.0, values.abs().max().item()) if values.numel() else 1.0


def _close(case: Case, name: str, got: Tensor, want: Tensor, plain: float, terms: float = 1.0) -> None:
    """At most twice the error of plain PyTorch in that dtype, plus eight roundings of the largest value.

    `terms` is the size of what was subtracted to get there. Softcapped scores carry the rounding of softcap * tanh.
    """
    bound = 2 * plain + (8 + case.softcap / 4) * torch.finfo(case.dtype).eps * max(_size(want), terms)
    error = _error(got, want)
    assert error <= bound, f"{case}: {name} is off by {error:.3e}, the bound is {bound:.3e}"  # NaN fails too


def _random(case: Case, generator: torch.Generator) -> Spans:
    """Any monotone bounds, a different mask for each batch row; about half of the rows are empty."""

    def bounds() -> Tensor:
        return torch.randint(0, case.keys + 1, (case.batch, case.queries), generator=generator).sort(1)[0].int()

    return Spans(bounds(), bounds())


def _packed(case: Case, generator: torch.Generator) -> Spans:
    assert case.queries == case.keys
    cuts = torch.randint(0, case.keys + 1, (case.batch, 4), generator=generator).sort(1)[0]
    ends = torch.cat([cuts, torch.full((case.batch, 1), case.keys)], 1)
    return Spans.packed(ends.diff(dim=1, prepend=torch.zeros(case.batch, 1, dtype=torch.int64)).tolist())


MASKS = {
    "random": _random,
    "packed": _packed,
    "causal": lambda case, _: Spans.causal(case.queries, case.keys),
    "window": lambda case, _: Spans.causal(case.queries, case.keys, window=max(1, case.keys // 3)),
    "full": lambda case, _: Spans.full(case.queries, case.keys),
    "none": lambda case, _: Spans(*torch.zeros(2, 1, case.queries, dtype=torch.int32)),
}


def check_delta(device: str) -> None:
    """rowsum(dout * out) - dlse to fp32 rounding, for odd sizes, strides of a view, and with or without dlse."""
    generator = torch.Generator().manual_seed(3)
    for batch, queries, heads, head_dim in ((2, 131, 3, 80), (1, 1, 1, 32), (1, 0, 2, 64)):
        dout = torch.randn(batch, heads, queries, head_dim, generator=generator).to(device).transpose(1, 2)
        out = torch.randn(batch, queries, heads, head_dim, generator=generator).to(device)
        dlse = torch.randn(batch, heads, queries, generator=generator).to(device)
        want = (dout.double() * out.double()).sum(-1).transpose(1, 2)
        # Products of size 1, head_dim of them: their sum's rounding grows like its root
        close = {"rtol": 0.0, "atol": 8 * torch.finfo(torch.float32).eps * head_dim**0.5}
        torch.testing.assert_close(delta(dout, out, None).double(), want, **close)
        torch.testing.assert_close(delta(dout, out, dlse).double(), want - dlse.double(), **close)
