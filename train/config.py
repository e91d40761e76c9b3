"""What a run is: one dataclass tree, each part beside its owner. YAML gives values; types and rules are here.

config = typed(cfg)                    # each part's own rules
check(config, world)                   # rules that need this machine: processes, devices, files
explain(error)                         # what Hydra and OmegaConf say about a mistake, in one line
"""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

from hydra.core.config_store import ConfigStore
from hydra.errors import MissingConfigException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from ringspan.parallel.mesh import ParallelConfig
from ringspan.train import launcher  # noqa: F401 - the launcher that conf/run.yaml names
from ringspan.train.command import values
from ringspan.train.data import DataConfig
from ringspan.train.data import check as check_data
from ringspan.train.engine import EngineConfig
from ringspan.train.evaluate import EvaluationConfig
from ringspan.train.huggingface_config import HuggingFaceConfig
from ringspan.train.initial import find_weights
from ringspan.train.loop_config import LoopConfig
from ringspan.train.manifest import find
from ringspan.train.metrics import LoggerConfig
from ringspan.train.model import AnyModel, ModelConfig
from ringspan.train.optim import OptimConfig
from ringspan.train.phases import Phase, check_phases

LONGEST = 2**31 - 1  # tokens of a row: a query's span ends behind its last key
MODELS: dict[str, type[AnyModel]] = {"gpt": ModelConfig, "huggingface": HuggingFaceConfig}


@dataclass(kw_only=True)
class TrainConfig:
    name: str = MISSING  # of the run; the same name again goes on with it
    run_dir: str = MISSING  # all that the run writes
    seq_len: int = 4096  # tokens, whole sequence, all ranks that share it together
    steps: int = 100  # updates of the weights
    seed: int = 0  # of the first weights and of the order of the rows
    nproc: int = 1  # processes to start; 0: one on each GPU here, 2 where there is none; torchrun has its own count
    resume: str = "auto"  # the newest whole checkpoint in run_dir if there is one | none | a checkpoint's folder
    init: str | None = None  # the first weights: a folder in Hugging Face's layout, or a checkpoint; null: drawn
    deterministic: bool = False  # the same bits from the same start, on the same mesh; slower on GPUs
    check: bool = False  # only look whether it could start: data, memory, communication; leaves nothing behind
    profile: list[int] = field(default_factory=list)  # steps to trace, and to tell the time of by part, as [5,6]
    phases: list[Phase] = field(default_factory=list)  # a length curriculum: other lengths of rows from some steps on
    model: AnyModel = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    def __post_init__(self) -> None:
        for name, least in (("seq_len", 1), ("steps", 1), ("seed", 0), ("nproc", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be {least} or more")
        if not self.name:
            raise ValueError("name: must not be empty; leave it out, and it is the time")
        if (longest := max([self.seq_len, *(phase.seq_len for phase in self.phases)])) > LONGEST:
            raise ValueError(f"seq_len={longest}: a position is an int32, so at most {LONGEST}")
        if self.train.compile is None and not isinstance(self.model, ModelConfig):
            self.train.compile = False  # so that what is told of a run is true of it
        check_phases(self.phases)
        for step in self.profile:
            if not 1 <= step <= self.steps:
                raise ValueError(f"profile=[{step}]: steps are counted from 1 to steps={self.steps}")
        if self.evaluation.every and not (self.data.held_out or self.data.needles):
            raise ValueError(
                f"evaluation.every={self.evaluation.every}: there is nothing to measure; give data.held_out, 0.02 for "
                "example, or data.needles"
            )


def structured(cls: type) -> DictConfig:
    """Of a command's configuration, for Hydra's store: no field can be added to it, but names to its mappings."""
    node = OmegaConf.structured(cls)
    OmegaConf.set_struct(node.data.mixture, False)
    node.model = MISSING  # a file of conf/model names its class
    return node


ConfigStore.instance().store(name="schema", node=structured(TrainConfig))
for name, kind in MODELS.items():
    ConfigStore.instance().store(name=name, node=kind)


def check(config: TrainConfig, world: int, device_type: str) -> None:
    """What can be known before a worker starts or a GPU is touched, for ``world`` processes.

    Raises:
        ValueError: sizes that do not multiply to ``world``, heads that do not divide, a dtype that the device or the
            engine cannot do, a checkpoint without a manifest, first weights of another model, data that cannot be read.
    """
    _, _, ulysses = config.parallel.sizes(world)
    config.model.check(config)
    if (heads := config.model.sizes.n_heads) % ulysses:
        raise ValueError(
            f"parallel.ulysses={ulysses}: model.n_heads={heads} must be a multiple of it; "
            f"the nearest is {nearest_divisor(heads, ulysses)}"
        )
    config.engine.resolve(device_type)
    if config.resume not in {"auto", "none"}:
        if not Path(config.resume).is_dir():
            raise ValueError(f"resume={config.resume}: no such folder; give auto, none or a checkpoint's folder")
        find(config.run_dir, config.resume)  # its files are looked at when all ranks can do so together
    find_weights(config.init, config.model)
    check_data(config.data)


def nearest_divisor(n: int, wanted: int) -> int:
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - wanted))


def typed(cfg: DictConfig) -> TrainConfig:
    """The configuration as dataclasses. ValueError: as of `values`."""
    return values(cfg, TrainConfig)


def field_names(part: type = TrainConfig, prefix: str = "") -> Iterator[str]:
    """Every key that an override may name: seq_len, model, model.dim, ..."""
    for one in fields(part):
        yield prefix + one.name
        for kind in MODELS.values() if one.type is AnyModel else [one.type]:
            if isinstance(kind, type) and is_dataclass(kind):
                yield from field_names(kind, f"{prefix}{one.name}.")


def explain(error: Exception, schema: type = TrainConfig) -> str:
    """One line of what Hydra or OmegaConf has against a configuration, with the nearest name that ``schema`` has."""
    chain: list[BaseException] = [error]
    while (deeper := chain[-1].__cause__) is not None:
        chain.append(deeper)
    missing = next((one for one in chain if isinstance(one, MissingConfigException) and one.missing_cfg_file), None)
    if missing:
        return _unknown_option(missing)
    inner = next((one for one in chain if isinstance(one, OmegaConfBaseException)), None)
    part = inner.object_type if inner and is_dataclass(inner.object_type) else schema
    key = str((inner and inner.full_key) or "")
    listed = next((one.name for one in fields(schema) if get_args(one.type) == (part,)), None)
    if listed and key and "." not in key:  # of a part of a list OmegaConf says no more than that part's own field
        key = f"{listed}.{key}"
    if isinstance(inner, ConfigKeyError | ConfigAttributeError) and key:
        return unknown_key(key, part)
    told = " ".join(str(inner if key else error).split("full_key:")[0].split())
    if "is not a ListConfig, list or tuple" in told:
        return f"{key}: must be a list; write '{key}=[...]'"
    if told.endswith("is not Optional"):
        return f"{key}=null: it must have a value"
    said = told + _plain_number(told)
    return f"{key}: {said}" if key and key not in said else said


def _plain_number(said: str) -> str:
    """What to write for a number such as 64k, which is not one here."""
    if not (found := re.match(r"Value '(\d+)([km])' .* could not be converted to Integer", said, re.IGNORECASE)):
        return ""
    number, power = int(found[1]), {"k": 1, "m": 2}[found[2].lower()]
    return f"; give a plain number, {number * 1024**power} or {number * 1000**power}"


def unknown_key(key: str, part: Any) -> str:
    """``part``: the class that it would be a field of."""
    parent, dot, name = key.rpartition(".")
    return f"{key}: there is no such key; {_nearest(name, [one.name for one in fields(part)], parent + dot)}"


PLUGINS = {"submitit_slurm": "hydra-submitit-launcher", "optuna": "hydra-optuna-sweeper"}  # options, and their packages


def _unknown_option(error: MissingConfigException) -> str:
    group, _, asked = str(error.missing_cfg_file).rpartition("/")
    if not group:
        return f"--config-name={asked}: there is no such file in conf/; leave it out"
    if group.startswith("hydra/") and asked in PLUGINS:
        return f"{group}={asked}: it is a plugin's, which is not installed: pip install {PLUGINS[asked]}"
    return f"{group}={asked}: there is no such option; {_nearest(asked, list(error.options or []))}"


def _nearest(asked: str, names: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(asked, names, n=1, cutoff=0.5)
    return f"did you mean {prefix}{close[0]}?" if close else f"there are {', '.join(prefix + x for x in sorted(names))}"
