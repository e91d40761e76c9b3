"""Cases that the Hopper backend is held to, on a GPU or on the machine of `hopper_machine.py`, against float64."""

from dataclasses import dataclass, replace

import torch
from reference import attention_reference
from torch import Tensor

from ringspan.kernels import hopper_backend
from ringspan.kernels.plan import plan
from ringspan.kernels.spans import Spans


@dataclass(frozen=True)
class Case:
    """B batch, S queries, T keys, H query heads, K kv heads, D head dim; `mask` is a name of MASKS."""

    head_dim: int = 128
    queries: int = 256
    keys: int = 256
    heads: int = 2
    kv_heads: int = 2
    batch: int = 1
    mask: str = "causal"
    dtype: torch.dtype = torch.bfloat16
    softcap: float = 0.0
    into: bool = False  # merge with earlier blocks, and add to given gradients
    fused: bool = False  # q, k and v are views of one projection
    forward_only: bool = False
    deterministic: bool = False
    spread: float = 1.5  # of q and k: at 1.5 the softmax is not flat; at 4 maxima grow by more than 2^8 between tiles
    seed: int = 0


def random_bounds(case: Case, generator: torch.Generator) -> Spans:
    """Any monotone bounds, another mask for each batch row; about half of the rows are empty."""

    def bounds() -> Tensor:
        return torch.randint(0, case.keys + 1, (case.batch, case.queries), generator=generator).sort(1)[0].int()

    return Spans(bounds(), bounds())


def packed(case: Case, generator: torch.Generator) -> Spans:
    n = min(case.queries, case.keys)
    cuts = torch.randint(0, n + 1, (case.batch, 5), generator=generator).sort(1)[0]
    ends = torch.cat([cuts, torch.full((case.batch, 1), case.queries)], 1)
    return Spans.packed(ends.diff(dim=1, prepend=torch.zeros(case.batch, 1, dtype=torch.int64)).tolist()).padded(0, n)


MASKS = {
    "causal": lambda case, _: Spans.causal(case.queries, case.keys),
    "full": lambda case, _: Spans.full(case.queries, case.keys),
    "window": lambda case, _: Spans.causal(case.queries, case.keys, window=max(1, case.keys // 3)),
    "none": lambda case, _: Spans(*torch.zeros(2, 1, case.queries, dtype=torch.int32)),
    "last": lambda case, _: Spans.full(case.queries, case.keys).padded(case.keys - 1, case.keys),
    "packed": packed,
    "random": random_bounds,
}


def tensors(case: Case, generator: torch.Generator, device: str = "cuda") -> list[Tensor]:
    """q, k, v, dout."""

    def normal(rows: int, heads: int) -> Tensor:
        x = torch.randn(case.batch, rows, heads, case.head_dim, generator=generator)
        return (case.spread * x).to(device, case.dtype)

    if case.fused:
        every = normal(case.queries, case.heads + 2 * case.kv_heads)
        parts = every.split((case.heads, case.kv_heads, case.kv_heads), dim=2)
        return [*parts, normal(case.heads, case.queries).transpose(1, 2)]
    kv = (case.keys, case.kv_heads)
    return [normal(case.queries, case.heads), normal(*kv), normal(*kv), normal(case.queries, case.heads)]


def error(got: Tensor, want: Tensor, eps: float) -> float:
    """Root mean square error in units of eps of the values' own, or the largest in units of 8 eps of the largest.

    Sums of rounded terms end between 0.3 and 0.9 in either. Infinite where got is not finite.
    """
    if want.numel() == 0:
        return 0.0
    difference = got.double() - want
    if not difference.isfinite().all():
        return float("inf")
    # The floor is for gradients that are 0 but for cancellation: of a query with one key, say.
    rms = difference.square().mean().sqrt() / want.square().mean().sqrt().clamp(min=0.02)
    return max(rms.item(), difference.abs().max().item() / max(1.0, want.abs().max().item()) / 8) / eps


def run(case: Case, device: str = "cuda") -> dict[str, float]:
    """Errors by name, in units of what rounding explains: 1.5 is too much."""
    generator = torch.Generator().manual_seed(case.seed)
    q, k, v, dout = tensors(case, generator, device)
    spans = MASKS[case.mask](case, generator).to(device)
    mask, scale, eps = plan(spans, case.keys), case.head_dim**-0.5, torch.finfo(case.dtype).eps
    before = earlier(case, generator, device) if case.into else None
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want_out, want_lse = attention_reference(*leaves, spans.lo, spans.hi, scale, case.softcap, into=before)

    out_dtype = torch.float32 if case.into and case.seed % 2 else case.dtype  # a ring's steps write fp32, its last not
    given = None if before is None else (before[0].clone(), before[1].clone())
    poison(device)
    view = None  # some heads of a wider tensor, where the result is not in place
    if case.seed % 3 and (given is None or given[0].dtype != out_dtype):
        wider = (*q.shape[:2], q.shape[2] + 1, q.shape[3])
        view = torch.full(wider, torch.nan, dtype=out_dtype, device=device)[:, :, 1:]
    out, lse = hopper_backend.forward(
        q, k, v, mask, scale=scale, softcap=case.softcap, into=given, out_dtype=out_dtype, out=view
    )
    assert view is None or out is view
    synchronize(device)
    assert out.dtype == out_dtype
    assert lse.dtype == torch.float32
    empty = want_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty), "lse is -inf in other rows than those without keys"
    errors = {
        "out": error(out, want_out.detach(), eps),
        # fp32 throughout, but scores of up to 30 are summed by tensor cores, which truncate
        "lse": error(lse[~empty], want_lse.detach()[~empty], 32 * torch.finfo(torch.float32).eps),
    }
    if case.forward_only:
        return errors
    exact = torch.autograd.grad(want_out, leaves, dout.double())
    delta = (dout.double() * want_out.detach()).sum(-1).transpose(1, 2).float().contiguous()
    start = [torch.randn(x.shape, generator=generator).to(device) if case.into else None for x in (q, k, v)]
    fresh = case.into and case.seed % 2 == 0
    if fresh:
        start[1:] = [torch.full_like(x, torch.nan, dtype=torch.float32) for x in (k, v)]
    sums = [None if x is None else x.clone(memory_format=torch.contiguous_format) for x in start]
    poison(device)
    grads = hopper_backend.backward(
        dout, q, k, v, want_lse.detach().float().contiguous(), delta, mask,
        scale=scale, softcap=case.softcap, dq=sums[0], dk=sums[1], dv=sums[2], fresh=fresh,
        deterministic=case.deterministic,
    )  # fmt: skip
    synchronize(device)
    for name, x, truth, first in zip(("dq", "dk", "dv"), grads, exact, start, strict=True):
        assert x.dtype == (torch.float32 if case.into else case.dtype)
        errors[name] = error(x if first is None or (fresh and name != "dq") else x - first, truth, eps)
    return errors


def poison(device: str) -> None:
    """What torch.empty gives next is NaN, as this is freed at once."""
    if device == "cuda":
        torch.full((64 * 2**20,), float("nan"), device=device)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def earlier(case: Case, generator: torch.Generator, device: str) -> tuple[Tensor, Tensor]:
    """(out, lse) of earlier blocks; the first rows had no keys there."""
    out = torch.randn(case.batch, case.queries, case.heads, case.head_dim, generator=generator)
    lse = 3 * torch.randn(case.batch, case.heads, case.queries, generator=generator)
    out[:, : case.queries // 3], lse[:, :, : case.queries // 3] = 0.0, -torch.inf
    return out.to(device), lse.to(device)


def shapes(head_dim: int) -> list[Case]:
    """Tile edges, tails, batches whose neighbour must stay untouched, groups of heads, and every mask."""
    base = Case(head_dim=head_dim)
    lengths = [(1, 1), (64, 128), (127, 129), (128, 128), (129, 127), (193, 1), (1, 517), (300, 300), (1024, 1024)]
    cases = [replace(base, queries=s, keys=t, mask=m, batch=2) for s, t in lengths for m in ("causal", "full")]
    cases += [replace(base, queries=397, keys=397, mask=m, batch=3, heads=4, seed=s) for m in MASKS for s in (1, 2)]
    cases += [replace(base, queries=641, keys=385, heads=h, kv_heads=k, mask="random", batch=2)
              for h, k in ((4, 1), (6, 2), (8, 8))]  # fmt: skip
    cases += [replace(c, into=True, seed=s) for c in cases[9:] for s in (1, 2)]
    cases += [replace(base, queries=500, keys=500, heads=4, kv_heads=2, fused=True, batch=2, mask=m, dtype=d)
              for m in ("causal", "packed") for d in (torch.float16, torch.bfloat16)]  # fmt: skip
    cases += [replace(base, queries=900, keys=1200, heads=4, kv_heads=2, batch=2, mask=m, deterministic=True, seed=s)
              for m in MASKS for s in (1, 2)]  # fmt: skip
    cases += [replace(base, queries=333, keys=333, softcap=c, mask=m, into=i) for c in (2.0, 30.0)
              for m in ("causal", "random") for i in (False, True)]  # fmt: skip
    cases += [replace(base, queries=600, keys=900, mask=m, spread=4.0, into=i, forward_only=True)
              for m in MASKS for i in (False, True)]  # fmt: skip
    return cases


def fuzz(n: int, seed: int) -> list[Case]:
    """n random cases: shape x mask x dtype x groups of heads x softcap x merging."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*values):  # type: ignore[no-untyped-def]
        return values[int(torch.randint(len(values), (1,), generator=generator))]

    def length() -> int:
        return int(torch.randint(1, draw(20, 300, 900), (1,), generator=generator))

    cases = []
    for i in range(n):
        kv_heads, fused, queries = draw(1, 2, 3), draw(False, False, True), length()
        cases.append(
            Case(
                head_dim=draw(64, 128), queries=queries, keys=queries if fused else length(), fused=fused,
                heads=kv_heads * draw(1, 2, 5), kv_heads=kv_heads, batch=draw(1, 2, 3), mask=draw(*MASKS),
                dtype=draw(torch.bfloat16, torch.float16), softcap=draw(0.0, 0.0, 5.0), into=draw(False, True),
                deterministic=draw(False, True), seed=seed * 10**6 + i,
            )
        )  # fmt: skip
    return cases
