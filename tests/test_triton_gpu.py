"""The Triton kernels on a GPU: drawn cases of every kind against float64, poisoned memory, long and strided inputs."""

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch
import triton_cases
from triton_cases import MASKS, Case

from ringspan.kernels import triton_backend
from ringspan.kernels.plan import plan
from ringspan.kernels.spans import Spans

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (dtype, head dim, softcap, into): what kernels are compiled for; compiling takes most of the time of these tests.
KINDS = (
    (BF16, 128, 0.0, False),
    (BF16, 128, 0.0, True),
    (BF16, 64, 15.0, True),
    (BF16, 80, 0.0, False),
    (BF16, 192, 0.0, False),
    (BF16, 256, 0.0, True),
    (FP16, 32, 0.0, False),
    (FP16, 96, 15.0, False),
    (FP32, 40, 0.0, True),
    (FP32, 64, 0.0, False),
    (FP32, 128, 15.0, False),
)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """What the backend allocates is full of NaN, so that nothing passes by not being written."""

    def nan_empty(*args: object, **kwargs: object) -> torch.Tensor:
        made = original(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    original: Callable[..., torch.Tensor] = torch.empty
    with mock.patch.object(triton_backend.torch, "empty", nan_empty):
        yield


def draw(kind: int, seed: int) -> Case:
    """A case of that kind from a seed: any shapes, spans and strides."""
    dtype, head_dim, softcap, into = KINDS[kind]
    generator = random.Random(f"{kind} {seed}")
    mask = generator.choice(sorted(MASKS))
    kv_heads = generator.choice((1, 2, 3))
    case = Case(
        mask=mask,
        dtype=dtype,
        batch=generator.choice((1, 2, 3)),
        queries=generator.choice((1, 7, 127, 128, 129, 257, 500, 641)),
        keys=generator.choice((0, 1, 63, 128, 131, 383, 512, 777)),
        heads=kv_heads * generator.choice((1, 2, 4)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        softcap=softcap,
        into=into,
        fused=generator.random() < 0.4,
        seed=seed,
    )
    return replace(case, keys=case.queries) if mask == "packed" or case.fused else case


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=lambda kind: f"{KINDS[kind][0]}-{KINDS[kind][1]}")
def test_drawn_cases(kind: int) -> None:
    """To look at one that fails: triton_cases.check(test_triton_gpu.draw(kind, seed), "cuda")."""
    for seed in range(12):
        triton_cases.check(draw(kind, seed), "cuda")


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_a_long_causal_sequence(dtype: torch.dtype) -> None:
    """Many blocks a row: errors do not grow with the number of rescalings, and the unmasked loop is nearly all."""
    triton_cases.check(Case("causal", dtype, queries=4099, keys=4099, heads=2, head_dim=64), "cuda")


def test_runs_twice_to_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 700, 8, 64, generator=generator).to("cuda", torch.bfloat16)
    k = torch.randn(2, 700, 2, 64, generator=generator).to("cuda", torch.bfloat16)
    mask = plan(Spans.packed([300, 27, 373]).to("cuda"), 700)

    def run() -> tuple[torch.Tensor, ...]:
        out, lse = triton_backend.forward(q, k, k, mask, scale=0.125, softcap=0.0, into=None, out_dtype=torch.bfloat16)
        gradients = triton_backend.backward(
            q, q, k, k, lse, lse, mask, scale=0.125, softcap=0.0, dq=None, dk=None, dv=None
        )
        return out, lse, *gradients

    assert all(torch.equal(x, y) for x, y in zip(run(), run(), strict=True))


def test_offsets_past_two_to_the_31() -> None:
    """2^19 positions of 40 heads of 128: the last head of the last rows equals the same rows computed alone."""
    if torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip(f"needs 48 GiB of free GPU memory, and there are {torch.cuda.mem_get_info()[0] / 2**30:.0f}")
    n, heads, window = 2**19, 40, 300
    q = torch.zeros(1, n, heads, 128, device="cuda", dtype=torch.bfloat16)
    assert q.numel() > 2**31
    tail = slice(n - 1000, n)
    q[:, tail] = torch.randn(1, 1000, heads, 128, device="cuda")
    kinds = {"scale": 0.1, "softcap": 0.0}
    mask = plan(Spans.causal(n, window=window).to("cuda"), n)
    out, lse = triton_backend.forward(q, q, q, mask, into=None, out_dtype=q.dtype, **kinds)
    own = q[:, tail]
    own_mask = plan(Spans.causal(1000, window=window).to("cuda"), 1000)
    own_out, own_lse = triton_backend.forward(own, own, own, own_mask, into=None, out_dtype=q.dtype, **kinds)
    seen = slice(window, 1000)  # their windows lie inside the tail
    size = own_out[:, seen].abs().max().item()
    torch.testing.assert_close(out[:, tail][:, seen], own_out[:, seen], rtol=0, atol=2**-7 * size)
    torch.testing.assert_close(lse[:, :, tail][:, :, seen], own_lse[:, :, seen], rtol=0, atol=1e-3)
    del out

    delta = torch.zeros_like(lse)
    gradients = triton_backend.backward(q, q, q, q, lse, delta, mask, dq=None, dk=None, dv=None, **kinds)
    own_delta = torch.zeros_like(own_lse)
    own_lse = lse[:, :, tail].contiguous()
    own_gradients = triton_backend.backward(
        own, own, own, own, own_lse, own_delta, own_mask, dq=None, dk=None, dv=None, **kinds
    )
    for got, want in zip(gradients, own_gradients, strict=True):
        size = want[:, seen].abs().max().item()
        torch.testing.assert_close(got[:, tail][:, seen], want[:, seen], rtol=0, atol=2**-7 * size)


def test_a_mask_made_on_the_gpu_that_reaches_past_the_keys_ends_the_process():
    """In one of its own: CUDA is of no more use there."""
    lines = (
        "import torch",
        "from ringspan.kernels.plan import plan",
        "from ringspan.kernels.spans import Spans",
        "plan(Spans.causal(4, 5).to('cuda'), 5)",
        "torch.cuda.synchronize()",
        "print('within', flush=True)",
        "plan(Spans.causal(4, 5).to('cuda'), 4)",
        "torch.cuda.synchronize()",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert done.returncode
    assert done.stdout == "within\n"
    assert "a mask reaches past the 4 keys" in done.stdout + done.stderr
