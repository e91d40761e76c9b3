import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import ahead_of_time
import numpy
import pytest
import torch
import torch.nn.functional as F
import triton

from ringspan.kernels.triton_backend import Config
from ringspan.train import triton_loss
from ringspan.train.loss import BYTES_OF_A_CHUNK, cross_entropy_sum, rows_of_chunk
from ringspan.train.model import GPT, ModelConfig
from ringspan.train.packing import IGNORE

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


def reference(hidden, weight, labels, z_loss=0.0):
    logits = hidden @ weight.T
    squares = logits.logsumexp(dim=-1).square() * (labels != IGNORE)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") + z_loss * squares.sum()


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize(("tokens", "vocabulary", "chunk"), [(1, 2, 1), (13, 5, 4), (37, 11, 37), (29, 257, 8)])
def test_equals_cross_entropy_in_fp64(tokens, vocabulary, chunk, z_loss):
    inputs = make(tokens, vocabulary)
    got = gradients(lambda *x: cross_entropy_sum(*x, chunk, z_loss), *inputs)
    for ours, theirs in zip(got, gradients(lambda *x: reference(*x, z_loss), *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    hidden, weight, labels = make(11, 6)
    assert torch.autograd.gradcheck(lambda h, w: cross_entropy_sum(h, w, labels, 4, 0.1), (hidden, weight))


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


@pytest.mark.parametrize("none", [IGNORE, -1])
def test_no_labels_is_zero_with_zero_gradients(none):
    hidden, weight, labels = make(9, 5)
    loss, dhidden, dweight = gradients(cross_entropy_sum, hidden, weight, labels.fill_(none))
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


def test_a_bf16_weight_is_summed_over_chunks_in_fp32():
    """In bf16 a sum of 512 like terms would stop growing at 256 of them."""
    hidden, weight = (
        torch.ones(512, 1, dtype=torch.bfloat16),
        torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True),
    )
    cross_entropy_sum(hidden, weight, torch.zeros(512, dtype=torch.int64), chunk=1).backward()
    assert weight.grad.flatten().tolist() == [-256.0, 256.0]  # half a label's probability from each of 512 tokens


def test_a_model_s_z_loss_is_of_all_labelled_tokens():
    sizes = ModelConfig(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, mlp_dim=8)
    inputs = torch.arange(6)[None], torch.tensor([[1, 2, IGNORE, 4, 5, 0]]), torch.arange(6)[None]
    models = [GPT(sizes, 7, lambda q, k, v, _: q, z_loss=z, dtype=torch.float64) for z in (0.0, 0.5)]
    seen = []
    models[0].head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    without, with_it = (model(*inputs, None) for model in models)
    lse = (seen[0] @ models[0].head.weight.T).logsumexp(-1)[inputs[1] != IGNORE]
    torch.testing.assert_close(with_it - without, 0.5 * lse.square().sum())


def test_chunks_are_even_and_within_their_bytes():
    for vocabulary in (256, 32_768, 128_256, 262_144, 2**31):
        for rows in (0, 1, 100, 8193, 1_000_000):
            chunk = rows_of_chunk(rows, vocabulary, 2)
            assert chunk == 1 or chunk * vocabulary * 2 <= BYTES_OF_A_CHUNK
            n_chunks = max(1, -(-rows // chunk))
            assert n_chunks * chunk - rows <= 128 * n_chunks  # none is much shorter than another
    assert rows_of_chunk(9000, 256, 2) == 4608  # two of whole tiles of 128, not 8192 and 808
    assert rows_of_chunk(9000, 2**40, 2) == 1


def check_kernel(device, tokens, vocabulary, dtype, z_loss):
    """The kernel's losses and gradient of the logits, beside float64's."""
    g = torch.Generator().manual_seed(1)
    logits = (5 * torch.randn(tokens, vocabulary + 3, generator=g)).to(dtype)[:, :vocabulary]  # rows are not adjacent
    logits[0, : vocabulary // 2] = -torch.inf
    labels = torch.randint(vocabulary, (tokens,), generator=g)
    labels[0], labels[1::3] = vocabulary - 1, IGNORE
    exact = logits.double().requires_grad_()
    lse = exact.logsumexp(-1)
    true = (lse - exact.gather(-1, labels.clamp_min(0)[:, None])[:, 0] + z_loss * lse**2) * (labels >= 0)
    true.sum().backward()
    logits, labels = logits.to(device), labels.to(device)
    kept = logits.clone()
    for gradient in (False, True):
        losses = triton_loss.cross_entropy_(logits, labels, z_loss, gradient).cpu().double()
        # A sum of `vocabulary` exponents in fp32, whose logarithm has its relative error; its square twice that
        bound = 4 * EPS * (math.sqrt(vocabulary) + lse.abs() * (1 + 2 * z_loss * lse.abs()) + true.abs())
        assert ((losses - true).abs() <= bound.detach()).all(), (losses - true).abs().max()
        assert gradient or torch.equal(logits, kept)
    error = (logits.cpu().double() - exact.grad).abs()
    assert (error <= torch.finfo(dtype).eps * exact.grad.abs() + 64 * EPS * (1 + lse.abs()[:, None])).all(), error.max()


KERNEL_CASES = (
    (4, 33, torch.float32, 0.0),
    (7, 4096, torch.bfloat16, 0.0),
    (5, 9001, torch.bfloat16, 0.2),
    (2, 1, torch.float32, 0.5),
    (3, 5000, torch.float16, 0.0),
)


def interpret_cases():
    for case in KERNEL_CASES:
        check_kernel("cpu", *case)
    losses = triton_loss.cross_entropy_(torch.zeros(2, 5), torch.tensor([5, 4]), 0.0, False)
    assert losses.isnan().tolist() == [True, False]  # 5 is no token
    return triton_loss.cross_entropy_(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), 0.0, True).shape


def test_kernel_interpreted(monkeypatch):
    old_triton, new_numpy = (tuple(map(int, x.__version__.split(".")[:2])) for x in (triton, numpy))
    if old_triton < (3, 7) and new_numpy >= (2, 5):
        pytest.skip(f"the interpreter of triton {triton.__version__} fails in loops with numpy {numpy.__version__}")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # Triton reads it once, when it is imported
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(interpret_cases).result(timeout=120) == (0,)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernel_fits_without_spills(capability):
    logits, labels = torch.zeros(16, 128_256, dtype=torch.bfloat16), torch.zeros(16, dtype=torch.int64)
    arguments = logits, labels, torch.zeros(16), logits.stride(0), logits.shape[1], 1e-4
    constants = {"BLOCK": triton_loss.BLOCK, "GRADIENT": True}
    config = Config(0, 0, warps=triton_loss.WARPS, stages=3)
    launch = ahead_of_time.Launch(triton_loss.cross_entropy_kernel, config, 16, arguments, constants)
    assert ahead_of_time.build(launch, capability).stack == 0


LARGE = (64, 262_144, torch.bfloat16, 1e-4), (300, 128_256, torch.bfloat16, 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*KERNEL_CASES, *LARGE])
def test_kernel_on_the_gpu(case):
    check_kernel("cuda", *case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1000, 256), (3000, 32_768), (5001, 128_256)])
def test_on_the_gpu(tokens, vocabulary, dtype):
    """Through the whole operator, whose chunks there are several of, beside float64 of the same device."""
    hidden, weight, labels = (x.detach().cuda() for x in make(tokens, vocabulary, 64, torch.float32))
    hidden, weight = hidden.to(dtype), (weight / 8).to(dtype)
    loss, dhidden, dweight = gradients(lambda *x: cross_entropy_sum(*x, 1024, 1e-3), hidden, weight, labels)
    true = gradients(lambda *x: reference(*x, 1e-3), hidden.double(), weight.double(), labels)
    eps = torch.finfo(dtype).eps if dtype is torch.bfloat16 else 2**-10  # fp32 products may be TF32's on a GPU
    assert (loss - true[0]).abs() < 4 * eps * tokens
    for got, exact in ((dhidden, true[1]), (dweight, true[2])):
        assert (got - exact).norm() < 4 * eps * exact.norm()
