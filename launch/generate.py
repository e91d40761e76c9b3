"""Write on from a prompt: with what training has left, or with a model in Hugging Face's layout.

python launch/generate.py checkpoint=runs/NAME 'prompt=["def main"]'
python launch/generate.py checkpoint=runs/NAME 'prompt=["class A","import "]' temperature=0.8 top_p=0.95 tokens=200
python launch/generate.py checkpoint=my_llama nproc=4 prompt_file=book.txt     its keys and values shared by 4 GPUs
"""

import sys

import hydra
import torch.distributed as dist
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from ringspan.parallel.mesh import Mesh
from ringspan.parallel.workers import check_devices, count_workers, run_on, tell
from ringspan.train.command import CONF, run_hydra, values
from ringspan.train.generate import GenerateConfig, Written, generate
from ringspan.train.loop import pick_device

ConfigStore.instance().store(name="generate_schema", node=GenerateConfig)


def main() -> int:
    return run_hydra(on_job, "generate.py", GenerateConfig, __doc__)


@hydra.main(version_base="1.3", config_path=CONF, config_name="generate")
def on_job(cfg: DictConfig) -> None:
    try:
        config = values(cfg, GenerateConfig)
        nproc = count_workers(config.nproc)
        check_devices(nproc)
        written = run_on(nproc, write, config)
    except Exception as error:
        say(tell(error))
        sys.exit(1)
    say(
        f"{written.prompt_tokens:,} tokens of prompt in {written.first_seconds:.2f} s, "
        f"then {written.tokens_per_second:.1f} tokens/s"
    )


def write(config: GenerateConfig) -> Written:
    """On each rank. One text is shown as it comes, several when all are done."""
    device = pick_device()
    mesh = Mesh.create(1, dist.get_world_size(), 1, device.type)
    several = len(config.prompt) > 1
    written = generate(config, mesh, device, lambda _, text: None if several else print(text, end="", flush=True))
    if dist.get_rank() == 0:
        for prompt, text in zip(config.prompt, written.texts, strict=True) if several else []:
            print(f"--- {prompt}\n{text}")
        if not several:
            print(flush=True)
    return written


def say(text: str) -> None:
    print(f"generate.py: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
