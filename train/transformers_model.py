"""A causal model of Transformers whose rows are shared by ranks, and whose logits are never whole.

What would go wrong in silence where each rank has a part of a row, or where our fused loss takes the place of the
model's own, is looked for in numbers: tokens that see one another by anything but attention, logits that are not
hidden states times the head's matrix.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ringspan.train.loss import cross_entropy_sum
from ringspan.train.transformers_attention import NAME

LARGE = 1000.0  # logits that a softcap would show in


def inputs(tokens: Tensor, positions: Tensor, attend: Callable[..., Tensor]) -> dict[str, Any]:
    """Of a forward. A mask of ones: without one Transformers would look for documents in the positions, and wait."""
    mask = torch.ones_like(tokens)
    return {"input_ids": tokens, "position_ids": positions, "attention_mask": mask, "use_cache": False, NAME: attend}


def hidden_states(model: PreTrainedModel, tokens: Tensor, positions: Tensor, attend: Callable[..., Tensor]) -> Tensor:
    """(B, S, dim): what the head multiplies. ``attend(q, k, v, window=...)`` is called by each layer in turn."""
    return model.base_model(**inputs(tokens, positions, attend)).last_hidden_state


def alone(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """Attention of tokens each of which sees itself."""
    return v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)


@torch.no_grad()
def why_not_apart(model: PreTrainedModel) -> str | None:
    """Whether tokens see one another by anything but attention. Two rows have the same token in the middle: with each
    token alone, the same comes out there."""
    ids, positions, near = _probe(model)
    with gathered(model):
        hidden = hidden_states(model.eval(), ids, positions, alone)
    if (hidden[0, 1] - hidden[1, 1]).abs().max() > near * hidden.abs().max():
        return "its tokens see one another by more than attention: ranks would each see a part"
    return None


@torch.no_grad()
def why_not_fused(model: PreTrainedModel) -> str | None:
    """Whether its logits are anything but hidden states times the matrix of its head."""
    ids, positions, near = _probe(model)
    head = cast(Any, model.get_output_embeddings())
    if hasattr(head, "base_layer"):  # peft's: no more than that matrix at first
        return "its head has adapters, of which the fused loss knows nothing"
    if getattr(head, "bias", None) is not None:
        return "its head adds a bias to the logits, which the fused loss cannot do"
    with gathered(model, head.weight):
        hidden = hidden_states(model.eval(), ids, positions, alone)
        hidden *= LARGE / (hidden @ head.weight.T).abs().max()
        hook = model.base_model.register_forward_hook(lambda *run: run[-1].__setitem__("last_hidden_state", hidden))
        logits = model(**inputs(ids, positions, alone)).logits
        hook.remove()
        if (logits - hidden @ head.weight.T).abs().max() > near * LARGE:
            return "its logits are not hidden states times its head's matrix, as the fused loss has it"
    return None


@contextmanager
def gathered(model: nn.Module, kept: Tensor | None = None) -> Iterator[None]:
    """Inside, what ZeRO-3 has made in shards has its parameters while it runs, before there is an engine that does so:
    each module has its own, and ``kept`` is whole throughout."""
    if not any(hasattr(p, "ds_id") for p in model.parameters()):
        yield
        return
    whole = importlib.import_module("deepspeed").zero.GatheredParameters
    running: dict[nn.Module, Any] = {}

    def begin(module: nn.Module, *_: Any) -> None:
        running[module] = whole([p for p in module.parameters(recurse=False) if p is not kept])
        running[module].__enter__()

    def end(module: nn.Module, *_: Any) -> None:
        running.pop(module).__exit__(None, None, None)

    hooks = [
        hook for x in model.modules() for hook in (x.register_forward_pre_hook(begin), x.register_forward_hook(end))
    ]
    try:
        with whole([] if kept is None else [kept]):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def compile_layers(model: nn.Module, backend: str) -> list[GradientCheckpointingLayer]:
    """From here on a layer's forward is one graph to torch.compile, with attention as an operator in it, and layers of
    one kind share it. Hooks stay outside. The layers."""
    # Lengths, kinds of layers, their first one's input without a gradient, evaluation: each is another; 8 would not do
    cast(Any, torch)._dynamo.config.recompile_limit = 64
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    kinds: set[Any] = set(map(type, layers))
    forwards = {kind: torch.compile(kind.forward, backend=backend, fullgraph=True) for kind in kinds}
    for layer in layers:
        layer.forward = MethodType(forwards[type(layer)], layer)
    return layers


@torch.no_grad()
def why_not_compiled(model: PreTrainedModel) -> str | None:
    """Whether a layer is not one graph. Found out with a backend that leaves a graph as it is."""
    from torch._dynamo.exc import TorchDynamoException  # noqa: PLC0415 - takes seconds, and only who compiles needs it

    ids, positions, _ = _probe(model)
    layers = compile_layers(model, "eager")
    try:
        hidden_states(model.eval(), ids, positions, alone)
    except TorchDynamoException as error:
        return f"torch.compile cannot take a layer of it as one graph ({str(error).partition(chr(10))[0]})"
    finally:
        for layer in layers:
            del layer.forward
        cast(Any, torch)._dynamo.reset()
    return None if layers else "it has no layers that Transformers marks as such"


@contextmanager
def fused_loss(model: PreTrainedModel, labels: Tensor, count: Tensor) -> Iterator[None]:
    """Inside, what `shard_batch` gives comes to the same loss without logits: the head gives the sum of the losses of
    ``labels`` over ``count``. `why_not_fused` comes first.

    The head does so itself, because ZeRO-3 and FSDP gather its matrix for the time that it runs. And it divides: FSDP
    rounds what it gives to bf16, and the sum's gradient, 1 / count, would be as well.
    """
    head: Any = model.get_output_embeddings()
    head = next(x for x in head.modules() if x._parameters.get("weight") is head.weight)  # inside peft's
    before = vars(head).get("forward"), model.loss_function

    def loss(hidden: Tensor) -> Tensor:
        weight, kind = head.weight, hidden.device.type
        if torch.is_autocast_enabled(kind):  # its product would be in its dtype
            hidden, weight = (x.to(torch.get_autocast_dtype(kind)) for x in (hidden, weight))
        return cross_entropy_sum(hidden, weight, labels) / count

    head.forward, model.loss_function = loss, (lambda logits, *_, **__: logits)
    try:
        yield
    finally:
        head.forward, model.loss_function = before
        if before[0] is None:  # its class has it
            del head.forward


def _probe(model: PreTrainedModel) -> tuple[Tensor, Tensor, float]:
    """Tokens, their positions, and how far from one another sums of unlike groups of tokens come out, as of layers of
    experts."""
    ids = torch.tensor([[1, 2, 3], [3, 2, 1]], device=model.device) % model.config.get_text_config().vocab_size
    return ids, torch.arange(3, device=model.device).expand(2, -1), 64 * torch.finfo(model.dtype).eps
