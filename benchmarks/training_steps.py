"""Steps of several runs, one after the other in one process that benchmarks/training.py starts.

What imports, CUDA's context and machine code take is paid once. Each run is the loop of launch/train.py without its
checkpoint, on a GPU that the run before has left empty, with layers compiled for its own rows alone. Prints a JSON line
a run: what metrics.jsonl would have of its steps, or why there is none. A run that is {"slice": [TOKENS, LAYERS]} goes
on with the one before, with rows of so many tokens through its first layers alone; parameters and optimizer state of
all layers stay, and are updated.
"""

import gc
import json
import sys
import tempfile
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import nn

from ringspan.parallel.workers import process_group
from ringspan.train import checkpoint
from ringspan.train.config import check, typed
from ringspan.train.loop import Trainer, watchdog
from ringspan.train.metrics import GIB
from ringspan.train.phases import Phase

CONF = str(Path(__file__).resolve().parents[1] / "conf")
LEFT_GIB = 0.05  # of an earlier run; with more of it this process ends, and is followed by another


def no_checkpoint(run_dir: str, size: int) -> None:
    """In place of a look at the disk, which for 8B would have to have room for 84 GB."""


def start(overrides: list[str], stack: ExitStack) -> Trainer:
    """Until ``stack`` is closed."""
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    with initialize_config_dir(CONF, version_base="1.3"):
        config = typed(compose("train", overrides=[*overrides, "name=benchmark", f"run_dir={folder}"]))
    check(config, 1, "cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    checkpoint.check_writable = no_checkpoint
    trainer = Trainer(config, folder, stack.enter_context(closing(watchdog(config, folder))))
    stack.callback(trainer.engine.deepspeed.destroy)
    stack.enter_context(closing(trainer))
    return trainer


def shorten(trainer: Trainer | None, tokens: int, layers: int) -> None:
    """Rows of so many tokens from here on, and layers beyond the first so many are passed by."""
    if trainer is None:
        raise ValueError("the run of which this is a slice has failed")
    model: Any = trainer.engine.model
    model.layers = nn.ModuleList(list(model.layers)[:layers])
    trainer.job = replace(trainer.job, seq_len=tokens)
    trainer.done.rows_seen = 0
    trainer.prefetch.close()
    trainer.enter(Phase(seq_len=tokens))
    trainer.first_phase = trainer.phase


def steps_of(trainer: Trainer, steps: int) -> list[dict[str, Any]]:
    """What is logged of the next so many."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with trainer.memory_explained():
        for _ in range(steps):
            trainer.log_step(trainer.timed_step())
    return [json.loads(line) for line in Path(trainer.run_dir, "metrics.jsonl").read_text().splitlines()[-steps:]]


def emptied() -> bool:
    """Whether the GPU has no tensor of an earlier run, which some of DeepSpeed's stages keep."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated() < LEFT_GIB * GIB
    return True


def main() -> None:
    steps, runs = json.loads(sys.argv[1])
    with process_group(), ExitStack() as stack:
        trainer: Trainer | None = None
        for run in runs:
            try:
                if "slice" in run:
                    shorten(trainer, *run["slice"])
                else:
                    stack.close()
                    trainer = None
                    if not emptied():
                        return
                    trainer = start(run["overrides"], stack)
                assert trainer is not None
                found: dict[str, Any] = {"lines": steps_of(trainer, steps)}
            except ValueError as error:  # a mistake, or too little memory: the next run may have enough
                found = {"failed": str(error)}
            print("\n" + json.dumps({"found": found}), flush=True)


if __name__ == "__main__":
    main()
