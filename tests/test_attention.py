"""The torch backend and the operator around all backends, against the definition in float64."""

import pytest
import torch
from reference import attention_reference, naive_attention
from test_spans import random_spans
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ringspan.kernels.attention import attention, attention_backward, attention_delta, attention_forward
from ringspan.kernels.plan import plan
from ringspan.kernels.spans import Spans

MASKS = {
    "causal": lambda s, t, g: Spans.causal(s, t),
    "full": lambda s, t, g: Spans.full(s, t),
    "window": lambda s, t, g: Spans.causal(s, t, window=5),
    "packed": lambda s, t, g: Spans.packed([s // 3, s - s // 3]).padded(0, t),
    "blocks": lambda s, t, g: Spans.causal(s).with_blocks([(s // 4, s // 2)]).padded(0, t),
    "padded": lambda s, t, g: Spans.causal(s, t).padded(t // 5, t - t // 5),
    "random": random_spans,
}


def inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], torch.Generator]:
    batch, queries, keys, heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = [(batch, queries, heads, dim), (batch, keys, kv_heads, dim), (batch, keys, kv_heads, dim)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes], generator


def gradients(out: Tensor, lse: Tensor, leaves: list[Tensor], seed: int = 1) -> tuple[Tensor, ...]:
    """Of a random function of out and of the lse that is finite."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (out, lse)]
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    return torch.autograd.grad((out.double() * weights[0]).sum() + (finite.double() * weights[1]).sum(), leaves)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1, 8), (2, 131, 131, 4, 2, 16), (1, 257, 300, 6, 1, 24), (2, 5, 131, 3, 3, 8)]
)
@pytest.mark.parametrize("softcap, with_sinks", [(0.0, False), (1.5, True)])
def test_every_mask_in_fp64(mask, shape, softcap, with_sinks):
    leaves, generator = inputs(shape, torch.float64)
    spans = MASKS[mask](shape[1], shape[2], generator)
    if with_sinks:
        leaves.append(torch.randn(shape[3], generator=generator, dtype=torch.float64))
    for leaf in leaves:
        leaf.requires_grad_()
    sinks = leaves[3] if with_sinks else None
    out, lse = attention(*leaves[:3], spans, softcap=softcap, sinks=sinks, return_lse=True)
    expected = attention_reference(*leaves[:3], spans.lo, spans.hi, shape[-1] ** -0.5, softcap, sinks)
    close = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close((out, lse), expected, **close)
    torch.testing.assert_close(gradients(out, lse, leaves), gradients(*expected, leaves), **close)


@pytest.mark.parametrize("dtype, factor", [(torch.float32, 1.5), (torch.float16, 1.05), (torch.bfloat16, 1.05)])
def test_no_worse_than_plain_pytorch_in_the_same_dtype(dtype, factor):
    """fp32: both errors are a few eps, ours from the recomputed exponents; below fp32 ours has the wider sums."""
    leaves, _ = inputs((2, 301, 301, 4, 2, 32), dtype)
    spans = Spans.packed([100, 201])
    for leaf in leaves:
        leaf.requires_grad_()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    scale = 32**-0.5
    expected, lse = attention_reference(*exact, spans.lo, spans.hi, scale)
    answers = [expected, *gradients(expected, torch.zeros_like(lse), exact)]

    def errors(out: Tensor) -> list[float]:
        found = [out, *gradients(out, torch.zeros_like(lse), leaves)]
        return [(x.double() - y).square().mean().sqrt().item() for x, y in zip(found, answers, strict=True)]

    ours = errors(attention(*leaves, spans))
    plain = errors(naive_attention(*leaves, spans.lo, spans.hi, scale))
    for mine, theirs in zip(ours, plain, strict=True):
        assert mine <= factor * theirs


def test_gradcheck():
    leaves, generator = inputs((2, 9, 12, 4, 2, 5), torch.float64)
    leaves.append(torch.randn(4, generator=generator, dtype=torch.float64))
    for leaf in leaves:
        leaf.requires_grad_()
    spans = Spans.causal(9, 12)

    def both(q, k, v, sinks):
        return attention(q, k, v, spans, softcap=2.0, sinks=sinks, return_lse=True)

    assert torch.autograd.gradcheck(both, leaves)


def test_disjoint_spans_are_one_mask():
    """The first 7 tokens and a window of 20: not a span, but two."""
    leaves, _ = inputs((2, 150, 150, 4, 2, 16), torch.float64)
    window = Spans.causal(150, window=20)
    first = Spans.full(150, 7) & Spans(torch.zeros_like(window.lo), window.lo)
    for leaf in leaves:
        leaf.requires_grad_()
    out, lse = attention(*leaves, [first, window], return_lse=True)
    q, k, v = leaves
    parts = attention_reference(q, k, v, first.lo, first.hi, 0.25)
    expected = attention_reference(q, k, v, window.lo, window.hi, 0.25, into=parts)
    torch.testing.assert_close((out, lse), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(out, lse, leaves), gradients(*expected, leaves), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("make", [lambda: Spans.causal(40, 90, window=45), lambda: Spans.causal(40, 90).padded(0, 61)])
def test_blocks_merge_into_what_is_there(make):
    """Keys in three parts, into one fp64 result and one set of gradients, is what all keys give at once."""
    (q, k, v), generator = inputs((2, 40, 90, 4, 2, 8), torch.float64)
    spans, dout = make(), torch.randn(q.shape, generator=generator, dtype=torch.float64)
    whole = attention_forward(q, k, v, plan(spans, 90), scale=0.3)
    result = None
    parts = [torch.arange(0, 30), torch.arange(30, 31), torch.arange(31, 90)]
    plans = [plan(spans.shard(torch.arange(40), part), len(part)) for part in parts]
    for part, one in zip(parts, plans, strict=True):
        result = attention_forward(q, k[:, part], v[:, part], one, scale=0.3, into=result)
    torch.testing.assert_close(result, whole, rtol=1e-12, atol=1e-12)

    out, lse = whole
    delta = attention_delta(dout, out)
    expected = attention_backward(dout, q, k, v, lse, delta, plan(spans, 90), scale=0.3)
    dq, dk, dv = torch.zeros_like(q), torch.ones_like(k), torch.ones_like(v)
    for part, one in zip(parts, plans, strict=True):
        grads = [dk[:, part], dv[:, part]]
        attention_backward(dout, q, k[:, part], v[:, part], lse, delta, one, scale=0.3, dq=dq, dk=grads[0], dv=grads[1])
        dk[:, part], dv[:, part] = grads
    torch.testing.assert_close((dq, dk - 1, dv - 1), expected, rtol=1e-12, atol=1e-12)

    empty = [torch.full_like(x, torch.nan) for x in (q, k, v)]  # what nobody has written yet
    written = attention_backward(
        dout, q, k, v, lse, delta, plan(spans, 90), scale=0.3, dq=dq.zero_(), dk=empty[1], dv=empty[2], fresh=True
    )
    assert written[1] is empty[1]
    torch.testing.assert_close(written, expected, rtol=1e-12, atol=1e-12)
    wider = torch.full((2, 40, 6, 8), torch.nan, dtype=q.dtype)
    assert attention_forward(q, k, v, plan(spans, 90), scale=0.3, out=wider[:, :, 1:5])[0].equal(whole[0])
    assert wider[:, :, 1:5].equal(whole[0])
    assert wider[:, :, [0, 5]].isnan().all()


def test_a_row_without_keys_is_zero_and_nothing_is_nan():
    leaves, _ = inputs((1, 6, 6, 2, 1, 4), torch.float32)
    for leaf in leaves:
        leaf.requires_grad_()
    spans = Spans(*torch.tensor([[[0, 1, 2, 2, 4, 6]], [[0, 1, 3, 3, 4, 6]]], dtype=torch.int32))
    out, lse = attention(*leaves, spans, return_lse=True)
    empty = torch.tensor([0, 1, 4, 5])
    assert (out[:, empty] == 0).all()
    assert (lse[..., empty] == -torch.inf).all()
    dq, dk, dv = gradients(out, lse, leaves)
    assert (dq[:, empty] == 0).all()
    assert all(torch.isfinite(x).all() for x in (out, dq, dk, dv))


def test_a_head_without_a_sink_has_no_gradient_of_one():
    leaves, _ = inputs((1, 6, 6, 2, 1, 4), torch.float64)
    sinks = torch.tensor([-torch.inf, 0.5], dtype=torch.float64, requires_grad=True)
    out = attention(*leaves, Spans.causal(6).padded(2, 6), sinks=sinks)  # the first two queries see nothing
    (found,) = torch.autograd.grad(out.sum(), sinks)
    assert found[0] == 0
    assert found[1].isfinite()


def test_compiled_and_selectively_checkpointed():
    torch.library.opcheck(
        torch.ops.ringspan.attention.default,
        (*inputs((1, 6, 6, 2, 1, 4), torch.float32)[0], None, list(plan(Spans.causal(6), 6)), 0.5, 0.0, "torch"),
    )
    leaves, _ = inputs((1, 33, 33, 2, 1, 8), torch.float32)
    for leaf in leaves:
        leaf.requires_grad_()
    made, calls = plan(Spans.causal(33), 33), []

    def layer(q, k, v):
        return attention(q * 2, k, v, made).sin()

    def policy(ctx, op, *args, **kwargs):
        kept = op is torch.ops.ringspan.attention.default
        calls.extend([op] if kept else [])
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    expected = torch.autograd.grad(layer(*leaves).sum(), leaves)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves).sum(), leaves), expected)
    kept = checkpoint(
        layer, *leaves, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )
    torch.testing.assert_close(torch.autograd.grad(kept.sum(), leaves), expected)
    assert calls, "the policy was never asked about attention"


@pytest.mark.parametrize(
    "change, said",
    [
        ({"k": torch.zeros(1, 4, 3, 8), "v": torch.zeros(1, 4, 3, 8)}, "heads=4 must be a multiple of kv_heads=3"),
        ({"v": torch.zeros(1, 5, 2, 8)}, r"v \(1, 5, 2, 8\)"),
        ({"q": torch.zeros(1, 4, 4, 8).double()}, "they need one dtype"),
        ({"spans": Spans.causal(3)}, "the mask is for 3 queries"),
        ({"spans": []}, "spans is an empty list"),
        ({"spans": Spans.causal(4, 5)}, "hi reaches from 2 to 5: keys are 0 to 4"),
        ({"spans": [Spans.full(4, 4), Spans.full(4, 5)]}, "keys are 0 to 4"),
        ({"spans": Spans(*torch.tensor([[[-1] * 4], [[4] * 4]], dtype=torch.int32))}, "lo reaches from -1"),
        ({"spans": Spans(*torch.tensor([[[0] * 4], [[1, 4, 3, 4]]], dtype=torch.int32))}, "hi falls after query 1"),
        ({"spans": [Spans.full(4, 2), Spans.causal(4), Spans.full(4, 0)]}, "spans 0 and 1 of the list share keys"),
        ({"v": torch.zeros(1, 4, 2, 8, device="meta")}, "are on cpu, cpu, meta, cpu: move them to cpu"),
        ({"spans": plan(Spans.causal(4), 4, torch.device("meta"))}, "are on cpu, cpu, cpu, meta"),
        ({"sinks": torch.zeros(2)}, "one logit a head"),
        ({"scale": -1.0}, "scale=-1.0: must be 0 or more; negate q"),
        ({"scale": float("nan")}, "scale=nan"),
        ({"softcap": -1.0}, "softcap=-1.0: must be 0"),
        ({"backend": "cudnn"}, "must be one of auto, hopper"),
        (
            {
                "backend": "triton",
                "q": torch.zeros(1, 4, 4, 264),
                "k": torch.zeros(1, 4, 2, 264),
                "v": torch.zeros(1, 4, 2, 264),
            },
            "264 is above 256",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, said):
    fits = {
        "q": torch.zeros(1, 4, 4, 8),
        "k": torch.zeros(1, 4, 2, 8),
        "v": torch.zeros(1, 4, 2, 8),
        "spans": Spans.causal(4),
    }
    with pytest.raises(ValueError, match=said):
        attention(**(fits | change))
