"""model=hf: which model of Transformers a run trains. The model is made in train/huggingface_model.py."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from ringspan.parallel.attention import SequenceAttention
from ringspan.parallel.windows import WindowedAttention
from ringspan.train.activations import Activations, Offload, Policy
from ringspan.train.data import DataConfig, prepared_folder
from ringspan.train.footprint import Footprint
from ringspan.train.hub import Place, place
from ringspan.train.model import AnyModel, Make, ModelSizes
from ringspan.train.optim import Optimizer

if TYPE_CHECKING:
    from ringspan.train.config import TrainConfig  # which needs the class here

TAKES: dict[str, tuple[Any, ...]] = {  # of a policy's fields
    "activations": (Activations.keep, Activations.recompute),
    "recompute_layers": (1,),
    "offload": (Offload.none,),
    "mlp_tile": (0,),
}


def told(value: Any) -> str:
    """As it stands in YAML."""
    return str(getattr(value, "value", value))


class Outline(NamedTuple):
    """What a model is like, without its numbers."""

    sizes: ModelSizes  # mlp_dim: of a SwiGLU of as many parameters as a token meets
    windows: tuple[int | None, ...]  # of each layer: how many keys a query sees at most
    longest: int  # tokens of the rows that it was made for; 1: it does not say
    vocab_size: int  # rows of its head
    whole: int  # parameters
    largest: int  # of one of them
    trained: int  # of all
    matmul: int  # parameters that a token is multiplied by before the head: of the experts those it goes to
    frozen: int  # of these and the head's, the ones that are not trained


@dataclass(kw_only=True)
class HuggingFaceConfig(AnyModel):
    path: str = ""  # the folder of a model or of peft's adapters, or the name of one on the hub
    pretrained: bool = True  # false: config.json alone counts, and the weights are drawn from the seed
    lora: int | None = None  # rank of adapters on the layers' linear maps, which alone are trained; null: all weights

    def __post_init__(self) -> None:
        if self.lora is not None and self.lora < 1:
            raise ValueError(f"model.lora={self.lora}: must be 1 or more, or null, which trains all weights")

    @cached_property
    def outline(self) -> Outline:
        """ValueError: there is no such model, or none that our attention can do."""
        return self.model().outline_of(self)

    @cached_property
    def place(self) -> Place:
        """Of its small files. ValueError: there is no such model."""
        return self.find(weights=False)

    def find(self, weights: bool) -> Place:
        if not self.path:
            raise ValueError("model.path: give the folder of a model or of adapters, or the name of one on the hub")
        try:
            return place(self.path, weights)
        except ValueError as error:
            raise ValueError(f"model.path={self.path}: {error}") from error

    def model(self) -> ModuleType:
        """What needs transformers, which is optional. ValueError: it, or peft for adapters, is not installed."""
        adapts = f"model.lora={self.lora}" if self.lora else f"model.path={self.path}" if self.place.adapters else None
        for package, asks in {"transformers": "model=hf", "peft": adapts}.items():
            if asks and importlib.util.find_spec(package) is None:
                raise ValueError(f"{asks} needs {package}, which is not installed: pip install {package}")
        return importlib.import_module("ringspan.train.huggingface_model")

    @property
    def sizes(self) -> ModelSizes:
        return self.outline.sizes

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
        return self.outline.matmul + vocab_size * self.sizes.dim

    @property
    def frozen_parameters(self) -> int:
        return self.outline.frozen

    def all_parameters(self, vocab_size: int) -> int:
        return self.outline.whole

    def largest_parameter(self, vocab_size: int) -> int:
        return self.outline.largest

    @cached_property
    def footprints(self) -> dict[tuple[bool, int], Footprint]:
        """What `footprint` has found."""
        return {}

    def footprint(self, policy: Policy, element: int) -> Footprint:
        asked = policy.activations is Activations.recompute, element
        if asked not in self.footprints:
            self.footprints[asked] = self.model().footprint_of(self, *asked)
        return self.footprints[asked]

    def takes(self, policy: Policy) -> bool:
        return all(getattr(policy, name) in known for name, known in TAKES.items())

    def attention(self, *args: Any, **kwargs: Any) -> SequenceAttention:
        return WindowedAttention(self.outline.windows, *args, **kwargs)

    def maker(self, config: TrainConfig, vocab_size: int, attend: SequenceAttention) -> Make:
        recompute, z_loss = config.train.activations is Activations.recompute, config.train.z_loss
        compiler = config.train.policy("cpu").compiler  # TrainConfig has made false of null
        return self.model().maker(self, config.seed, z_loss=z_loss, recompute=recompute, compiler=compiler)

    def check(self, config: TrainConfig) -> None:
        self.check_folder(config.data)
        policy = vars(config.train.policy("cpu"))
        for name, value, takes in (
            *((f"train.{field}", policy[field], TAKES[field]) for field in TAKES),
            ("optim.name", config.optim.name, (Optimizer.adamw,)),
        ):
            if value not in takes:
                raise ValueError(
                    f"{name}={told(value)}: not with model=hf, which takes {' or '.join(map(told, takes))}"
                )
        if config.train.compile and config.engine.zero == 3:
            raise ValueError(
                "train.compile=true: not with model=hf and engine.zero=3, which gathers parameters in the middle of a "
                "layer; give train.compile=false, or another stage"
            )
        if any(phase.rope_base is not None for phase in config.phases):
            raise ValueError("phases: not with model=hf, which takes phases without rope_base")
        self.model().require_no_dropout(self)
        self.outline  # noqa: B018 - which finds out what else is amiss, before a worker starts

    def check_folder(self, data: DataConfig) -> None:
        folder, adapters = self.place
        if not (folder / "config.json").exists():
            raise ValueError(f"model.path={self.path}: there is no config.json in {folder}")
        if adapters and (self.lora or not self.pretrained):
            raise ValueError(
                f"model.path={self.path}: has adapters, which are merged into their model, {folder}: give that, or "
                "model.lora=null and model.pretrained=true"
            )
        own = self.place.tokenizer()
        if self.pretrained and own and data.tokenizer == "bytes" and not all(map(prepared_folder, data.sources())):
            raise ValueError(f"data.tokenizer=bytes: the model has learned other tokens; give data.tokenizer={own}")
