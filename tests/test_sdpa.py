"""Attention under torch's and FlashAttention's signatures, against torch's own and against the definition, in fp64."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from reference import attention_reference
from test_spans import distance, matrix, random_spans
from torch import Tensor

from ringspan.kernels import sdpa
from ringspan.kernels.attention import attention
from ringspan.kernels.sdpa import flash_attn_func, flash_attn_varlen_func, scaled_dot_product_attention
from ringspan.kernels.spans import Spans

CLOSE = {"rtol": 1e-11, "atol": 1e-12}  # fp64, sums of at most 60 terms of size 1
B, H, L, S, E = 2, 4, 9, 7, 6


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def same(ours: Tensor, theirs: Tensor, leaves: list[Tensor], close: dict[str, float] = CLOSE) -> None:
    """Values and gradients."""
    torch.testing.assert_close(ours, theirs, **close)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=ours.dtype)
    grads = [torch.autograd.grad((out * weights).sum(), leaves) for out in (ours, theirs)]
    torch.testing.assert_close(*grads, **close)


def like_torch(leaves: list[Tensor], **given) -> None:
    both = (run(*leaves, **given) for run in (scaled_dot_product_attention, F.scaled_dot_product_attention))
    same(*both, leaves)


@pytest.mark.parametrize("queries, keys", [(4, 2), (3, 3)])
def test_every_small_mask_is_recognised_exactly_if_it_is_a_span(queries, keys):
    rising = [torch.tensor(x) for x in itertools.combinations_with_replacement(range(keys + 1), queries)]
    key = torch.arange(keys)
    masks = [(key >= lo[:, None]) & (key < hi[:, None]) for lo, hi in itertools.product(rising, rising)]
    possible = {tuple(mask.flatten().tolist()) for mask in masks}
    for bits in itertools.product((False, True), repeat=queries * keys):
        mask = torch.tensor(bits).view(1, queries, keys)
        if bits in possible:
            assert torch.equal(matrix(Spans.from_mask(mask).check(keys), keys), mask)
        else:
            with pytest.raises(ValueError, match="is no span: query"):
                Spans.from_mask(mask)


@pytest.mark.parametrize("seed", range(5))
def test_random_spans_are_recognised_from_their_mask(seed):
    generator = torch.Generator().manual_seed(seed)
    mask = matrix(random_spans(67, 40, generator, rows=3), 40)
    assert torch.equal(matrix(Spans.from_mask(mask).check(40), 40), mask)


@pytest.mark.parametrize(
    "change, message",
    [
        ((1, 5, 3, False), "row 1 is no span: query 5 sees 5 keys between 0 and 5, not all of them"),
        ((0, 8, slice(None), False), "query 8 sees no key, although a query before it and one after it share some"),
        ((1, 2, 8, True), "query 2 sees 4 keys between 0 and 8"),
        ((0, 3, slice(0, 9), True), "query 3 sees keys 0 to 8, and an earlier or later one reaches past"),
    ],
)
def test_what_is_no_span_is_refused_with_the_first_query(change, message):
    mask = matrix(Spans.causal(12), 12).expand(2, -1, -1).clone()
    row, query, keys, value = change
    mask[row, query, keys] = value
    if message.startswith("query 3"):
        message = "query 4 sees keys 0 to 4, and an earlier"
    with pytest.raises(ValueError, match=message):
        Spans.from_mask(mask)


@pytest.mark.parametrize("lead", [(), (3,), (B, H)], ids=["2d", "3d", "4d"])
@pytest.mark.parametrize("causal", [False, True])
def test_without_a_mask_as_torch(lead, causal):
    """is_causal starts at the first key, also where there are fewer keys or more than queries."""
    for queries, keys in ((L, S), (S, L), (1, L)):
        leaves = draw((*lead, queries, E), (*lead, keys, E), (*lead, keys, E))
        like_torch(leaves, is_causal=causal)
        like_torch(leaves, is_causal=causal, scale=0.3)


MASKS = {
    "causal": distance(L, L)[:, :S] >= 0,
    "documents": torch.block_diag(torch.ones(4, 3), torch.ones(5, 4)).bool(),
    "padding": torch.tensor([1, 1, 1, 1, 1, 0, 0]).bool()[None],
    "rows": torch.stack([distance(L, L)[:, :S] >= 0, torch.ones(L, S).bool()])[:, None],
    "some see nothing": distance(L, S) >= 0,
    "heads": torch.stack([(distance(L, L)[:, :S] >= 0) & (distance(L, L)[:, :S] < w) for w in (1, 2, 3, 9)])[None],
    "equal heads": (distance(L, L)[:, :S] >= 0).expand(B, H, L, S),
}


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("name", MASKS)
def test_masks_as_torch(name, kind):
    mask = MASKS[name]
    if kind == "float":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill_(~mask, -torch.inf)
    like_torch(draw((B, H, L, E), (B, H, S, E), (B, H, S, E)), attn_mask=mask)


def test_masks_without_batch_and_heads():
    masks = torch.stack([distance(L, L)[:, :S] < w for w in (1, 2, 3)]) & (distance(L, L)[:, :S] >= 0)
    like_torch(draw((3, L, E), (3, S, E), (3, S, E)), attn_mask=masks)
    like_torch(draw((L, E), (S, E), (S, E)), attn_mask=masks[2])


def test_shared_heads_and_values_of_another_dim():
    like_torch(draw((B, H, L, E), (B, 2, S, E), (B, 2, S, E)), attn_mask=MASKS["rows"], enable_gqa=True)
    for dim in (2, 11):
        like_torch(draw((B, H, L, E), (B, H, S, E), (B, H, S, dim)), is_causal=True)


def test_half_precision_is_no_worse_than_torch():
    for dtype in (torch.bfloat16, torch.float16):
        leaves = draw((2, 4, 130, 32), (2, 4, 130, 32), (2, 4, 130, 32), dtype=dtype)
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        errors = []
        for run, given in (
            (F.scaled_dot_product_attention, exact),
            (F.scaled_dot_product_attention, leaves),
            (scaled_dot_product_attention, leaves),
        ):
            out = run(*given, is_causal=True)
            found = [x.double() for x in (out, *torch.autograd.grad(out.double().square().sum(), given))]
            errors.append(found)
        for answer, theirs, ours in zip(*errors, strict=True):
            # Both round what they return, which is most of the error of both
            assert (ours - answer).square().mean() <= 1.1**2 * (theirs - answer).square().mean()


def test_under_autocast_the_result_is_in_its_dtype():
    leaves = draw((1, 2, 9, 8), (1, 2, 9, 8), (1, 2, 9, 8), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = scaled_dot_product_attention(leaves[0].bfloat16(), *leaves[1:], is_causal=True)
    assert out.dtype == torch.bfloat16
    exact = F.scaled_dot_product_attention(*(x.bfloat16().double() for x in leaves), is_causal=True)
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=2**-20)  # rounded once; sums are fp32


def test_autocast_rounds_nothing_within_attention():
    leaves = draw((1, 9, 2, 8), (1, 9, 2, 8), (1, 9, 2, 8), dtype=torch.float32)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = attention(*leaves, Spans.causal(9))
            found.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for plain, cast in zip(*found, strict=True):
        assert torch.equal(plain, cast)


REFUSED = [
    ({"dropout_p": 0.1}, "dropout_p=0.1: there is no dropout"),
    ({"attn_mask": torch.ones(L, S).bool(), "is_causal": True}, "give one"),
    ({"attn_mask": torch.randn(L, S)}, "adds to the scores: only 0 and -inf"),
    ({"attn_mask": torch.zeros(L, S, requires_grad=True)}, "adds to the scores"),
    ({"attn_mask": torch.ones(L, S + 1).bool()}, r"\(9, 8\) does not broadcast to .* = \(2, 4, 9, 7\)"),
    ({"attn_mask": torch.ones(3, 1, L, S).bool()}, "does not broadcast"),
    ({"attn_mask": torch.ones(1, B, H, L, S).bool()}, "does not broadcast"),
    ({"attn_mask": torch.eye(L, S).bool().flip(0)}, "is no span"),
]


@pytest.mark.parametrize("given, message", REFUSED)
def test_what_is_not_there_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        scaled_dot_product_attention(*draw((B, H, L, E), (B, H, S, E), (B, H, S, E)), **given)


def test_shapes_that_do_not_fit_are_refused():
    q, k = draw((B, H, L, E), (B, 2, S, E))
    with pytest.raises(ValueError, match="query has 4 heads, key 2: enable_gqa=True"):
        scaled_dot_product_attention(q, k, k)
    with pytest.raises(ValueError, match="differs between heads"):
        scaled_dot_product_attention(q, k, k, attn_mask=MASKS["heads"], enable_gqa=True)
    with pytest.raises(ValueError, match="fold further dimensions into batch"):
        scaled_dot_product_attention(q[None], k[None], k[None])
    with pytest.raises(ValueError, match="batch and dim must agree"):
        scaled_dot_product_attention(q[:1], k, k, enable_gqa=True)


def test_a_mask_is_read_once_and_again_when_it_has_changed(monkeypatch):
    reads = []
    read = Spans.from_mask
    monkeypatch.setattr(Spans, "from_mask", staticmethod(lambda mask: reads.append(1) or read(mask)))
    mask = matrix(Spans.causal(5), 5)[0]
    leaves = draw((1, 2, 5, 4), (1, 2, 5, 4), (1, 2, 5, 4))
    for _ in range(3):
        like_torch(leaves, attn_mask=mask)
    assert len(reads) == 1
    mask[3:, 0] = False
    like_torch(leaves, attn_mask=mask)
    assert len(reads) == 2
    like_torch([x.detach().expand(3, -1, -1, -1).requires_grad_() for x in leaves], attn_mask=mask)
    assert len(reads) == 3


def test_masks_seen_in_inference_mode_serve_training():
    leaves = draw((1, 2, 23, 4), (1, 2, 23, 4), (1, 2, 23, 4))
    mask = matrix(Spans.causal(23, window=5), 23)[0]
    with torch.inference_mode():
        for given in ({"is_causal": True}, {"attn_mask": mask}, {"attn_mask": mask.clone()}):
            scaled_dot_product_attention(*leaves, **given)
    like_torch(leaves, is_causal=True)
    like_torch(leaves, attn_mask=mask)


def banded(queries: int, keys: int, left: int, right: int) -> Spans:
    """FlashAttention's windows, from their definition."""
    behind = distance(queries, keys)
    seen = torch.ones_like(behind, dtype=torch.bool)
    if left >= 0:
        seen &= behind <= left
    if right >= 0:
        seen &= -behind <= right
    return Spans.from_mask(seen[None])


@pytest.mark.parametrize("queries, keys", [(9, 9), (4, 11), (11, 4)])
@pytest.mark.parametrize("window", [(-1, -1), (2, -1), (-1, 2), (3, 1), (0, 0), (50, 50)])
@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention(queries, keys, window, causal):
    leaves = draw((2, queries, 4, 6), (2, keys, 2, 6), (2, keys, 2, 6))
    out, lse, nothing = flash_attn_func(*leaves, causal=causal, window_size=window, return_attn_probs=True)
    spans = banded(queries, keys, window[0], 0 if causal else window[1])
    expected, expected_lse = attention_reference(*leaves, spans.lo, spans.hi, 6**-0.5)
    same(out, expected, leaves)
    torch.testing.assert_close(lse, expected_lse, **CLOSE)
    assert nothing is None
    capped = flash_attn_func(*leaves, 0.0, 0.2, causal, window, 1.5)
    same(capped, attention_reference(*leaves, spans.lo, spans.hi, 0.2, 1.5)[0], leaves)


@pytest.mark.parametrize("window", [(-1, -1), (2, -1), (3, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_over_documents(window, causal):
    lengths_q, lengths_k = [3, 0, 7, 1, 4], [5, 2, 4, 1, 0]
    queries, keys = sum(lengths_q) + 2, sum(lengths_k) + 3  # two and three after the last document
    leaves = draw((queries, 4, 6), (keys, 2, 6), (keys, 2, 6))
    ends = [torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32) for x in (lengths_q, lengths_k)]
    longest = max(lengths_q), max(lengths_k)
    out, lse, _ = flash_attn_varlen_func(
        *leaves, *ends, *longest, causal=causal, window_size=window, return_attn_probs=True
    )
    expected = torch.zeros_like(leaves[0])
    q, k, v = leaves
    for i, (n_q, n_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        mine, theirs = (slice(int(x[i]), int(x[i + 1])) for x in ends)
        spans = banded(n_q, n_k, window[0], 0 if causal else window[1])
        part, part_lse = attention_reference(
            q[None, mine], k[None, theirs], v[None, theirs], spans.lo, spans.hi, 6**-0.5
        )
        expected = torch.cat([expected[: mine.start], part[0], expected[mine.stop :]])
        torch.testing.assert_close(lse[:, mine], part_lse[0], **CLOSE)
    same(out, expected, leaves)
    assert not out[-2:].any()


def test_what_flash_attention_has_and_we_have_not_is_refused():
    q, ends = draw((1, 4, 2, 8))[0], torch.tensor([0, 4])
    flat = q[0], q[0], q[0], ends, ends, 4, 4
    for given, message in (
        ({"dropout_p": 0.5}, "dropout_p=0.5"),
        ({"alibi_slopes": torch.ones(2)}, "alibi_slopes: scores are not biased"),
    ):
        with pytest.raises(ValueError, match=message):
            flash_attn_func(q, q, q, **given)
        with pytest.raises(ValueError, match=message):
            flash_attn_varlen_func(*flat, **given)
    with pytest.raises(ValueError, match="block_table: keys in pages"):
        flash_attn_varlen_func(*flat, block_table=torch.zeros(1, 1))
    with pytest.raises(ValueError, match="cu_seqlens of 1 and 0 documents"):
        flash_attn_varlen_func(*flat[:4], ends[:1], 4, 4)
    flash_attn_func(q, q, q, deterministic=True)  # a CPU always is
    with pytest.raises(ValueError, match=r"torch\.use_deterministic_algorithms"):
        sdpa._refuse_what_flash_has(None, True, SimpleNamespace(device=torch.device("cuda")))
