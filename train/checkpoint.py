"""Checkpoints: run_dir/checkpoints/step-00000020 holds DeepSpeed's files, and saved.json that says whose they are.

A checkpoint is written under another name and renamed when every rank has finished: what bears its name is whole.
"""

import json
import re
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ringspan.train.engine import Engine

NAME = re.compile(r"step-\d{8,}")


@dataclass(kw_only=True)
class Saved:
    """What a run has to know, besides the engine's state, to go on as if it had never stopped."""

    step: int  # updates done
    tokens: int  # positions seen, over all ranks
    rows_seen: int
    loss: float  # of the last logged step
    world: int  # ranks that wrote it, and that it takes to read it
    zero: int
    dtype: str
    vocab_size: int
    config: dict[str, Any]  # the TrainConfig as plain values
    seconds: float = 0.0  # since 1970, when it was written


def find(run_dir: str, resume: str) -> Path | None:
    """What ``resume`` asks for: ``run_dir``'s newest checkpoint if any (auto), none, or a folder.

    ValueError: the folder is not a checkpoint, or the newest one is damaged.
    """
    if resume == "none":
        return None
    if resume == "auto":
        whole = [path for path in Path(run_dir, "checkpoints").glob("step-*") if NAME.fullmatch(path.name)]
        return max(whole, key=lambda path: read(path).seconds, default=None)  # not by step: it may have started again
    if not (Path(resume) / "saved.json").is_file():
        raise ValueError(
            f"resume={resume}: not a checkpoint; give auto, none or a folder such as RUN_DIR/checkpoints/step-00000100"
        )
    return Path(resume)


def read(path: Path) -> Saved:
    """ValueError: saved.json is not there, or not as ``save`` wrote it."""
    try:
        return Saved(**json.loads((path / "saved.json").read_text(encoding="utf-8")))
    except (OSError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint {path} is damaged: {error}; delete it, or give resume=none") from error


def require_same(saved: Saved, run: Saved, path: Path) -> None:
    """ValueError: the run is not of the shape that the checkpoint was saved with."""
    for name, was, now in (
        ("processes", saved.world, run.world),
        ("engine.zero", saved.zero, run.zero),
        ("engine.dtype", saved.dtype, run.dtype),
        ("vocabulary", saved.vocab_size, run.vocab_size),
        *((f"model.{field}", saved.config["model"].get(field), now) for field, now in run.config["model"].items()),
    ):
        if was != now:
            raise ValueError(
                f"checkpoint {path} was saved with {name}={was} and this run has {name}={now}: "
                "start it as it was, or with resume=none"
            )


def save(engine: Engine, run_dir: str, saved: Saved) -> Path:
    """Write a checkpoint, all ranks together; its folder."""
    whole = Path(run_dir, "checkpoints", f"step-{saved.step:08d}")
    half = whole.with_name(f"{whole.name}.half")
    if dist.get_rank() == 0:
        shutil.rmtree(half, ignore_errors=True)  # of a run that was killed
        half.mkdir(parents=True)
    dist.barrier()
    engine.save(half)
    dist.barrier()
    if dist.get_rank() == 0:
        (half / "saved.json").write_text(
            json.dumps({**asdict(saved), "seconds": time.time()}, indent=1) + "\n", encoding="utf-8"
        )
        if whole.exists():  # of an earlier run through the same steps
            shutil.rmtree(whole)
        half.rename(whole)
    dist.barrier()
    return whole
