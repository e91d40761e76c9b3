"""What a model makes of long contexts: one that training has left, or one in Hugging Face's layout.

python launch/evaluate.py checkpoint=runs/NAME                               on the text that the run has held out
python launch/evaluate.py checkpoint=my_llama text=books/ lengths=[4096,131072] shortest=131072 nproc=8
python launch/evaluate.py checkpoint=runs/NAME text=book.txt rows=4 needles=false
"""

import sys
import time
from pathlib import Path

import hydra
import torch.distributed as dist
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from ringspan.parallel.mesh import Mesh
from ringspan.parallel.workers import check_devices, count_workers, run_on, tell
from ringspan.train.command import CONF, run_hydra, values
from ringspan.train.files import replace, write_json
from ringspan.train.long_context import EvaluateConfig, Evaluated, evaluate
from ringspan.train.loop import pick_device

ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)


def main() -> int:
    return run_hydra(on_job, "evaluate.py", EvaluateConfig, __doc__)


@hydra.main(version_base="1.3", config_path=CONF, config_name="evaluate")
def on_job(cfg: DictConfig) -> None:
    try:
        config = values(cfg, EvaluateConfig)
        nproc = count_workers(config.nproc)
        check_devices(nproc)
        evaluated = run_on(nproc, measure, config)
        folder = Path(config.out or f"evaluations/{time.strftime('%m%d-%H%M%S')}")
        try:
            write(evaluated, folder)
        finally:  # nothing is lost, neither by a folder that cannot be written nor by a reader that has gone
            print(evaluated.measured.tables(), flush=True)
    except Exception as error:
        say(tell(error))
        sys.exit(1)
    facts = ", ".join(f"{name} {value}" for name, value in evaluated.facts.items())
    say(f"{facts}; numbers and pictures are in {folder}")


def measure(config: EvaluateConfig) -> Evaluated:
    """On each rank."""
    device = pick_device()
    return evaluate(config, Mesh.create(1, dist.get_world_size(), 1, device.type), device)


def write(evaluated: Evaluated, folder: Path) -> None:
    """ValueError: a folder that cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "evaluation.json", {**evaluated.facts, **evaluated.measured.record()})
        for name, picture in evaluated.measured.drawings().items():
            replace(folder / name, picture)
    except OSError as error:
        raise ValueError(f"out={folder}: {error.strerror}; give a folder that can be written") from error


def say(text: str) -> None:
    print(f"evaluate.py: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
