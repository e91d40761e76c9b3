"""A trained model to use: from a run's folder, a checkpoint's, or what Hugging Face has: a model, or peft's adapters of
one, in a folder or under a name on the hub.

A Llama or a Qwen3 there is our GPT, as far as we have them; any other causal model, and what a run with model=hf has
trained, is as Transformers has it.

found = find_model(Path("runs/NAME"))                                # reads no weights yet
model = load_model(found, attend, device, torch.bfloat16, seq_len)   # all ranks together; each has all of it
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
from omegaconf import OmegaConf
from torch import nn

from ringspan.train.activations import Activations, Policy
from ringspan.train.checkpoint import Reader
from ringspan.train.corpus import is_corpus
from ringspan.train.corpus import read_manifest as read_corpus
from ringspan.train.data import DataConfig
from ringspan.train.hub import ADAPTERS, Place, is_name, place
from ringspan.train.huggingface import DEFAULTS, Folder
from ringspan.train.huggingface_config import HuggingFaceConfig
from ringspan.train.initial import open_weights
from ringspan.train.manifest import MANIFEST, Saved, damage, find, read_manifest
from ringspan.train.model import GPT, AnyModel, Attend, ModelConfig
from ringspan.train.needle import IDS
from ringspan.train.phases import Phase, phase_at
from ringspan.train.state import MASTER, Source
from ringspan.train.tokenizer import ByteTokenizer, tokenizer_fingerprint

if TYPE_CHECKING:
    from ringspan.train.huggingface_model import CausalModel  # which needs transformers

Part = TypeVar("Part")
NO_CHECKPOINT = "checkpoint: give the folder of a run, a checkpoint, a model or adapters of it, or a name on the hub"
TILE = 16_384  # tokens that all but attention is computed for at once: at an 8B model's width 1 GiB of an MLP in bf16


class Pretrained(NamedTuple):
    path: Path
    model: AnyModel
    vocab_size: int
    trained: Phase  # the last rows that it was trained on: their length, and the base of their rotary positions
    tokenizer: str | None  # what is known of it; None: whoever uses the model has to say
    fingerprint: str | None  # of the tokenizer that prepared its text, where that is known
    data: DataConfig | None = None  # what a run was trained on
    digest: str | None = None  # of its tokens then
    seed: int = 0  # of the first weights


def find_model(path: Path) -> Pretrained:
    """Of a run, or as `place` finds it. ValueError: there is neither a whole checkpoint nor a model that we can run."""
    theirs = any((path / name).exists() for name in ("config.json", ADAPTERS))
    if theirs or is_name(str(path)):
        return _of_huggingface(str(path))
    path = newest(path)
    saved = read_manifest(path).saved
    config = saved.config
    first = Phase(seq_len=config["seq_len"])
    phases = [Phase(**phase) for phase in config["phases"]]
    model = _typed(HuggingFaceConfig if "path" in config["model"] else ModelConfig, config["model"])
    data = _typed(DataConfig, config["data"])
    trained = phase_at(phases, first, max(0, saved.step - 1))
    told = tokenizer_of(saved, model, data)
    return Pretrained(path, model, saved.vocab_size, trained, *told, data, saved.data, config["seed"])


def tokenizer_of(saved: Saved, model: AnyModel, data: DataConfig) -> tuple[str | None, str | None]:
    """(name, fingerprint) of what a run's text was tokenised by, as far as they are known."""
    folders = [Path(os.path.expanduser(one.path)) for one in data.sources() if one.path]
    if prepared := next(filter(is_corpus, folders), None):
        return data.tokenizer, read_corpus(prepared)["tokenizer"]
    tokens = ByteTokenizer.vocab_size + (IDS if data.needles else 0)
    if data.tokenizer == "bytes" and saved.vocab_size != model.vocabulary(tokens):
        return None, None  # prepared text needs no data.tokenizer, and it is no longer there
    try:
        return data.tokenizer, tokenizer_fingerprint(data.tokenizer)
    except ValueError:  # its file is no longer there
        return data.tokenizer, None


def _typed(part: type[Part], values: dict[str, Any]) -> Part:
    return cast(Part, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(part), values)))


def newest(source: Path) -> Path:
    """The checkpoint itself, or a run's newest whole one. ValueError: there is none."""
    paths = [source] if (source / MANIFEST).exists() else find(str(source), "auto")[0]
    problems = []
    for path in paths:
        if (problem := damage(path, read_manifest(path))) is None:
            return path
        problems.append(f"{path.name}: {problem}")
    what = "no whole checkpoint here" if source.is_dir() else "no such folder"
    told = "".join(f"; {problem}" for problem in problems)
    raise ValueError(f"checkpoint={source}: {what}{told}; give a run's folder, or a checkpoint's with a {MANIFEST}")


def _of_huggingface(name: str) -> Pretrained:
    try:
        found = place(name, weights=True)
    except ValueError as error:
        raise ValueError(f"checkpoint={name}: {error}") from error
    model: AnyModel
    try:
        model, vocab_size, length = _ours(found)
    except ValueError as error:
        model = HuggingFaceConfig(path=name)
        try:
            vocab_size, length = model.outline.vocab_size, model.outline.longest
        except ValueError as why:
            raise ValueError(f"{_of_checkpoint(why)}; and no Llama or Qwen3 of ours: {error}") from why
    return Pretrained(found.folder, model, vocab_size, Phase(seq_len=length), found.tokenizer(), None)


def _ours(found: Place) -> tuple[ModelConfig, int, int]:
    """(model, tokens that it knows, of its rows). ValueError: it is none of ours."""
    if found.adapters:
        raise ValueError(f"{found.adapters} has adapters")
    folder = Folder(found.folder)
    told = {**DEFAULTS, **folder.config}
    model = model_of(told, found.folder)
    folder.require(model)
    return model, folder.vocab_size, told.get("max_position_embeddings", 1)


def _of_checkpoint(error: ValueError) -> str:
    """What training says of init or of model.path, here of checkpoint."""
    said = str(error).partition("; model.pretrained=")[0]
    return re.sub("^(init|model.path)=", "checkpoint=", said)


def model_of(config: dict[str, Any], path: Path) -> ModelConfig:
    """What a config.json describes, as far as we have it: `Folder.require` says what else it does."""
    rope = config.get("rope_parameters") or {}
    try:
        heads = config["num_attention_heads"]
        return ModelConfig(
            dim=config["hidden_size"],
            n_layers=config["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            mlp_dim=config["intermediate_size"],
            rope_base=rope.get("rope_theta") or config.get("rope_theta") or 10_000.0,
            qk_norm=config.get("model_type") == "qwen3",
            tie_embeddings=config["tie_word_embeddings"],
            norm_eps=config["rms_norm_eps"],
        )
    except KeyError as error:
        raise ValueError(f"{path}: its config.json has no {error}, which a Llama's or a Qwen3's has") from error


def pick_tokenizer(found: Pretrained, asked: str | None) -> str:
    """The name of the model's tokenizer. ValueError: nobody knows it, or it is not the one that made its text."""
    name = asked or found.tokenizer
    if name is None:
        raise ValueError(f"tokenizer: there is no tokenizer.json in {found.path}; give the path of one, or bytes")
    if found.fingerprint is not None and tokenizer_fingerprint(name) != found.fingerprint:
        raise ValueError(f"tokenizer={name}: not the one that the text of {found.path} was prepared with; give that")
    return name


def load_model(
    found: Pretrained,
    attend: Attend,
    device: torch.device,
    dtype: torch.dtype,
    seq_len: int,
    tokens: int,
    *,
    losses: bool = True,
    compiler: str | None = None,
) -> GPT | CausalModel:
    """All ranks together. ``seq_len``: of the rows to come, of which positions may be scaled by their length;
    ``tokens``: of the tokenizer; ``losses``: it will be asked for some; ``compiler``: torch.compile's backend for its
    layers.

    ValueError: damaged files, a model that knows fewer tokens, one whose loss is not ours, or none of ours to compile.
    """
    model: GPT | CausalModel
    source: Source | None
    try:
        if isinstance(found.model, HuggingFaceConfig):
            if compiler:
                raise ValueError(f"compile=true: {found.path} runs with Transformers' own layers; leave it out")
            found.model.vocabulary(tokens)
            source = Reader(found.path, read_manifest(found.path)) if found.data else None  # a run's
            model = found.model.model().maker(found.model, found.seed, losses=losses)(device, dtype)
        else:
            source = open_weights(str(found.path), found.model, tokens)
            policy = Policy(activations=Activations.recompute, mlp_tile=TILE, compiler=compiler)  # nothing whole
            model = GPT(cast(ModelConfig, found.model), found.vocab_size, attend, policy, device=device, dtype=dtype)
    except ValueError as error:
        raise ValueError(str(error) if found.data else _of_checkpoint(error)) from error
    model.expect(max(seq_len, found.trained.seq_len), found.trained.rope_base)
    if source:
        copy_trained(source, model)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def copy_trained(source: Source, model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.copy_(source.read(MASTER, name, 0, p.numel()).view(p.shape))
