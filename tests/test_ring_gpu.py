"""Ring attention on real GPUs, over NCCL and over the copy engines: no less accurate than one GPU's kernel, beside
float64; and the same bits by either wire, whoever stalls."""

import functools
import random
import time

import pytest
import torch
import torch.distributed as dist
from reference import attention_reference
from test_ring import Case
from torch import Tensor

from ringspan.kernels.attention import attention
from ringspan.kernels.spans import Spans
from ringspan.parallel import copy_engine
from ringspan.parallel.attention import SequenceAttention
from ringspan.parallel.layout import LAYOUTS, Layout
from ringspan.parallel.mesh import Mesh
from ringspan.parallel.ring import ring_attention
from ringspan.parallel.ring_plan import plan_ring

CASES = [
    Case(Spans.causal(3001), heads=8, kv_heads=2, dim=128, dtype=torch.bfloat16),
    Case(Spans.packed([1700, 1, 45, 999]), heads=4, kv_heads=4, dim=64, dtype=torch.float16, sinks=True),
    Case(Spans.causal(2048, window=300), heads=4, kv_heads=1, dim=128, dtype=torch.bfloat16, softcap=3.0),
    Case(Spans.packed([[600, 424], [1, 1023]]), heads=4, kv_heads=2, dim=96, dtype=torch.bfloat16, batch=2),
]
FIXED = ["contiguous", "zigzag", "striped"]


def on_gpus(cases: list[Case], ring: int, ulysses: int, transport: str) -> list[list[Tensor]]:
    mesh, results = Mesh.create(1, ring, ulysses, "cuda"), []
    for name in FIXED:
        attend = SequenceAttention(mesh, name, transport=transport, strategy="ring")
        for case in cases:
            layout = LAYOUTS[name](case.spans.queries, mesh.ring)
            leaves, dout = case.tensors()
            q, k, v, dout = (
                layout.shard(x, mesh.ring_rank, 1, part=mesh.ulysses_rank, parts=ulysses).cuda()
                for x in (*leaves[:3], dout)
            )
            wanted = [x.requires_grad_() for x in (q, k, v, *(x.cuda() for x in leaves[3:]))]
            ring_plan = attend.plan(case.spans, "cuda")
            sinks = wanted[3] if case.sinks else None
            out = attend(q, k, v, ring_plan, scale=0.4, softcap=case.softcap, sinks=sinks)
            results.append([x.cpu() for x in (out.detach(), *torch.autograd.grad(out, wanted, dout))])
    return results


@functools.cache
def on_one_gpu(number: int) -> tuple[list[Tensor], list[Tensor]]:
    """(float64, our kernel) of a case: out and gradients of the whole sequence."""
    case = CASES[number]
    leaves, dout = ([x.cuda() for x in case.tensors()[0]], case.tensors()[1].cuda())
    answers = []
    for dtype in (torch.float64, case.dtype):
        q, k, v, *sinks = wanted = [x.to(dtype).requires_grad_() for x in leaves]
        sink = sinks[0] if sinks else None
        if dtype == torch.float64:
            spans = case.spans.to("cuda")
            out, _ = attention_reference(q, k, v, spans.lo, spans.hi, 0.4, case.softcap, sink)
        else:
            out = attention(q, k, v, case.spans, scale=0.4, softcap=case.softcap, sinks=sink)
        answers.append([x.cpu() for x in (out.detach(), *torch.autograd.grad(out, wanted, dout.to(dtype)))])
    return answers[0], answers[1]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "ring, ulysses, transport",
    [
        *((2, 1, "copy_engine"), (2, 1, "p2p"), (1, 1, "auto"), (1, 2, "auto")),
        *((4, 1, "copy_engine"), (4, 1, "p2p"), (2, 2, "auto")),
    ],
)
def test_no_less_accurate_than_one_gpu(ranks, ring, ulysses, transport):
    answers = ranks(ring * ulysses, cuda=True)(on_gpus, CASES, ring, ulysses, transport, timeout=200)
    number = 0
    for name in FIXED:
        for index, case in enumerate(CASES):
            layout = LAYOUTS[name](case.spans.queries, ring)
            found = [layout.unshard([one[number][i] for one in answers], 1) for i in range(4)]
            if case.sinks:
                found.append(torch.stack([one[number][4].double() for one in answers]).sum(dim=0))
            for mine, exact, single in zip(found, *on_one_gpu(index), strict=True):
                error, bound = ((x.double() - exact).square().mean().sqrt().item() for x in (mine, single))
                # Sinks' gradients are a few numbers, whose errors are chance: twice one GPU's. Where Ulysses repeats
                # kv heads, their gradients are rounded to 16 bits before they are summed: two roundings for one.
                repeated = case.kv_heads % ulysses and mine.shape == found[2].shape
                factor = 2 if mine.dim() == 1 or repeated else 1.05
                assert error <= factor * bound + 1e-6 * exact.abs().max().item()
            number += 1


class Ring:
    """One rank's shard of a causal sequence, from a fused projection: k and v are strided views."""

    def __init__(self, mesh: Mesh, length: int, kv_heads: int, seed: int, backend: str) -> None:
        layout = Layout.zigzag(length, mesh.ring)
        generator = torch.Generator("cuda").manual_seed(seed + mesh.ring_rank)
        size = (1, layout.rows, 2 * kv_heads + 4, 128)
        self.qkv = torch.randn(size, device="cuda", generator=generator).bfloat16().requires_grad_()
        self.dout = torch.randn(1, layout.rows, 4, 128, device="cuda", generator=generator).bfloat16()
        self.plan = plan_ring(Spans.causal(length), layout, mesh.ring_rank).to("cuda")
        self.sizes, self.group, self.backend = (4, kv_heads, kv_heads), mesh.ring_group, backend

    def __call__(self, transport: str) -> list[Tensor]:
        """out and the gradient of q, k and v."""
        q, k, v = self.qkv.split(self.sizes, dim=2)
        out = ring_attention(q, k, v, self.plan, self.group, transport=transport, backend=self.backend)
        return [out.detach(), *torch.autograd.grad(out, self.qkv, self.dout)]


def by_both_wires() -> list[str]:
    """Shards that grow, shrink and change their kv heads: what differs."""
    mesh, differing = Mesh.create(1, dist.get_world_size(), 1, "cuda"), []
    for length, kv_heads in ((640, 2), (3000, 4), (511, 1), (4096, 2), (5000, 1)):
        ring = Ring(mesh, length, kv_heads, length, "triton")
        for mine, other in zip(ring("copy_engine"), ring("p2p"), strict=True):
            if not torch.equal(mine, other):
                differing.append(f"{length} tokens, {kv_heads} kv heads: {(mine.float() - other.float()).abs().max()}")
    before = copy_engine.reserved_bytes()
    Ring(mesh, 640, 2, 0, "triton")("copy_engine")
    assert copy_engine.reserved_bytes() == before > 0, "boxes are shared, and never shrink"
    return differing


@pytest.mark.gpu
def test_copy_engine_and_nccl_give_the_same_bits(ranks):
    assert ranks(2, cuda=True)(by_both_wires, timeout=120) == [[], []]


def picked() -> tuple[str, str]:
    mesh = Mesh.create(1, dist.get_world_size(), 1, "cuda")
    attend = SequenceAttention(mesh, "zigzag")
    return attend.pick(torch.zeros(1, 8, 2, 128, device="cuda", dtype=torch.bfloat16))["transport"], attend.transport


@pytest.mark.gpu
def test_gpus_that_reach_each_other_use_the_copy_engine(ranks):
    assert ranks(2, cuda=True)(picked) == [("copy_engine", "copy_engine")] * 2


def soak(transport: str, passes: int, backend: str) -> int:
    """Passes forward and backward, in an order of inputs of its own, on ranks that stall at random on the host and on
    the device; how many results were not, bit by bit, those of an undisturbed NCCL ring. Fresh memory is NaN."""
    torch.use_deterministic_algorithms(True)
    mesh = Mesh.create(1, dist.get_world_size(), 1, "cuda")
    rings = [Ring(mesh, 768 + 256 * i, 2, i, backend) for i in range(4)]
    expected = [ring("p2p") for ring in rings]
    chance, stall = random.Random(0), random.Random(1 + mesh.ring_rank)
    wrong = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(passes):
        which = chance.randrange(len(rings))
        if stall.random() < 0.2:
            torch.cuda._sleep(stall.randrange(1, 4_000_000))  # up to 2 ms at 2 GHz
        if stall.random() < 0.05:
            time.sleep(stall.random() * 0.02)
        for mine, right in zip(rings[which](transport), expected[which], strict=True):
            wrong += (mine != right).any()
    torch.use_deterministic_algorithms(False)
    return int(wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("transport, backend", [("copy_engine", "auto"), ("copy_engine", "triton"), ("p2p", "triton")])
def test_2000_steps_among_stalling_ranks(ranks, transport, backend):
    """A pass forward and backward over 2 ranks is 4 steps, and 8 blocks on two streams."""
    assert ranks(2, cuda=True)(soak, transport, 500, backend, timeout=120) == [0, 0]
