"""Decoding over keys and values that are sharded on a ring: each rank holds those of some tokens, of all layers.

A prompt's stay where the ring's prefill has them; those of new tokens go to the ranks in turn. All ranks compute the
new token alike, each attends to the keys that it holds, and the parts merge by their log-sum-exp: exact, and a rank
holds 1 / ranks of the cache and reads no more than that for a token.

    cache = Cache(layout, group, starts=[0, 700], room=256)      # two prompts, the shorter one padded on the left
    cache.keep(k, v)                                             # of each layer in turn: this rank's shards
    cache.begin()                                                # a new token of each row
    out = cache.attend(q, k, v)                                  # of each layer in turn; all ranks together
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ringspan.kernels.attention import accumulator, attention_forward, sink_start
from ringspan.kernels.plan import Plan
from ringspan.parallel.gather import all_gather
from ringspan.parallel.layout import Layout


class Cache:
    """Keys and values of a batch of rows, which ``layout`` shares out; slots before ``starts[row]`` are padding.

    There is ``room`` for so many tokens a row behind the layout's.
    """

    def __init__(
        self, layout: Layout, group: dist.ProcessGroup, *, starts: Sequence[int], room: int, backend: str = "auto"
    ) -> None:
        self.group, self.backend, self.starts = group, backend, torch.tensor(starts)
        self.length, self.end = layout.length, layout.length + room  # slots in use, and all there are
        rank, ranks = group.rank(), group.size()
        prompt = layout.positions(rank)
        self.prompt = prompt[prompt >= 0]
        new = torch.arange(layout.length, self.end)[rank::ranks]
        self.slots = torch.cat([self.prompt, new])  # of this rank's keys, ascending
        self.pairs: list[tuple[Tensor, Tensor]] = []  # of each layer: (rows, len(slots), kv_heads, dim)
        self.rows = 0  # of ``slots`` that are in use
        self.own = False  # whether the newest token's are this rank's
        self.plans: dict[int | None, Plan] = {}  # of the newest token, by window
        self.layers: Iterator[tuple[Tensor, Tensor]] = iter(())  # ``pairs`` of those that have not yet attended from it

    def keep(self, k: Tensor, v: Tensor) -> None:
        """One more layer's keys and values of the prompt: this rank's shard, (rows, positions, kv_heads, dim)."""
        pair = tuple(x.new_empty((x.shape[0], len(self.slots), *x.shape[2:])) for x in (k, v))
        for kept, x in zip(pair, (k, v), strict=True):
            kept[:, : len(self.prompt)] = x[:, : len(self.prompt)]
        self.pairs.append((pair[0], pair[1]))

    def begin(self) -> None:
        """From here on, until the next call, each layer attends once, from one more token of each row: it sees itself.

        ValueError: there is no room for it.
        """
        if self.length == self.end:
            raise ValueError(f"the cache has room for {self.end} tokens a row, and all of it is used")
        slot, self.length = self.length, self.length + 1
        self.rows = int(torch.searchsorted(self.slots, self.length))
        self.own = self.rows > 0 and int(self.slots[self.rows - 1]) == slot
        self.plans, self.layers = {}, iter(self.pairs)

    def plan(self, window: int | None) -> Plan:
        """Which of this rank's keys the newest token sees: the last ``window`` of its row, or all."""
        if window not in self.plans:
            first = self.starts if window is None else self.starts.clamp(min=self.length - window)
            lo = torch.searchsorted(self.slots, first).clamp(max=self.rows).to(torch.int32)[:, None]
            made = torch.stack((lo, torch.full_like(lo, self.rows), torch.zeros_like(lo)))  # a query is one tile
            lo, hi, order = made.to(self.pairs[0][0].device, non_blocking=True)  # once, and no layer waits for the host
            self.plans[window] = Plan(lo, hi, lo[:, :0], lo[:, :0], order, lo[:, :0])
        return self.plans[window]

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        window: int | None = None,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of the newest token, (rows, 1, heads, dim), over all ranks' keys and its own ``k`` and ``v``.

        ``window``, ``softcap`` and ``sinks`` are as in the layer's prefill.
        """
        keys, values = (x[:, : self.rows] for x in next(self.layers))
        if self.own:
            keys[:, -1:], values[:, -1:] = k, v
        alone = self.group.size() == 1
        out, lse = attention_forward(
            q,
            keys,
            values,
            self.plan(window),
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            softcap=softcap,
            into=sink_start(q, sinks) if sinks is not None and self.group.rank() == 0 else None,
            out_dtype=q.dtype if alone else accumulator(q.dtype),
            backend=self.backend,
        )
        return out if alone else merge(out, lse, self.group).to(q.dtype)


def merge(out: Tensor, lse: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Attention over all ranks' keys, from each rank's out (B, S, H, D) and lse (B, H, S) over its own.

    The same bits on all ranks; 0 where no rank has a key.
    """
    part = torch.cat([out, lse.transpose(1, 2)[..., None]], dim=-1)
    parts = part.new_empty((group.size(), *part.shape))
    all_gather(parts.view(-1, *part.shape[1:]), part, group=group)
    lse = parts[..., -1:]
    weights = (lse - lse.amax(dim=0).nan_to_num(neginf=0.0)).exp()
    total = weights.sum(dim=0)
    return (weights * parts[..., :-1]).sum(dim=0) / total.masked_fill(total == 0, 1.0)
