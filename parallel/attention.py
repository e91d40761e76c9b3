"""What a model calls: attention over a sequence that is sharded on the mesh, Ulysses inside, the ring across."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ringspan.kernels.attention import check_inputs, pick_backend
from ringspan.kernels.spans import Spans
from ringspan.parallel import gather, ring
from ringspan.parallel.autograd import ShardedAttention
from ringspan.parallel.balance import lockstep_imbalance
from ringspan.parallel.gather import GatherPlan, plan_gather
from ringspan.parallel.layout import LAYOUTS, Layout
from ringspan.parallel.mesh import Mesh
from ringspan.parallel.ring_plan import RingPlan, plan_ring
from ringspan.parallel.transport import agree, check_transport, pick_transport
from ringspan.parallel.ulysses import to_heads, to_positions

STRATEGIES = ("auto", "ring", "allgather")
GATHER_RATE = 300e9  # bytes/s that a rank receives: NCCL's all-gather, 64 to 256 MiB, 4 H100 of one host, measured
# Lost a hop and pass to smaller blocks, launches and waiting, on 2 H200: the fit of docs/scaling.md said 238 us, and on
# another day 101; but at 16 MiB all-gather attention was twice as fast, at 32 the ring within 3 % of one GPU's rate.
HOP_SECONDS = 220e-6

AttentionPlan = RingPlan | GatherPlan


class SequenceAttention:
    """Attention for one mesh: made once a run, called by every layer.

    A rank holds slice ``ulysses_rank`` of shard ``ring_rank``. With the layout "balanced", shards are cut anew for each
    mask. ValueError: an unknown layout, transport, strategy or backend.
    """

    def __init__(
        self, mesh: Mesh, layout_name: str, backend: str = "auto", transport: str = "auto", strategy: str = "auto"
    ) -> None:
        names = (*LAYOUTS, "balanced")
        for what, name, known in (("layout", layout_name, names), ("strategy", strategy, STRATEGIES)):
            if name not in known:
                raise ValueError(f"{what}={name!r}: must be one of {', '.join(known)}")
        self.mesh, self.layout_name = mesh, layout_name
        self.backend, self.transport = backend, check_transport(transport)
        self.strategy = "ring" if mesh.ring == 1 else strategy  # "auto" is the ring where nothing is picked

    def pick(self, q: Tensor, *, kv_heads: int | None = None, seq_len: int | None = None) -> dict[str, str]:
        """What runs for queries like ``q``, for the log: strategy, backend, transport, layout. All ranks ask together.

        From here on nothing else does: what that backend cannot run is a ValueError, not another backend. ``kv_heads``
        (default q's heads) and ``seq_len`` (of the whole sequence) are what the strategy "auto" goes by, on a GPU.
        ValueError: the ranks would not run the same.
        """
        self.backend = pick_backend(self.backend, q)
        self.transport = pick_transport(self.transport, self.mesh.ring_group, q.device)
        heads, ranks = q.shape[2], self.mesh.ring
        if self.strategy == "auto" and seq_len is not None and q.device.type == "cuda":  # on a CPU nothing was measured
            local_heads = max(1, (kv_heads or heads) / self.mesh.ulysses)
            self.strategy = pick_strategy(seq_len / ranks * local_heads * q.shape[3] * q.element_size() * 2, ranks)
        self.strategy = "ring" if self.strategy == "auto" else self.strategy
        picked = {
            "strategy": self.strategy if ranks > 1 else "none",
            "backend": self.backend,
            "transport": self.transport if ranks > 1 and self.strategy != "allgather" else "none",
            "layout": self.layout_name if ranks > 1 else "contiguous",
        }
        sizes = {"seq_len": seq_len, "heads": heads, "kv_heads": kv_heads, "head_dim": q.shape[3], "dtype": q.dtype}
        same = {name: picked[name] for name in ("strategy", "backend", "layout")}  # rings may have unlike wires
        for group in (self.mesh.ring_group, self.mesh.ulysses_group):
            agree(group, {**same, **sizes})
        return picked

    def layout(self, spans: Spans) -> Layout:
        """Which positions each rank of the ring holds; ``spans`` are on the host, of whole rows."""
        if self.layout_name == "balanced":
            return Layout.balanced(spans, self.mesh.ring)
        return _fixed_layout(self.layout_name, spans.queries, self.mesh.ring)

    def local_positions(self, layout: Layout) -> Tensor:
        """Global position of each of this rank's rows: int64 (rows,), -1 is padding at the end."""
        return layout.local_positions(self.mesh.ring_rank, self.mesh.ulysses_rank, self.mesh.ulysses)

    def plan(self, spans: Spans, device: torch.device | str, layout: Layout | None = None) -> AttentionPlan:
        """What all layers need of one micro-batch's mask; ``layout`` is what ``layout(spans)`` gave, if it is known."""
        layout = self.layout(spans) if layout is None else layout
        make: Any = plan_gather if self.strategy == "allgather" else plan_ring
        return make(spans, layout, self.mesh.ring_rank, parts=self.mesh.ulysses).to(device)

    def plans(self, spans: Spans, device: torch.device | str, layout: Layout) -> Any:
        """What a model is given of a micro-batch: one plan, as all its layers see the same."""
        return self.plan(spans, device, layout)

    def pairs(self, spans: Spans) -> float:
        """(query, key) pairs that a head of a layer attends to, all rows together; the mean of the layers."""
        return int(spans.pairs().sum())

    def imbalance(self, spans: Spans, layout: Layout) -> float:
        """How much longer than its mean rank the ring computes: see ``lockstep_imbalance``; without steps to wait at,
        how much more the slowest rank computes."""
        return lockstep_imbalance(spans, layout, steps=self.strategy != "allgather")

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: AttentionPlan,
        *,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Local shards in and out, (batch, rows, heads, dim); see ``ring_attention``.

        ValueError: heads that the ulysses ranks do not divide.
        """
        ranks, group = self.mesh.ulysses, self.mesh.ulysses_group
        scale = check_inputs(q, k, v, [], sinks, scale, softcap)
        if q.shape[2] % ranks:
            raise ValueError(f"heads={q.shape[2]}: must be a multiple of ulysses={ranks}")
        backend = pick_backend(self.backend, q, k, v)
        if sinks is not None:
            sinks = sinks.chunk(ranks)[self.mesh.ulysses_rank]
        if own := k.shape[2] % ranks == 0:
            k, v = to_heads(k, group), to_heads(v, group)
        name, *settings = ring.OPERATOR, self.mesh.ring_group.group_name, self.transport, scale, softcap, backend
        if isinstance(plan, GatherPlan):
            name, *settings = gather.OPERATOR, self.mesh.ring_group.group_name, scale, softcap, backend
        repeated = None if own else (group.group_name, ranks)
        out, _ = ShardedAttention.apply(name, repeated, to_heads(q, group), k, v, sinks, *plan, *settings)
        return to_positions(out, group)


def pick_strategy(shard_bytes: float, ranks: int) -> str:
    """What "auto" is for shards whose keys and values have so many bytes: the strategy that is slower by less.

    All-gather attention computes nothing while keys come, in the forward and again in the backward pass, and while dK
    and dV, twice as wide, go home; the ring hides that, and loses HOP_SECONDS a hop and pass.
    """
    gather_seconds = (1 + 1 + 2) * (ranks - 1) * shard_bytes / GATHER_RATE
    return "allgather" if gather_seconds < 2 * (ranks - 1) * HOP_SECONDS else "ring"


@functools.lru_cache(maxsize=8)
def _fixed_layout(name: str, length: int, ranks: int) -> Layout:
    return LAYOUTS[name](length, ranks)
