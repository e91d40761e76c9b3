"""Attention for layers that see unlike windows: what a batch lets them see, cut to each one's window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ringspan.kernels.spans import Spans
from ringspan.parallel.attention import AttentionPlan, SequenceAttention
from ringspan.parallel.layout import Layout


class Windowed:
    """Attention over one batch: called by each layer with its window.

    ``spans`` are on the host, of whole rows; ``layout`` is what ``attend.layout(spans)`` gave, if it is known.
    """

    def __init__(
        self, attend: SequenceAttention, spans: Spans, device: torch.device, layout: Layout | None = None
    ) -> None:
        self.attend, self.spans, self.device = attend, spans, device
        self.layout = attend.layout(spans) if layout is None else layout
        self.plans: dict[int | None, AttentionPlan] = {}

    def plan(self, window: int | None) -> AttentionPlan:
        """Made once."""
        if window not in self.plans:
            self.plans[window] = self.attend.plan(windowed(self.spans, window), self.device, self.layout)
        return self.plans[window]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, **given: Any) -> Tensor:
        """Local shards in and out, as of `SequenceAttention`; ``window``: the last so many keys."""
        return self.attend(q, k, v, self.plan(window), **given)


def windowed(spans: Spans, window: int | None) -> Spans:
    """What a layer with such a window sees of them."""
    return spans if window is None else spans & Spans.causal(spans.queries, window=window)


class WindowedAttention(SequenceAttention):
    """For layers whose windows are given: a model is given all their plans, and counts are means of the layers."""

    def __init__(self, windows: tuple[int | None, ...], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.windows = windows

    def plans(self, spans: Spans, device: torch.device | str, layout: Layout) -> Windowed:
        seen = Windowed(self, spans, torch.device(device), layout)
        for window in set(self.windows):
            seen.plan(window)
        return seen

    def pairs(self, spans: Spans) -> float:
        return self._mean(super().pairs, spans)

    def imbalance(self, spans: Spans, layout: Layout) -> float:
        imbalance = super().imbalance
        return self._mean(lambda seen: imbalance(seen, layout), spans)

    def _mean(self, count: Callable[[Spans], float], spans: Spans) -> float:
        counts = {window: count(windowed(spans, window)) for window in set(self.windows)}
        return sum(counts[window] for window in self.windows) / len(self.windows)
