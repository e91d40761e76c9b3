"""How far Hugging Face's models on our attention are from eager, beside how far they are on SDPA, and all from fp32.

Two layers of an architecture with the widths and head dims of its usual size and random weights, in bf16. A largest
difference is one rounding of many, and falls this way or that: the mean over DRAWS models and rows of tokens counts.
"""

import importlib
import statistics
from typing import Any

import torch
from torch import Tensor

USUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"hidden_size": 4096, "num_attention_heads": 32, "head_dim": 128}),
    "qwen3": ("Qwen3Config", {"hidden_size": 2048, "num_attention_heads": 16, "head_dim": 128}),
    "mistral": (
        "MistralConfig",
        {"hidden_size": 4096, "num_attention_heads": 32, "head_dim": 128, "sliding_window": 1024},
    ),
    "gemma2": ("Gemma2Config", {"hidden_size": 2304, "num_attention_heads": 8, "head_dim": 256}),
    "gemma3": ("Gemma3TextConfig", {"hidden_size": 2560, "num_attention_heads": 8, "head_dim": 256}),
    # All experts for every token: else a rounding may send a token elsewhere
    "gpt_oss": (
        "GptOssConfig",
        {
            "hidden_size": 2880,
            "num_attention_heads": 64,
            "head_dim": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 4,
        },
    ),
}
KV_HEADS = {"llama": 8, "qwen3": 8, "mistral": 8, "gemma2": 4, "gemma3": 4, "gpt_oss": 8}
BOTH_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 1024}
WITHOUT_SDPA = ("gemma2", "gpt_oss")  # softcap, sinks
TINY = {"hidden_size": 64, "num_attention_heads": 8, "head_dim": 16, "intermediate_size": 64, "vocab_size": 300}

DRAWS = 20

Result = tuple[Tensor, list[Tensor]]  # logits; the gradient of each parameter


def model_of(name: str, device: torch.device, small: bool, seed: int) -> Any:
    transformers = importlib.import_module("transformers")
    importlib.import_module("ringspan.train.transformers_attention").register()
    kind, fields = USUAL[name]
    fields = {**fields, "vocab_size": 8192, "intermediate_size": 2 * fields["hidden_size"]}
    fields |= {"num_hidden_layers": 2, "num_key_value_heads": KV_HEADS[name], "pad_token_id": 0}
    fields |= BOTH_KINDS if name in ("gemma2", "gemma3", "gpt_oss") else {}
    config = getattr(transformers, kind)(**(fields | TINY if small else fields))
    config._experts_implementation = "eager"  # products of groups are bf16's alone on some GPUs
    torch.manual_seed(seed)
    with device:
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="eager"
        ).eval()


def run(model: Any, attention: str, ids: Tensor) -> Result:
    model.set_attn_implementation(attention)
    model.zero_grad()
    found = model(ids, labels=ids, use_cache=False)
    found.loss.backward()
    return found.logits.detach().float(), [p.grad.detach().float() for p in model.parameters() if p.grad is not None]


def off(found: Result, judge: Result) -> dict[str, float]:
    """Largest difference of logits; that of all gradients together, over their norm."""
    apart = torch.stack([(x - y).square().sum() for x, y in zip(found[1], judge[1], strict=True)]).sum()
    norm = torch.stack([y.square().sum() for y in judge[1]]).sum()
    return {"logits": (found[0] - judge[0]).abs().max().item(), "gradients": (apart / norm).sqrt().item()}


def parity(name: str, tokens: int, device: torch.device, *, small: bool) -> dict[str, dict[str, float]]:
    """By attention in bf16: how far from eager in bf16, and how far from eager in fp32 (`wide_...`)."""
    draws = [of_draw(name, tokens, device, small, seed) for seed in range(DRAWS)]
    means = {
        attention: {what: statistics.fmean(one[attention][what] for one in draws) for what in draws[0][attention]}
        for attention in draws[0]
    }
    means["ours"]["draws"] = DRAWS
    return means


def of_draw(name: str, tokens: int, device: torch.device, small: bool, seed: int) -> dict[str, dict[str, float]]:
    model = model_of(name, device, small, seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, model.config.vocab_size, (1, tokens), generator=generator).to(device)
    names = ["ringspan", "eager", *([] if name in WITHOUT_SDPA else ["sdpa"])]
    found = {attention: run(model, attention, ids) for attention in names}
    wide = run(model.float(), "eager", ids)
    result: dict[str, dict[str, float]] = {}
    for attention, each in found.items():
        exact = {f"wide_{what}": value for what, value in off(each, wide).items()}
        beside = {} if attention == "eager" else off(each, found["eager"])
        result["ours" if attention == "ringspan" else attention] = {**beside, **exact}
    return result
