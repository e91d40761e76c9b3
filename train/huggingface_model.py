"""Any causal model of Transformers in our loop: on our attention, sharded over ranks, with our fused loss.

What such a model is like is not read from its configuration, of which every architecture has its own, but seen: its
forward runs on the meta device, where attention only notes what it is asked for. And what would go wrong in silence
where each rank has a part of a row is looked for in numbers, once the weights are there: tokens that see one another
by anything but attention, logits that are not hidden states times the head's matrix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging

from ringspan.kernels.spans import Spans
from ringspan.parallel.attention import SequenceAttention
from ringspan.parallel.layout import Layout
from ringspan.train.activations import Activations
from ringspan.train.agree import from_rank_zero
from ringspan.train.engine import import_deepspeed
from ringspan.train.huggingface_config import HuggingFaceConfig, Outline
from ringspan.train.model import AttentionSizes, Head, Make
from ringspan.train.transformers_attention import NAME, Sharded, refuse_other_masks, register, windowed

if TYPE_CHECKING:
    from ringspan.train.config import TrainConfig

DROPS = re.compile(r"^(?!summary|classifier).*(dropout|pdrop)")  # not those of heads that are no language model's
LARGE = 1000.0  # logits that a softcap would show in


class WindowedAttention(SequenceAttention):
    """For layers that see unlike windows, given for each: a model is given the plans of all, and counts are means."""

    def __init__(self, windows: tuple[int | None, ...], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.windows = windows

    def plans(self, spans: Spans, device: torch.device | str, layout: Layout) -> Sharded:
        sharded = Sharded(self, spans, torch.device(device), layout)
        for window in set(self.windows):
            sharded.plan_of(window)
        return sharded

    def pairs(self, spans: Spans) -> float:
        return self._mean(lambda seen: int(seen.pairs().sum()), spans)

    def imbalance(self, spans: Spans, layout: Layout) -> float:
        return self._mean(lambda seen: super(WindowedAttention, self).imbalance(seen, layout), spans)

    def _mean(self, count: Callable[[Spans], float], spans: Spans) -> float:
        counts = {window: count(windowed(spans, window)) for window in set(self.windows)}
        return sum(counts[window] for window in self.windows) / len(self.windows)


class Seen:
    """In the place of `Sharded`: every token attends to itself alone, and what layers ask for is noted."""

    def __init__(self) -> None:
        self.windows: list[int | None] = []
        self.sizes: list[tuple[int, int, int]] = []  # query heads, key-value heads, dim

    def plan(self, module: nn.Module, window: int | None, mask: Any) -> None:
        refuse_other_masks(module, window, mask)
        self.windows.append(window)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        self.sizes.append((q.shape[2], k.shape[2], q.shape[3]))
        return v.repeat_interleave(q.shape[2] // k.shape[2], dim=2)


def outline_of(config: HuggingFaceConfig) -> Outline:
    """From a forward of one token on the meta device. ValueError: why it cannot be trained here."""
    about = described(config)
    seen, one = Seen(), torch.ones(1, 1, dtype=torch.int64)
    about._experts_implementation = "batched_mm"  # the one whose shapes do not depend on what tokens choose
    with torch.device("meta"):
        model = skeleton(config, about, torch.float32)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**inputs(one.to("meta"), one.to("meta"), seen))
    except (ValueError, ImportError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise refused(config, f"its forward does not run on our attention ({first_line(error)})") from error
    layers = about.get_text_config().num_hidden_layers
    if len(seen.sizes) != layers:
        raise refused(config, f"it has {layers} layers, and {len(seen.sizes)} of them ask Transformers for attention")
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise refused(config, "its head adds a bias to the logits, which the fused loss cannot do")
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    matmul, trained = counter.get_total_flops() // 2, sum(p.numel() for p in model.parameters() if p.requires_grad)
    heads, kv_heads, dim = map(max, zip(*seen.sizes, strict=True))
    return Outline(
        AttentionSizes(layers, heads, kv_heads, dim),
        tuple(seen.windows),
        head.weight.shape[0],
        head.weight.shape[1],
        trained,
        matmul - head.weight.numel(),
        matmul - trained if adapters else 0,
    )


def described(config: HuggingFaceConfig) -> PreTrainedConfig:
    """ValueError: there is no such folder or model, or it asks for dropout or quantised weights."""
    quiet()
    try:
        about = AutoConfig.from_pretrained(config.path)
    except (OSError, ValueError, KeyError) as error:
        raise refused(config, f"transformers finds no model it knows ({first_line(error)})") from error
    drops = {key: x for key, x in about.get_text_config().to_dict().items() if DROPS.search(key)}
    if drawn := [f"{key}={value}" for key, value in drops.items() if isinstance(value, float) and value > 0]:
        raise refused(config, f"{', '.join(drawn)}: ranks would drop unlike parts; set it to 0.0 in its config.json")
    if type(about) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise refused(config, f"transformers has no causal language model of {type(about).__name__}")
    if getattr(about, "quantization_config", None):
        raise refused(config, "its weights are quantised, and are not trained here")
    return about


def refused(config: HuggingFaceConfig, why: str) -> ValueError:
    return ValueError(f"model.path={config.path}: {why}")


def first_line(error: BaseException) -> str:
    return str(error).split("\n")[0] or type(error).__name__


def quiet() -> None:
    """Transformers' warnings are for its own users, and its bars are no part of a run's log."""
    register()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def skeleton(config: HuggingFaceConfig, about: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without its numbers, on the device and in the shards that torch is told to make it in."""
    try:
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(about, dtype=dtype, attn_implementation=NAME)
            adapt(model, config.lora, dtype)
    except ValueError as error:
        raise refused(config, first_line(error)) from error
    model.tie_weights()
    return model


def adapt(model: PreTrainedModel, rank: int | None, dtype: torch.dtype) -> None:
    """Put adapters into it (LoRA, Hu and others, arXiv 2106.09685), in its own dtype; all else is frozen."""
    if rank is None:
        return
    from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415 - takes seconds, and only adapters need it

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"), model)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
        if "lora_" in name:
            p.data = p.data.to(dtype)


def inputs(tokens: Tensor, positions: Tensor, seen: Any) -> dict[str, Any]:
    """Of a forward. A mask of ones: without one Transformers would look for documents in the positions, and wait."""
    mask = torch.ones_like(tokens)
    return {"input_ids": tokens, "position_ids": positions, "attention_mask": mask, "use_cache": False, NAME: seen}


def hidden_states(model: PreTrainedModel, tokens: Tensor, positions: Tensor, seen: Any) -> Tensor:
    """(B, S, dim): what the head multiplies."""
    return model.base_model(**inputs(tokens, positions, seen)).last_hidden_state


def loaded(config: HuggingFaceConfig, seed: int) -> PreTrainedModel:
    """All of it on the host, in the dtype of its files. ValueError: as `require_apart`, or weights are missing."""
    quiet()
    if config.pretrained:
        try:
            model, told = cast(Any, AutoModelForCausalLM).from_pretrained(
                config.path, dtype="auto", attn_implementation=NAME, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise refused(config, f"{first_line(error)}; model.pretrained=false draws the weights") from error
        if absent := [*told["missing_keys"], *told["mismatched_keys"]]:
            raise refused(config, f"its files do not have {absent[0]} as its config.json says")
    else:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(described(config), dtype=torch.float32, attn_implementation=NAME)
    adapt(model, config.lora, model.dtype)
    require_apart(config, model)
    return model


@torch.no_grad()
def require_apart(config: HuggingFaceConfig, model: PreTrainedModel) -> None:
    """ValueError: its tokens see one another by anything but attention, or its logits are not hidden states times the
    head's matrix. Two rows have the same token in the middle: with each token alone, the same comes out there."""
    model.eval()
    ids = torch.tensor([[1, 2, 3], [3, 2, 1]]) % model.config.get_text_config().vocab_size
    positions = torch.arange(3).expand(2, -1)
    hidden = hidden_states(model, ids, positions, Seen())
    near = 64 * torch.finfo(model.dtype).eps  # sums of unlike groups of tokens, in layers of experts
    if (hidden[0, 1] - hidden[1, 1]).abs().max() > near * hidden.abs().max():
        raise refused(config, "its tokens see one another by more than attention: ranks would each see a part")
    weight = model.get_output_embeddings().weight
    hidden *= LARGE / (hidden @ weight.T).abs().max()
    hook = model.base_model.register_forward_hook(lambda *called: called[-1].__setitem__("last_hidden_state", hidden))
    logits = model(**inputs(ids, positions, Seen())).logits
    hook.remove()
    if (logits - hidden @ weight.T).abs().max() > near * LARGE:
        raise refused(config, "its logits are not hidden states times its head's matrix, as the fused loss has it")
    model.train()


@torch.no_grad()
def fill(model: PreTrainedModel, weights: dict[str, Tensor], buffers: dict[str, Tensor], device: torch.device) -> None:
    """``weights`` are rank 0's. To the other ranks they go here under ZeRO-3, else when DeepSpeed starts."""
    gathered = import_deepspeed(device).zero.GatheredParameters
    for name, p in model.named_parameters():
        with gathered([p], modifier_rank=0, enabled=hasattr(p, "ds_id")):
            if weights:
                p.copy_(weights[name])
    for name, buffer in buffers.items():  # learned ones among them, as an expert's bias; fp32 stays fp32
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, buffer.to(device))


def described_in(folder: Path, config: HuggingFaceConfig, trained: Iterable[str], dtype: torch.dtype) -> dict[str, str]:
    """Write config.json, or adapter_config.json. What Transformers, or peft, calls each parameter that is trained."""
    about = described(config)
    if config.lora is None:
        about.dtype = dtype
        about.save_pretrained(folder)
        return {name: name.removeprefix("model.") for name in trained}
    with torch.device("meta"):
        adapters: Any = skeleton(config, about, dtype).peft_config["default"]
    adapters.base_model_name_or_path, adapters.task_type = config.path, "CAUSAL_LM"
    adapters.save_pretrained(folder)
    return {name: f"base_model.{name.replace('.default.', '.')}" for name in trained}


class CausalModel(nn.Module):
    """Called as `GPT` is."""

    def __init__(self, model: PreTrainedModel, z_loss: float) -> None:
        super().__init__()
        self.model = model
        self.head = Head(model.get_output_embeddings().weight, z_loss)

    def expect(self, seq_len: int, rope_base: float | None = None) -> None:
        """Its positions are its own."""

    def forward(self, tokens: Tensor, labels: Tensor, positions: Tensor, ring_plan: Sharded, each: bool = False) -> Any:
        return self.head(hidden_states(self.model, tokens, positions, ring_plan), labels, each)


def maker(config: HuggingFaceConfig, run: TrainConfig) -> Make:
    """Rank 0 alone reads the weights, once; all ranks together. ValueError: they are not there, or not all."""
    about = described(config)
    whole: list[PreTrainedModel] = []

    def load() -> dict[str, Tensor]:
        whole.append(loaded(config, run.seed))
        return dict(whole[0].named_buffers())

    buffers = from_rank_zero(load)

    def make(device: torch.device, dtype: torch.dtype) -> nn.Module:
        with device:
            model = skeleton(config, about, dtype)
        fill(model, dict(whole.pop().named_parameters()) if whole else {}, buffers, device)
        if run.train.activations is Activations.recompute:
            # Its name from 5.23 on, and before
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        return CausalModel(model, run.train.z_loss)

    return make
