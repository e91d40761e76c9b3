"""Ring attention on real gloo processes against the whole sequence in one process, in float64."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from reference import attention_reference
from torch import Tensor

from ringspan.kernels.spans import Spans
from ringspan.parallel.attention import SequenceAttention
from ringspan.parallel.layout import LAYOUTS, Layout
from ringspan.parallel.mesh import Mesh
from ringspan.parallel.ring import ring_attention
from ringspan.parallel.ring_plan import plan_ring, read_steps
from ringspan.parallel.transport import TRANSPORTS, PointToPoint


@dataclass
class Case:
    """One batch for all ranks: drawn from ``seed``, so that every process makes the same one."""

    spans: Spans
    heads: int = 4
    kv_heads: int = 2
    batch: int = 1
    dim: int = 8
    softcap: float = 0.0
    sinks: bool = False
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def tensors(self) -> tuple[list[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        n = self.spans.queries
        sizes = [(self.batch, n, heads, self.dim) for heads in (self.heads, self.kv_heads, self.kv_heads, self.heads)]
        *leaves, dout = (torch.randn(size, generator=generator, dtype=torch.float64).to(self.dtype) for size in sizes)
        if self.sinks:
            leaves.append(torch.randn(self.heads, generator=generator, dtype=torch.float64).to(self.dtype))
        return leaves, dout


CASES = {
    "causal": Case(Spans.causal(101)),
    "full": Case(Spans.full(37, 37), kv_heads=1),
    "one token": Case(Spans.causal(1)),
    "fewer tokens than ranks": Case(Spans.causal(5)),
    "window": Case(Spans.causal(151, window=13), softcap=1.3, sinks=True),
    "packed": Case(Spans.packed([[3, 71, 1, 56], [131, 0, 0, 0]]), batch=2, sinks=True),
    "packed, one mask for the batch": Case(Spans.packed([17, 40, 9]), batch=2, kv_heads=4),
    "blocks": Case(Spans.causal(90).with_blocks([(10, 50), (70, 75)]), softcap=2.0),
    "rows without keys": Case(Spans.causal(64).padded(40, 50), sinks=True),
    "rows without keys, no sinks": Case(Spans.causal(64).padded(40, 50)),
}


def on_every_rank(cases: list[Case], layouts: list[str], ring: int, ulysses: int) -> list[list[Tensor]]:
    """This rank's out and gradients of each case in each layout."""
    mesh, results = Mesh.create(1, ring, ulysses), []
    for name in layouts:
        attend = SequenceAttention(mesh, name)
        for case in cases:
            layout = attend.layout(case.spans)

            def shard(x: Tensor, layout: Layout = layout) -> Tensor:
                return layout.shard(x, mesh.ring_rank, 1, part=mesh.ulysses_rank, parts=mesh.ulysses)

            leaves, dout = case.tensors()
            q, k, v = (shard(x).requires_grad_() for x in leaves[:3])
            sinks = leaves[3].requires_grad_() if case.sinks else None
            ring_plan = attend.plan(case.spans, "cpu")
            out = attend(q, k, v, ring_plan, scale=0.4, softcap=case.softcap, sinks=sinks)
            wanted = [q, k, v] + ([] if sinks is None else [sinks])
            results.append([out.detach(), *torch.autograd.grad(out, wanted, shard(dout))])
    return results


def compare(answers: list[list[list[Tensor]]], cases: list[Case], layouts: list[str], ring: int, tolerance: float):
    number = 0
    for name in layouts:
        for case in cases:
            leaves, dout = (x for x in case.tensors())
            leaves = [x.double().requires_grad_() for x in leaves]
            sinks = leaves[3] if case.sinks else None
            out, _ = attention_reference(*leaves[:3], case.spans.lo, case.spans.hi, 0.4, case.softcap, sinks)
            expected = [out, *torch.autograd.grad(out, leaves, dout.double())]
            layout = LAYOUTS[name](case.spans.queries, ring)
            found = [layout.unshard([one[number][i] for one in answers], 1).double() for i in range(4)]
            if case.sinks:
                found.append(torch.stack([one[number][4] for one in answers]).double().sum(dim=0))
            for mine, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, theirs.detach(), rtol=tolerance, atol=tolerance)
            number += 1


@pytest.mark.parametrize("ring", [3, 8])  # test_sharded.py has smaller meshes, of all strategies
def test_every_layout_and_mask_equals_one_process(ranks, ring):
    cases, layouts = list(CASES.values()), list(LAYOUTS)
    compare(ranks(ring)(on_every_rank, cases, layouts, ring, 1), cases, layouts, ring, 1e-10)


@pytest.mark.parametrize("ring, ulysses", [(2, 4), (4, 2)])
def test_ulysses_and_ring_together(ranks, ring, ulysses):
    cases = [case for case in CASES.values() if case.heads % ulysses == 0]
    cases.append(Case(Spans.causal(67), heads=12, kv_heads=3, sinks=True))  # kv_heads that ulysses does not divide
    layouts = ["zigzag"]
    compare(ranks(ring * ulysses)(on_every_rank, cases, layouts, ring, ulysses), cases, layouts, ring, 1e-10)


def test_fp32_is_equal_to_rounding(ranks):
    cases = [Case(case.spans, dtype=torch.float32, sinks=case.sinks, batch=case.batch) for case in CASES.values()]
    # eps of fp32 is 1.2e-7; sums of up to 151 terms of size about 1 lose a few digits of it
    compare(ranks(4)(on_every_rank, cases, ["zigzag"], 4, 1), cases, ["zigzag"], 4, 8 * 1.2e-7 * 151**0.5)


def sent_by(spans: Spans, ring: int) -> list[tuple[str, tuple[int, ...]]]:
    """What leaves this rank in forward and backward, as shapes."""
    parcels = []

    class Counting(PointToPoint):
        def exchange(self, sent, *others):
            parcels.extend((str(x.dtype), tuple(x.shape)) for x in sent if x.numel())
            return super().exchange(sent, *others)

    before, TRANSPORTS["p2p"] = TRANSPORTS["p2p"], lambda group, device, lane: Counting(group)
    try:
        layout = Layout.contiguous(spans.queries, ring)
        mesh = Mesh.create(1, ring, 1)
        q, k, v = (torch.randn(1, layout.rows, heads, 4, requires_grad=True) for heads in (2, 1, 1))
        ring_plan = plan_ring(spans, layout, mesh.ring_rank)
        ring_attention(q, k, v, ring_plan, mesh.ring_group).sum().backward()
    finally:
        TRANSPORTS["p2p"] = before
    return parcels


def test_only_the_keys_that_are_needed_travel(ranks):
    """Window 11 over 4 contiguous shards of 32: the next rank needs 10 keys, and gives 10 gradients back."""
    answers = ranks(4)(sent_by, Spans.causal(128, window=11), 4)
    pair = [("torch.float32", (1, 10, 1, 4))] * 2
    # Keys and values forward and again backward to the next rank, their gradients to the one before.
    assert answers == [pair * 2, pair * 3, pair * 3, pair]


def test_documents_inside_their_shards_send_nothing(ranks):
    assert ranks(4)(sent_by, Spans.packed([32] * 4), 4) == [[]] * 4


def compiled_equals_eager() -> bool:
    mesh = Mesh.create(1, 2, 1)
    attend = SequenceAttention(mesh, "zigzag")

    def layer(q, k, v, ring_plan):
        return attend(q * 2, k, v, ring_plan).sin()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for lengths in ([40], [7, 33], [20, 19, 1]):  # other documents, the same graph or one with dynamic sizes
        ring_plan = attend.plan(Spans.packed(lengths), "cpu")
        leaves = [torch.randn(1, 20, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
        found, expected = (torch.autograd.grad(f(*leaves, ring_plan).sum(), leaves) for f in (compiled, layer))
        torch.testing.assert_close(found, expected)
    return True


def test_compiled_without_a_graph_break(ranks):
    assert ranks(2)(compiled_equals_eager) == [True, True]


def refusals() -> list[str]:
    mesh, said = Mesh.create(1, 2, 1), []
    x = torch.zeros(1, 4, 2, 8)
    plan = plan_ring(Spans.causal(8), Layout.zigzag(8, 2), dist.get_rank())
    batch = plan_ring(Spans.packed([[8], [4, 4]]), Layout.zigzag(8, 2), dist.get_rank())
    single = plan_ring(Spans.causal(4), Layout.zigzag(4, 1), 0)
    for call in (
        lambda: ring_attention(x, x, x, plan, mesh.ring_group, transport="pigeon"),
        lambda: ring_attention(x, x, x, single, mesh.ring_group),
        lambda: ring_attention(x[:, 1:], x[:, 1:], x[:, 1:], plan, mesh.ring_group),
        lambda: ring_attention(x, x, x, batch, mesh.ring_group),
        lambda: read_steps(*plan.to("meta"), x, dist.get_rank(), 2),
        lambda: plan_ring(Spans.causal(9), Layout.zigzag(8, 2), 0),
        lambda: plan_ring(Spans.causal(8, 9), Layout.zigzag(8, 2), 0),
        lambda: SequenceAttention(mesh, "spiral"),
        lambda: SequenceAttention(Mesh.create(1, 1, 2), "zigzag")(*[torch.zeros(1, 4, 3, 8)] * 3, plan),
    ):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    return said


def test_what_does_not_fit_is_refused(ranks):
    for said in ranks(2)(refusals):
        for line, part in zip(
            said,
            [
                "'pigeon': must be one of auto, p2p, copy_engine",
                "ring of 1 ranks",
                "shards of 4 rows, these have 3",
                "a batch of 2, and this one of 1",
                "the plan is on meta and q on cpu",
                "9 queries",
                "hi reaches from 2 to 9: keys are 0 to 8",
                "'spiral'",
                "heads=3",
            ],
            strict=True,
        ):
            assert part in line
