"""What a model calls: attention over a sequence that is sharded on the mesh, Ulysses inside, the ring across."""

import torch
from torch import Tensor

from ringspan.kernels.attention import pick_backend
from ringspan.kernels.spans import Spans
from ringspan.parallel.layout import LAYOUTS, Layout
from ringspan.parallel.mesh import Mesh
from ringspan.parallel.ring import RingPlan, plan_ring, ring_attention
from ringspan.parallel.transport import pick_transport
from ringspan.parallel.ulysses import replicate_heads, to_heads, to_positions


class SequenceAttention:
    """Attention for one mesh and one layout: made once a run, called by every layer.

    A rank holds slice ``ulysses_rank`` of shard ``ring_rank``. ValueError: an unknown layout, transport or backend.
    """

    def __init__(self, mesh: Mesh, layout_name: str, backend: str = "auto", transport: str = "auto") -> None:
        if layout_name not in LAYOUTS:
            raise ValueError(f"layout={layout_name!r}: must be one of {', '.join(LAYOUTS)}")
        self.mesh, self.layout_name = mesh, layout_name
        self.backend, self.transport = backend, pick_transport(transport)

    def pick(self, q: Tensor) -> dict[str, str]:
        """What runs for queries like ``q``, for the log: backend, transport and layout.

        From here on nothing else does: what that backend cannot run is a ValueError, not another backend.
        """
        self.backend = pick_backend(self.backend, q)
        return {
            "backend": self.backend,
            "transport": self.transport if self.mesh.ring > 1 else "none",
            "layout": self.layout_name if self.mesh.ring > 1 else "contiguous",
        }

    def layout(self, seq_len: int) -> Layout:
        """Which positions each rank of the ring holds."""
        return LAYOUTS[self.layout_name](seq_len, self.mesh.ring)

    def local_positions(self, seq_len: int) -> Tensor:
        """Global position of each of this rank's rows: int64 (rows,), -1 is padding at the end."""
        return self.layout(seq_len).local_positions(self.mesh.ring_rank, self.mesh.ulysses_rank, self.mesh.ulysses)

    def plan(self, spans: Spans, device: torch.device | str) -> RingPlan:
        """The ring's steps for one micro-batch, shared by all layers; ``spans`` are on the host, of whole rows."""
        layout = self.layout(spans.queries)
        return plan_ring(spans, layout, self.mesh.ring_rank, parts=self.mesh.ulysses).to(device)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ring_plan: RingPlan,
        *,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Local shards in and out, (batch, rows, heads, dim); see ``ring_attention``.

        ValueError: heads that the ulysses ranks do not divide.
        """
        ranks, group = self.mesh.ulysses, self.mesh.ulysses_group
        if q.shape[2] % ranks:
            raise ValueError(f"heads={q.shape[2]}: must be a multiple of ulysses={ranks}")
        q, k, v = (to_heads(x, group) for x in (q, replicate_heads(k, ranks), replicate_heads(v, ranks)))
        if sinks is not None:
            sinks = sinks.chunk(ranks)[self.mesh.ulysses_rank]
        out = ring_attention(
            q,
            k,
            v,
            ring_plan,
            self.mesh.ring_group,
            transport=self.transport,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            backend=self.backend,
        )
        return to_positions(out, group)
