"""model=hf: which model of Transformers a run trains. The model is made in train/huggingface_model.py."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from ringspan.parallel.attention import SequenceAttention
from ringspan.parallel.windows import WindowedAttention
from ringspan.train.activations import Activations, Offload
from ringspan.train.data import DataConfig, prepared_folder
from ringspan.train.model import AnyModel, AttentionSizes, Make
from ringspan.train.optim import Optimizer

if TYPE_CHECKING:
    from ringspan.train.config import TrainConfig  # which needs the class here

HUB = re.compile(r"\w[\w.-]*(/[\w.-]+)?")  # OWNER/NAME


class Outline(NamedTuple):
    """What a model is like, without its numbers."""

    attention: AttentionSizes
    windows: tuple[int | None, ...]  # of each layer: how many keys a query sees at most
    longest: int  # tokens of the rows that it was made for; 1: it does not say
    vocab_size: int  # rows of its head
    dim: int  # its columns
    trained: int  # parameters
    matmul: int  # parameters that a token is multiplied by before the head: of the experts those it goes to
    frozen: int  # of these and the head's, the ones that are not trained


@dataclass(kw_only=True)
class HuggingFaceConfig(AnyModel):
    path: str = ""  # a model's folder, or its name on the hub
    pretrained: bool = True  # false: config.json alone counts, and the weights are drawn from the seed
    lora: int | None = None  # rank of adapters on the layers' linear maps, which alone are trained; null: all weights

    def __post_init__(self) -> None:
        if self.lora is not None and self.lora < 1:
            raise ValueError(f"model.lora={self.lora}: must be 1 or more, or null, which trains all weights")

    @cached_property
    def outline(self) -> Outline:
        """ValueError: there is no such model, or none that our attention can do."""
        return self.model().outline_of(self)

    def model(self) -> ModuleType:
        """What needs transformers, which is optional. ValueError: it, or peft for ``lora``, is not installed."""
        for package, asks in {"transformers": "model=hf", "peft": f"model.lora={self.lora}"}.items():
            if (package != "peft" or self.lora) and importlib.util.find_spec(package) is None:
                raise ValueError(f"{asks} needs {package}, which is not installed: pip install {package}")
        return importlib.import_module("ringspan.train.huggingface_model")

    @property
    def sizes(self) -> AttentionSizes:
        return self.outline.attention

    def vocabulary(self, n_tokens: int) -> int:
        if n_tokens > self.outline.vocab_size:
            raise ValueError(
                f"model.path={self.path} knows {self.outline.vocab_size} tokens, and data.tokenizer has {n_tokens}: "
                "give the tokenizer of that model"
            )
        return self.outline.vocab_size

    def parameters(self, vocab_size: int) -> int:
        return self.outline.trained

    def matmul_parameters(self, vocab_size: int) -> int:
        return self.outline.matmul + vocab_size * self.outline.dim

    @property
    def frozen_parameters(self) -> int:
        return self.outline.frozen

    def attention(self, *args: Any, **kwargs: Any) -> SequenceAttention:
        return WindowedAttention(self.outline.windows, *args, **kwargs)

    def maker(self, config: TrainConfig, vocab_size: int, attend: SequenceAttention) -> Make:
        recompute = config.train.activations is Activations.recompute
        return self.model().maker(self, config.seed, z_loss=config.train.z_loss, recompute=recompute)

    def check(self, config: TrainConfig) -> None:
        self.check_folder(config.data)
        t = config.train
        for name, asked, instead in (
            ("train.activations", t.activations is Activations.recompute_keep_attention, "keep or recompute"),
            ("train.recompute_layers", t.recompute_layers > 1, "1"),
            ("train.offload", t.offload is not Offload.none, "none"),
            ("train.mlp_tile", t.mlp_tile > 0, "0"),
            ("train.compile", t.compile, "null or false"),
            ("optim.name", config.optim.name is Optimizer.muon, "adamw"),
            ("phases", any(phase.rope_base is not None for phase in config.phases), "phases without rope_base"),
        ):
            if asked:
                value = attrgetter(name)(config)
                raise ValueError(f"{name}={getattr(value, 'value', value)}: not with model=hf, which takes {instead}")
        self.model().require_no_dropout(self)
        self.outline  # noqa: B018 - which finds out what else is amiss, before a worker starts

    def check_folder(self, data: DataConfig) -> None:
        folder = Path(self.path)
        if not self.path:
            raise ValueError("model.path: give a model's folder, or its name on the hub")
        if not folder.is_dir():
            if HUB.fullmatch(self.path):
                return
            raise ValueError(f"model.path={self.path}: no such folder")
        if not (folder / "config.json").exists():
            raise ValueError(f"model.path={self.path}: there is no config.json in this folder")
        own = folder / "tokenizer.json"
        if (
            self.pretrained
            and own.exists()
            and data.tokenizer == "bytes"
            and not all(map(prepared_folder, data.sources()))
        ):
            raise ValueError(f"data.tokenizer=bytes: the model has learned other tokens; give data.tokenizer={own}")
