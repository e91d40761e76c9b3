"""Hugging Face's models on our attention, on one device and with their sequences sharded over ranks.

    register()                      # once: from here on there is attn_implementation="ringspan"
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="ringspan")

    attend = SequenceAttention(Mesh.create(1, 4, 1), "balanced")                    # a ring of 4 ranks
    batch = shard_batch(attend, input_ids, lengths=[3000, 5192], device=device)     # whole rows, the same on all ranks
    loss = model(**batch).loss      # of this rank's labels: the ranks' sum is the mean loss of the batch

Windows, softcaps, sinks and scales are the model's own. What is not a span is refused, as are dropout and biases.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ringspan.kernels.attention import attention
from ringspan.kernels.plan import Plan, plan
from ringspan.kernels.sdpa import band, recognised, refuse_dropout, run_on_any
from ringspan.kernels.spans import Spans
from ringspan.parallel.attention import SequenceAttention
from ringspan.parallel.windows import Windowed
from ringspan.train.packing import IGNORE

NAME = "ringspan"
PAIRS_OF_A_BLOCK = 2**26  # (query, key) pairs of a mask that are looked at together: 64 MiB
BY_LENGTH = ("dynamic", "longrope")  # rotary positions whose frequencies follow the longest position in the input


def register(name: str = NAME) -> None:
    """From here on ``attn_implementation=name`` is our attention, in every model that asks Transformers for its own."""
    AttentionInterface.register(name, attend_to)
    AttentionMaskInterface.register(name, CausalMask)


class CausalMask:
    """What a model's layers of one kind may see, from what Transformers says of it; found out when a layer asks.

    Takes the arguments of ``sdpa_mask``. In a sharded forward nobody asks: there the batch says it.
    """

    def __init__(self, *, batch_size: int, q_length: int, kv_length: int, **given: Any) -> None:
        self.sizes, self.given = (batch_size, q_length, kv_length), given

    @functools.cached_property
    def plan(self) -> Plan:
        """ValueError: it is no span."""
        _, queries, keys = self.sizes
        with torch.inference_mode(False), torch.no_grad():
            if (offset := self._plainly_causal()) is not None:
                return band(queries, keys, offset, None, 0, torch.device(self.given["device"]))
            return plan(Spans.from_mask(self._blocks()), keys)

    def _plainly_causal(self) -> int | None:
        """Which key the first query stands at, if it and all others see every key up to their own; else None."""
        _, _, keys = self.sizes
        first: int = self.given.get("kv_offset", 0)
        window: int | None = self.given.get("local_size")
        mask: Tensor | None = self.given.get("attention_mask")
        if not self.given.get("allow_is_causal_skip", True) or (window is not None and window < keys):
            return None
        if mask is not None:
            seen = mask[:, first : first + keys]
            if seen.shape[1] < keys or not seen.all():
                return None
        return int(self.given.get("q_offset", 0)) - first

    def _blocks(self) -> Iterator[Tensor]:
        """The mask, a block of queries at a time."""
        batch, queries, keys = self.sizes
        size = max(1, PAIRS_OF_A_BLOCK // max(1, batch * keys))
        given = {**self.given, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        start = given.pop("q_offset", 0)
        for at in range(0, queries, size):
            n = min(size, queries - at)
            mask = sdpa_mask(batch_size=batch, q_length=n, kv_length=keys, q_offset=start + at, **given)
            assert mask is not None, "no skip was allowed"
            yield mask[:, 0]


def attend_to(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: CausalMask | Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    ringspan: Callable[..., Tensor] | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: (batch, heads, tokens, dim) in, (batch, tokens, heads, dim) out.

    ``ringspan`` is given to a model's forward, which hands it to its layers: attention over this rank's part of rows.
    ValueError: dropout, biases, attention weights asked for, or a mask that is no span.
    """
    refuse_dropout(dropout)
    if others.get("position_bias") is not None or others.get("output_attentions"):
        raise ValueError("there are neither position biases nor whole attention weights here; use another attention")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    given: dict[str, Any] = {"softcap": softcap or 0.0, "sinks": s_aux}
    run: Callable[..., Any]
    if ringspan is not None:
        refuse_other_masks(module, sliding_window, attention_mask)
        run = functools.partial(ringspan, window=sliding_window, **given)
    else:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        run = functools.partial(attention, spans=_whole(attention_mask, query, key, causal), **given)
    return run_on_any(run, q, k, v, scaling), None


def _whole(mask: CausalMask | Tensor | None, query: Tensor, key: Tensor, causal: bool) -> Plan:
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    if isinstance(mask, CausalMask):
        return mask.plan
    if mask is None:  # as Transformers' sdpa takes it: a query alone sees all
        return band(queries, keys, 0, None, 0 if causal and queries > 1 else None, query.device)
    found = recognised(mask, batch, heads, queries, keys)
    if found.by_head:
        raise ValueError("the attention mask differs between heads, which only scaled_dot_product_attention takes")
    return found.plan


def refuse_other_masks(module: nn.Module, window: int | None, mask: CausalMask | Tensor | None) -> None:
    """ValueError: a layer whose ranks would not agree, or that sees other keys than the batch and its window say."""
    rope = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if kinds.intersection(BY_LENGTH):
        raise ValueError(f"rope_type {kinds}: follows the length of the input, of which each rank sees a part")
    local = mask.given.get("local_size") if isinstance(mask, CausalMask) else window
    if local != window or not getattr(module, "is_causal", True):
        raise ValueError(f"{type(module).__name__}: sees keys by another rule than causal attention or a window")


def shard_batch(
    attend: SequenceAttention,
    input_ids: Tensor,
    *,
    labels: Tensor | None = None,
    lengths: Sequence[int] | Sequence[Sequence[int]] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """This rank's part of whole rows, to call a causal model with: ``model(**shard_batch(...))``.

    ``input_ids`` and ``labels`` are int64 (rows, tokens) on the host, the same on all ranks that share them; labels
    are not shifted (default: the tokens themselves), -100 where there is none. ``lengths`` are those of the documents,
    as for ``Spans.packed``: blind to each other, and with positions of their own. The loss is this rank's sum over the
    number of labels of all ranks: where gradients are averaged over ranks, multiply it by how many they are.
    """
    n = input_ids.shape[1]
    lengths = [n] if lengths is None else lengths
    spans = Spans.packed(lengths)
    if spans.queries != n:
        raise ValueError(f"lengths sum to {spans.queries}, and the rows have {n} tokens")
    sharded = Windowed(attend, spans, torch.device(device))
    starts = spans.lo.expand(len(input_ids), -1)
    positions = torch.arange(n) - starts
    wanted = next_tokens(input_ids if labels is None else labels, starts)

    def mine(x: Tensor, fill: int) -> Tensor:
        mesh = attend.mesh
        part = sharded.layout.shard(x, mesh.ring_rank, 1, part=mesh.ulysses_rank, parts=mesh.ulysses, fill=fill)
        return part.to(device)

    shifted = mine(wanted, IGNORE)
    return {
        "input_ids": mine(input_ids, 0),
        "position_ids": mine(positions, 0),
        "labels": shifted,  # that there are any is all that models look for when these come as well:
        "shift_labels": shifted,
        "num_items_in_batch": int((wanted != IGNORE).sum()),
        "use_cache": False,
        NAME: sharded,
    }


def next_tokens(labels: Tensor, starts: Tensor) -> Tensor:
    """Each token's label is the next one's, but for the last of a document; ``starts``: where each token's begins."""
    following = torch.full_like(labels, IGNORE)
    following[:, :-1] = labels[:, 1:].masked_fill(starts[:, 1:] != starts[:, :-1], IGNORE)
    return following
