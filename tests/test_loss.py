import math

import pytest
import torch
import torch.nn.functional as F

from ringspan.train.loss import IGNORE, cross_entropy_sum

EPS = torch.finfo(torch.float32).eps


def make(tokens, vocabulary, dim=7, dtype=torch.float64, unlabelled=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, dim, generator=g, dtype=torch.float64)
    weight = torch.randn(vocabulary, dim, generator=g, dtype=torch.float64)
    labels = torch.randint(vocabulary, (tokens,), generator=g)
    labels[torch.rand(tokens, generator=g) < unlabelled] = IGNORE
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def gradients(loss_of, hidden, weight, labels):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = loss_of(hidden, weight, labels)
    (3 * loss).backward()  # a factor, as the step's token count is one
    return loss.detach(), hidden.grad, weight.grad


def reference(hidden, weight, labels):
    return F.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize(("tokens", "vocabulary", "chunk"), [(1, 2, 1), (13, 5, 4), (37, 11, 37), (29, 257, 8)])
def test_equals_cross_entropy_in_fp64(tokens, vocabulary, chunk):
    inputs = make(tokens, vocabulary)
    got = gradients(lambda *x: cross_entropy_sum(*x, chunk), *inputs)
    for ours, theirs in zip(got, gradients(reference, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    hidden, weight, labels = make(11, 6)
    assert torch.autograd.gradcheck(lambda h, w: cross_entropy_sum(h, w, labels, 4), (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_no_more_than_its_dtype(dtype):
    tokens, vocabulary, dim = 203, 301, 16
    inputs = make(tokens, vocabulary, dim, dtype)
    loss, dhidden, dweight = gradients(lambda *x: cross_entropy_sum(*x, 32), *inputs)
    assert loss.dtype == torch.float32
    assert (dhidden.dtype, dweight.dtype) == (dtype, dtype)
    true_loss, true_dhidden, true_dweight = gradients(reference, *(x.double() for x in inputs[:2]), inputs[2])
    # A logit is a dot product of dim terms of size 1, rounded once; a loss and a gradient inherit its error.
    eps = torch.finfo(dtype).eps
    logit_error = 4 * eps * math.sqrt(dim) + 4 * EPS * math.sqrt(dim)
    assert (loss - true_loss).abs() < logit_error * tokens
    for got, true in ((dhidden, true_dhidden), (dweight, true_dweight)):
        scale = true.abs().max()
        assert (got - true).abs().max() < 4 * (logit_error + eps * math.sqrt(tokens)) * scale


def test_shape_of_a_batch_and_default_chunk():
    hidden, weight, labels = make(12, 9)
    batched = cross_entropy_sum(hidden.view(3, 4, -1), weight, labels.view(3, 4))
    torch.testing.assert_close(batched, reference(hidden, weight, labels))


def test_no_labels_is_zero_with_zero_gradients():
    hidden, weight, labels = make(9, 5)
    loss, dhidden, dweight = gradients(cross_entropy_sum, hidden, weight, labels.fill_(IGNORE))
    assert loss == 0
    assert not dhidden.any()
    assert not dweight.any()


def test_no_tokens_at_all():
    hidden, weight, labels = make(0, 5)
    loss, dhidden, dweight = gradients(cross_entropy_sum, hidden, weight, labels)
    assert loss == 0
    assert dhidden.shape == (0, 7)
    assert not dweight.any()


def test_logits_are_never_whole():
    tokens, vocabulary, chunk = 64, 512, 8
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    inputs = make(tokens, vocabulary, dim=4)
    with Watch():
        gradients(lambda *x: cross_entropy_sum(*x, chunk), *inputs)
    assert largest == vocabulary * chunk  # not vocabulary * tokens


def test_no_gradients_are_made_without_need():
    hidden, weight, labels = make(16, 300, dim=2)
    with torch.no_grad():
        assert not cross_entropy_sum(hidden, weight, labels).requires_grad
    frozen = weight.detach()
    cross_entropy_sum(hidden, frozen, labels, 4).backward()
    expected = torch.autograd.grad(reference(hidden, frozen, labels), hidden)[0]
    torch.testing.assert_close(hidden.grad, expected)
