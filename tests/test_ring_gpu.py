"""Ring attention on real GPUs over NCCL: no less accurate than one GPU's kernel, beside float64."""

import pytest
import torch
from reference import attention_reference
from test_ring import Case
from torch import Tensor

from ringspan.kernels.attention import attention
from ringspan.kernels.spans import Spans
from ringspan.parallel.attention import SequenceAttention
from ringspan.parallel.layout import LAYOUTS
from ringspan.parallel.mesh import Mesh

CASES = [
    Case(Spans.causal(3001), heads=8, kv_heads=2, dim=128, dtype=torch.bfloat16),
    Case(Spans.packed([1700, 1, 45, 999]), heads=4, kv_heads=4, dim=64, dtype=torch.float16, sinks=True),
    Case(Spans.causal(2048, window=300), heads=4, kv_heads=1, dim=128, dtype=torch.bfloat16, softcap=3.0),
    Case(Spans.packed([[600, 424], [1, 1023]]), heads=4, kv_heads=2, dim=96, dtype=torch.bfloat16, batch=2),
]


def on_gpus(cases: list[Case], ring: int, ulysses: int) -> list[list[Tensor]]:
    mesh, results = Mesh.create(1, ring, ulysses, "cuda"), []
    for name in LAYOUTS:
        attend = SequenceAttention(mesh, name)
        for case in cases:
            layout = attend.layout(case.spans.queries)
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


def on_one_gpu(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """(float64, our kernel): out and gradients of the whole sequence."""
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
@pytest.mark.parametrize("ring, ulysses", [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2)])
def test_no_less_accurate_than_one_gpu(ranks, ring, ulysses):
    answers = ranks(ring * ulysses, cuda=True)(on_gpus, CASES, ring, ulysses, timeout=200)
    number = 0
    for name in LAYOUTS:
        for case in CASES:
            layout = LAYOUTS[name](case.spans.queries, ring)
            found = [layout.unshard([one[number][i] for one in answers], 1) for i in range(4)]
            if case.sinks:
                found.append(torch.stack([one[number][4].double() for one in answers]).sum(dim=0))
            for mine, exact, single in zip(found, *on_one_gpu(case), strict=True):
                error, bound = ((x.double() - exact).square().mean().sqrt().item() for x in (mine, single))
                # Sinks' gradients are a few numbers, whose errors are chance: twice one GPU's. Where Ulysses repeats
                # kv heads, their gradients are rounded to 16 bits before they are summed: two roundings for one.
                repeated = case.kv_heads % ulysses and mine.shape == found[2].shape
                factor = 2 if mine.dim() == 1 or repeated else 1.05
                assert error <= factor * bound + 1e-6 * exact.abs().max().item()
            number += 1
