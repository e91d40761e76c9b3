"""Any causal model of Transformers in our loop: on our attention, sharded over ranks, with our fused loss.

What such a model is like is not read from its configuration, of which every architecture has its own, but seen: its
forward runs on the meta device, where attention only notes what it is asked for. What would go wrong in silence is
looked for in numbers, once the weights are there: see train/transformers_model.py.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
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
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ringspan.parallel.windows import Windowed
from ringspan.train.agree import from_rank_zero
from ringspan.train.footprint import Footprint, footprint
from ringspan.train.huggingface_config import HuggingFaceConfig, Outline
from ringspan.train.model import Head, Make, ModelSizes
from ringspan.train.transformers_attention import NAME, register
from ringspan.train.transformers_model import (
    alone,
    compile_layers,
    hidden_states,
    inputs,
    why_not_apart,
    why_not_compiled,
    why_not_fused,
)

DROPS = re.compile(r"^(?!summary|classifier).*(dropout|pdrop)")  # not those of heads that are no language model's


def outline_of(config: HuggingFaceConfig) -> Outline:
    """From a forward of one token on the meta device. ValueError: our attention cannot do it."""
    about, one = described(config), torch.ones(1, 1, dtype=torch.int64, device="meta")
    windows: list[int | None] = []
    sizes: list[tuple[int, int, int]] = []  # of each layer: query heads, key-value heads, dim

    def note(q: Tensor, k: Tensor, v: Tensor, *, window: int | None, **_: Any) -> Tensor:
        windows.append(window)
        sizes.append((q.shape[2], k.shape[2], q.shape[3]))
        return alone(q, k, v)

    about._experts_implementation = "batched_mm"  # the one whose shapes do not depend on what tokens choose
    with torch.device("meta"):
        model = skeleton(config, about, torch.float32).eval()
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**inputs(one, one, note))
    except (ValueError, ImportError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise refused(config, f"its forward does not run on our attention ({first_line(error)})") from error
    layers = about.get_text_config().num_hidden_layers
    if len(sizes) != layers:
        raise refused(config, f"it has {layers} layers, and {len(sizes)} of them ask Transformers for attention")
    vocab_size, dim = model.get_output_embeddings().weight.shape
    matmul = counter.get_total_flops() // 2
    whole, trained = ([p.numel() for p in model.parameters() if p.requires_grad or every] for every in (True, False))
    heads, kv_heads, head_dim = map(max, zip(*sizes, strict=True))
    mlp = (matmul - vocab_size * dim) / layers - 2 * dim * (heads + kv_heads) * head_dim
    return Outline(
        ModelSizes(dim, layers, heads, kv_heads, head_dim, max(1, round(mlp / 3 / dim))),
        tuple(windows),
        longest=longest_row(about),
        vocab_size=vocab_size,
        whole=sum(whole),
        largest=max(whole),
        trained=sum(trained),
        matmul=matmul - vocab_size * dim,
        frozen=matmul - sum(trained) if config.lora else 0,
    )


def longest_row(about: PreTrainedConfig) -> int:
    return getattr(about.get_text_config(), "max_position_embeddings", 1)


def footprint_of(config: HuggingFaceConfig, recompute: bool, element: int) -> Footprint:
    """Of its layers. ValueError: they do not run on the meta device, or their backward pass does not."""
    about, wide = described(config), element > 2
    with torch.device("meta"):
        model = skeleton(config, about, torch.float32 if wide else torch.bfloat16)
        if wide and any(p.dim() > 2 for p in model.parameters()):  # torch's products of experts are bf16's alone there
            narrow = footprint_of(config, recompute, 2)
            return Footprint(2 * narrow.kept, 2 * narrow.layer)
    if recompute:
        recomputing(model)
    held = [*model.parameters(), *model.buffers()]
    try:
        return footprint(lambda tokens, attend: hidden_states(model, tokens, tokens, attend), held)
    except RuntimeError as error:  # NotImplementedError is one
        raise refused(config, f"what its layers keep cannot be seen ({first_line(error)})") from error


def recomputing(model: PreTrainedModel) -> None:
    """From here on a layer keeps its input alone."""
    # Its name from 5.23 on, and before
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def described(config: HuggingFaceConfig) -> PreTrainedConfig:
    """ValueError: there is no such folder or model, or its weights are quantised."""
    quiet()
    try:
        about = AutoConfig.from_pretrained(config.place.folder)
    except (OSError, ValueError, KeyError) as error:
        raise refused(config, f"transformers finds no model it knows ({first_line(error)})") from error
    if type(about) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise refused(config, f"transformers has no causal language model of {type(about).__name__}")
    if getattr(about, "quantization_config", None):
        raise refused(config, "its weights are quantised, which ours are not")
    return about


def require_no_dropout(config: HuggingFaceConfig) -> None:
    """ValueError: training would draw something."""
    drops = {key: x for key, x in described(config).get_text_config().to_dict().items() if DROPS.search(key)}
    if drawn := [f"{key}={value}" for key, value in drops.items() if isinstance(value, float) and value > 0]:
        raise refused(config, f"{', '.join(drawn)}: ranks would drop unlike parts; set it to 0.0 in its config.json")


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
    """Put adapters into it (LoRA, Hu and others, arXiv 2106.09685), in its own dtype; all else is frozen.

    Linear layers have them, but for the head. Experts, whose matrices are one tensor there, and routers have none: peft
    would make all of such a tensor anew in every forward. ValueError: there are no linear layers, or peft takes some
    for those of experts.
    """
    if rank is None:
        return
    from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415 - takes seconds, and only adapters need it

    head, linear = model.get_output_embeddings(), (nn.Linear, Conv1D)
    names = {name.rpartition(".")[2] for name, x in model.named_modules() if isinstance(x, linear) and x is not head}
    if not names:
        raise ValueError(f"model.lora={rank}: it has no linear layer to put adapters on")
    adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=sorted(names))
    inject_adapter_in_model(adapters, model)
    if adapters.target_parameters:
        both = ", ".join(sorted(names))
        raise ValueError(
            f"model.lora={rank}: peft takes its {both} for experts too, which have no adapters here; give null, which "
            "trains all weights"
        )
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
        if "lora_" in name:
            p.data = p.data.to(dtype)


def loaded(config: HuggingFaceConfig, seed: int) -> PreTrainedModel:
    """All of it on the host, in the dtype of its files. ValueError: weights are missing."""
    quiet()
    if config.pretrained:
        folder, adapters = config.find(weights=True)
        try:
            model, told = cast(Any, AutoModelForCausalLM).from_pretrained(
                folder, dtype="auto", attn_implementation=NAME, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise refused(config, f"{first_line(error)}; model.pretrained=false draws the weights") from error
        if absent := [*told["missing_keys"], *told["mismatched_keys"]]:
            raise refused(config, f"its files do not have {absent[0]} as its config.json says")
        if adapters:
            model = merged(config, model, adapters)
    else:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(described(config), dtype=torch.float32, attn_implementation=NAME)
    adapt(model, config.lora, model.dtype)
    return model


def merged(config: HuggingFaceConfig, model: PreTrainedModel, adapters: Path) -> PreTrainedModel:
    """It, with adapters of peft's added to its weights. ValueError: they are another model's, or no part of weights."""
    from peft import PeftConfig, PeftModel  # noqa: PLC0415 - takes seconds, and only adapters need it

    try:
        # Not peft's from_pretrained, which at most warns of what is not there
        both: Any = PeftModel(cast(Any, model), PeftConfig.from_pretrained(str(adapters)))
        told = both.load_adapter(adapters, "default", torch_device="cpu")
        if amiss := [*told.missing_keys, *told.unexpected_keys]:
            raise ValueError(f"{amiss[0]} is not in both")
        return both.merge_and_unload()
    except (OSError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        why = str(error).strip().split("\n")[-1].strip()  # torch's last line is the first parameter's that does not fit
        raise refused(config, f"its adapters cannot be merged into {config.place.folder} ({why})") from error


@contextmanager
def _whole(parameters: list[Tensor], modifier_rank: int) -> Iterator[None]:
    """What DeepSpeed's GatheredParameters is to those that it has not sharded."""
    yield
    for p in parameters:
        dist.broadcast(p, src=modifier_rank)


@torch.no_grad()
def fill(model: PreTrainedModel, weights: dict[str, Tensor], buffers: dict[str, Tensor], device: torch.device) -> None:
    """``weights`` are rank 0's, and go to the other ranks."""
    for name, p in model.named_parameters():
        sharded = hasattr(p, "ds_id")  # by ZeRO-3
        whole = importlib.import_module("deepspeed").zero.GatheredParameters if sharded else _whole
        with whole([p], modifier_rank=0):
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
        """Its positions are its own. ValueError: they are learned ones, and end before such rows do."""
        longest = longest_row(self.model.config)
        tokens = self.model.get_input_embeddings()
        tables = [x for x in self.model.modules() if isinstance(x, nn.Embedding) and x is not tokens]
        if seq_len > longest and any(0 <= x.num_embeddings - longest <= 2 for x in tables):  # OPT's begins at 2
            raise ValueError(f"rows of {seq_len} tokens: the model has learned positions, of which there are {longest}")

    def forward(
        self, tokens: Tensor, labels: Tensor, positions: Tensor, ring_plan: Windowed, each: bool = False
    ) -> Any:
        return self.head(hidden_states(self.model, tokens, positions, ring_plan), labels, each)

    def logits(self, tokens: Tensor, positions: Tensor, attend: Callable[..., Tensor], at: int) -> Tensor:
        """By its own head, whatever that does."""
        only = torch.tensor([at], device=tokens.device)
        logits = self.model(**inputs(tokens, positions, attend), logits_to_keep=only).logits
        return logits[:, 0 if logits.shape[1] == 1 else at]  # some know no such argument


def maker(
    config: HuggingFaceConfig,
    seed: int,
    *,
    losses: bool = True,
    z_loss: float = 0.0,
    recompute: bool = False,
    compiler: str | None = None,
) -> Make:
    """Rank 0 alone reads the weights, once; all ranks together. ``losses``: it will be asked for some; ``compiler``:
    torch.compile's backend for its layers.

    ValueError: weights are not there, or not all, or it is no model for that.
    """
    about = described(config)
    whole: list[PreTrainedModel] = []

    def load() -> dict[str, Tensor]:
        whole.append(loaded(config, seed))
        if why := why_not_apart(whole[0]) or (losses and why_not_fused(whole[0])):
            raise refused(config, why)
        if compiler and (why := why_not_compiled(whole[0])):
            raise refused(config, f"{why}; leave out train.compile=true")
        return dict(whole[0].named_buffers())

    buffers = from_rank_zero(load)

    def make(device: torch.device, dtype: torch.dtype) -> CausalModel:
        with device:
            model = skeleton(config, about, dtype)
        fill(model, dict(whole.pop().named_parameters()) if whole else {}, buffers, device)
        if recompute:
            recomputing(model)
        if compiler:
            compile_layers(model, compiler)
        return CausalModel(model, z_loss)

    return make
