"""What a run would take, before any GPU is touched: memory by part, seconds by part, utilisation.

python launch/budget.py nproc=8 model=llama8b seq_len=131072 vocab_size=128256    of the run that this would be
python launch/budget.py nproc=2 model=llama8b vocab_size=128256 longest=true      the longest row that fits
python launch/budget.py nproc=8 machine=h200 seq_len=65536 fastest=true           mesh and policy for the most tokens/s

nproc is the number of GPUs, 0 for all of a host. Fields are those of launch/train.py, and those of conf/budget.yaml.
"""

import sys
from dataclasses import dataclass, field, replace

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from ringspan.train.budget import Budget, Job, Machine, advice, budget, fastest, job_of, longest, switches
from ringspan.train.command import CONF, run_hydra, values
from ringspan.train.config import TrainConfig, structured
from ringspan.train.tokenizer import load_tokenizer


@dataclass(kw_only=True)
class BudgetConfig(TrainConfig):
    machine: Machine = field(default_factory=Machine)
    vocab_size: int = 0  # of the tokens; 0: data.tokenizer's
    document: int = 0  # tokens of a document that sees itself alone; 0: rows are whole
    longest: bool = False  # pick mesh and policy for the longest row that fits
    fastest: bool = False  # pick mesh, policy and micro-batch for the most tokens a second

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vocab_size", "document"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more")
        if self.longest and self.fastest:
            raise ValueError("longest=true with fastest=true: one of them, as each picks the policy")


ConfigStore.instance().store(name="budget_schema", node=structured(BudgetConfig))


def main() -> int:
    return run_hydra(on_job, "budget.py", BudgetConfig, __doc__)


@hydra.main(version_base="1.3", config_path=CONF, config_name="budget")
def on_job(cfg: DictConfig) -> None:
    try:
        config = values(cfg, BudgetConfig)
        asked, job = chosen(config)
    except ValueError as error:
        sys.exit(f"budget.py: {error}")
    print(report(job, budget(job, config.machine), config.machine, switches(job, asked)))


def chosen(config: BudgetConfig) -> tuple[Job, Job]:
    """(the job that was asked for, the one that was picked). ValueError: none fits."""
    vocabulary = config.vocab_size or load_tokenizer(config.data.tokenizer).vocab_size
    device = "cpu" if config.machine.name == "cpu" else "cuda"
    config.model.check(config)
    asked = job_of(config, config.nproc or config.machine.gpus, config.model.vocabulary(vocabulary), device)
    asked = replace(asked, document=config.document)
    pick = longest if config.longest else fastest if config.fastest else None
    job = pick(asked, config.machine) if pick else asked
    if job is None:
        raise ValueError(f"no mesh and policy fits {asked.world} GPUs: {advice(asked, config.machine)}")
    return asked, job


def report(job: Job, found: Budget, machine: Machine, picked: dict[str, str]) -> str:
    lines = [
        f"{job.world} x {machine.name}, rows of {job.seq_len:,} tokens, {job.all_parameters / 1e9:.2f} G parameters"
    ]
    if picked:
        lines += ["picked: " + " ".join(f"{name}={value}" for name, value in picked.items())]
    sums = (("GPU memory, GiB", found.gpu, found.room), ("host memory of a process, GiB", found.host, found.host_room))
    for title, parts, room in sums:
        lines += ["", f"{title:<32}{sum(parts.values()):9.2f} of {room:.1f}"]
        lines += [f"  {name:<30}{size:9.2f}" for name, size in parts.items() if size >= 0.005]
    lines += ["", f"{'seconds of a step':<32}{found.seconds_a_step:9.3f}"]
    lines += [f"  {name:<30}{size:9.3f}" for name, size in found.seconds.items() if size >= 0.0005]
    rate = f"{found.tokens_per_second:,.0f} tokens/s a GPU, utilisation {found.utilisation:.1%}"
    return "\n".join([*lines, "", rate, "fits" if found.fits else f"does not fit; {advice(job, machine)}"])


if __name__ == "__main__":
    sys.exit(main())
