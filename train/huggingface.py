"""Hugging Face's layout of a model: config.json and safetensors files, as `transformers` reads and writes them.

A model without qk_norm is a Llama there, one with it a Qwen3. Both rotate halves as we do, so weights are only cut: our
query, key and value projections are one matrix, and so are SwiGLU's gate and value.

    export(checkpoint_folder, target, torch.bfloat16)   # any checkpoint, whatever mesh has written it
    folder = Folder(path)                               # what training can start from
    folder.read("master", "layers.0.attention.qkv.weight", start, stop)
"""

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ringspan.train.checkpoint import Reader
from ringspan.train.huggingface_config import HuggingFaceConfig
from ringspan.train.manifest import Manifest, read_manifest
from ringspan.train.metrics import plain
from ringspan.train.model import ModelConfig
from ringspan.train.tensors import Entry, TensorFile, write

SHARD_BYTES = 5 << 30  # of one file, as transformers cuts models
FILE = re.compile(r"[\w.-]+\.safetensors")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# What transformers takes a config.json to say that does not
DEFAULTS = {"tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False, "rms_norm_eps": 1e-6}
SHAPE = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "mlp_dim", "qk_norm", "tie_embeddings")
TOLD = ("rope_base", "norm_eps")  # what else config.json says
Shapes = dict[str, tuple[int, ...]]


def parts(model: ModelConfig, vocab_size: int) -> dict[str, Shapes]:
    """Of each of our parameters, in order: the tensors there that, end to end, are its elements."""
    m = model
    query, keys = m.n_heads * m.head_dim, m.n_kv_heads * m.head_dim
    found: dict[str, Shapes] = {"embedding.weight": {"model.embed_tokens.weight": (vocab_size, m.dim)}}
    for i in range(m.n_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        layer: dict[str, Shapes] = {
            "attention_norm": {"input_layernorm": (m.dim,)},
            "attention.qkv": {
                "self_attn.q_proj": (query, m.dim),
                "self_attn.k_proj": (keys, m.dim),
                "self_attn.v_proj": (keys, m.dim),
            },
            "attention.out": {"self_attn.o_proj": (m.dim, query)},
            "mlp_norm": {"post_attention_layernorm": (m.dim,)},
            "mlp.gate_and_value": {"mlp.gate_proj": (m.mlp_dim, m.dim), "mlp.up_proj": (m.mlp_dim, m.dim)},
            "mlp.out": {"mlp.down_proj": (m.dim, m.mlp_dim)},
        }
        if m.qk_norm:
            layer |= {f"attention.{x}_norm": {f"self_attn.{x}_norm": (m.head_dim,)} for x in "qk"}
        for name, tensors in layer.items():
            found[f"{ours}{name}.weight"] = {f"{theirs}{there}.weight": shape for there, shape in tensors.items()}
    found["norm.weight"] = {"model.norm.weight": (m.dim,)}
    if not m.tie_embeddings:
        found["head.weight"] = {"lm_head.weight": (vocab_size, m.dim)}
    return found


def config_json(model: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """What transformers' config.json says of such a model."""
    return {
        "architectures": ["Qwen3ForCausalLM" if model.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if model.qk_norm else "llama",
        "vocab_size": vocab_size,
        "hidden_size": model.dim,
        "intermediate_size": model.mlp_dim,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_base,  # where transformers 4 looks; 5 has it in rope_parameters
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "tie_word_embeddings": model.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
    }


def exportable(config: dict[str, Any]) -> ModelConfig:
    """Of a checkpoint's plain values. ValueError: it has what the config.json that we write could not say."""
    defaults = plain(asdict(ModelConfig()))
    for name in sorted(set(config) - set(SHAPE) - set(TOLD)):
        if config[name] != defaults.get(name):
            raise ValueError(f"model.{name}={config[name]}: there is no way yet to tell Hugging Face's models of it")
    return ModelConfig(**{name: config[name] for name in (*SHAPE, *TOLD)})


def export(checkpoint: Path, target: Path, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES) -> list[str]:
    """Write a checkpoint's weights to a new folder, one tensor in memory at a time; the files' names.

    Of a run with model=hf it is the model that was trained, or its adapters as peft reads them. ValueError: the target
    is there already, or the model is none that transformers has.
    """
    if target.exists():
        raise ValueError(f"{target} is there already: give the name of a new folder")
    told = read_manifest(checkpoint)
    reader, model = Reader(checkpoint, told), told.saved.config["model"]
    half = target.with_name(f"{target.name}.half")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    if "path" in model:
        single, mapping = _describe_theirs(half, model, told, dtype)
    else:
        single, mapping = SINGLE, _describe_ours(half, exportable(model), told, dtype)
    _write_shards(half, reader, mapping, dtype, shard_bytes, single)
    half.rename(target)
    return sorted(path.name for path in target.iterdir())


def _describe_ours(folder: Path, model: ModelConfig, told: Manifest, dtype: torch.dtype) -> dict[str, Shapes]:
    about = {"dtype": str(dtype).removeprefix("torch."), "max_position_embeddings": told.saved.config["seq_len"]}
    _write_json(folder / "config.json", {**config_json(model, told.saved.vocab_size), **about})
    return parts(model, told.saved.vocab_size)


def _describe_theirs(
    folder: Path, model: dict[str, Any], told: Manifest, dtype: torch.dtype
) -> tuple[str, dict[str, Shapes]]:
    """Of model=hf: (the file's name, what goes into it)."""
    config = HuggingFaceConfig(**model)
    names = config.model().described_in(folder, config, told.parameters, dtype)
    single = SINGLE if config.lora is None else "adapter_model.safetensors"
    return single, {ours: {theirs: tuple(told.parameters[ours])} for ours, theirs in names.items()}


def _write_shards(
    folder: Path, reader: Reader, mapping: dict[str, Shapes], dtype: torch.dtype, shard_bytes: int, single: str
) -> None:
    shards: list[dict[str, tuple[Entry, str, int]]] = [{}]  # of each file: what, from which of ours, where in it
    room = shard_bytes
    for ours, tensors in mapping.items():
        ends = accumulate(math.prod(shape) for shape in tensors.values())
        for (theirs, shape), end in zip(tensors.items(), ends, strict=True):
            entry = Entry(dtype, shape)
            if shards[-1] and entry.size > room:
                shards.append({})
                room = shard_bytes
            room -= entry.size
            shards[-1][theirs] = entry, ours, end - math.prod(shape)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [single]
    for name, shard in zip(names, shards, strict=True):
        write(folder / name, {theirs: entry for theirs, (entry, *_) in shard.items()}, _read(reader, shard))
    if len(shards) > 1:
        size = sum(entry.size for shard in shards for entry, *_ in shard.values())
        places = {theirs: name for name, shard in zip(names, shards, strict=True) for theirs in shard}
        _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": places})


def _read(reader: Reader, shard: dict[str, tuple[Entry, str, int]]) -> Iterator[Tensor]:
    for entry, ours, start in shard.values():
        yield reader.read("master", ours, start, start + math.prod(entry.shape)).to(entry.dtype)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


class Folder:
    """A model's folder, to start from. ValueError: it is none, or no Llama or Qwen3 as we have them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.config: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
            self.vocab_size = int(self.config["vocab_size"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"init={path}: no model in Hugging Face's layout ({error!r})") from error
        self.files = {name: (file, name) for file in self._files() for name in file.entries}
        self.parts: dict[str, Shapes] = {}

    def _files(self) -> list[TensorFile]:
        names = [SINGLE]
        if (self.path / INDEX).exists():
            names = sorted(set(json.loads((self.path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        for name in names:
            if not FILE.fullmatch(name):
                raise ValueError(f"init={self.path}: {INDEX} names {name!r}, which is no file of that folder")
        return [TensorFile(self.path / name) for name in names]

    def require(self, model: ModelConfig) -> None:
        """ValueError: it is another model than ``model``; all differences are told."""
        wanted, told = config_json(model, self.vocab_size), {**DEFAULTS, **self.config}
        rope = told.get("rope_parameters") or {"rope_type": "default", "rope_theta": told.get("rope_theta")}
        told["rope_parameters"] = {"rope_type": rope.get("rope_type", "default"), "rope_theta": rope.get("rope_theta")}
        told["head_dim"] = told.get("head_dim") or told["hidden_size"] // told["num_attention_heads"]
        differ = [f"{key} is {told.get(key)}, not {value}" for key, value in wanted.items() if told.get(key) != value]
        differ = [line for line in differ if not line.startswith(("architectures", "rope_theta"))]
        if told.get("rope_scaling"):
            differ.append(f"rope_scaling is {told['rope_scaling']}, and we do not scale")
        self.parts = parts(model, self.vocab_size)
        if not differ:
            differ = [
                f"{name} is not {shape}"
                for tensors in self.parts.values()
                for name, shape in tensors.items()
                if name not in self.files or self.files[name][0].entries[name].shape != shape
            ][:3]
        if differ:
            raise ValueError(f"init={self.path} is not the model of this configuration: {'; '.join(differ)}")

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of our parameter ``name``, 1-D, in fp32. After `require`."""
        assert kind == "master"
        found, at = [], 0
        for theirs, shape in self.parts[name].items():
            size = math.prod(shape)
            begin, end = max(start - at, 0), min(stop - at, size)
            if begin < end:
                found.append(self.files[theirs][0].read(theirs, begin, end).float())
            at += size
        return torch.cat(found)
