"""torchrun --max-restarts: a run that is started again after a rank has died goes on as the same run.

torchrun starts the same command again, from which Hydra would make a run with a new name. So the first attempt leaves
word of itself in the folder that torchrun keeps for all attempts of one start.
"""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from ringspan.train.manifest import find, read_manifest


def attempt() -> int:
    """How often torchrun has started this command again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def remember(name: str, run_dir: str) -> None:
    """To be called by the first attempt's rank 0, when it knows its folder."""
    if attempt() == 0 and (place := _place()):
        place.write_text(json.dumps({"name": name, "run_dir": run_dir, "seconds": time.time()}), encoding="utf-8")


def arguments(given: Sequence[str]) -> list[str]:
    """The command line of this attempt: ``given``, and from the second one on what makes it the same run.

    ValueError: the first attempt's word cannot be found.
    """
    if attempt() == 0:
        return list(given)
    place = _place()
    if place is None or not place.exists():
        raise ValueError(
            "torchrun has started this run again, and the first attempt never got to its name, or torchrun has no "
            "folder here: give name=..., so that all attempts are one run"
        )
    first = json.loads(place.read_text(encoding="utf-8"))
    ours = {"name": first["name"], "run_dir": first["run_dir"]}
    if any(read_manifest(path).saved.seconds >= first["seconds"] for path in find(first["run_dir"], "auto")[0]):
        ours["resume"] = "auto"  # and not from where the first attempt has started
    kept = [argument for argument in given if argument.partition("=")[0] not in ours]
    return [*kept, *(f"{name}={value}" for name, value in ours.items())]


def _place() -> Path | None:
    """.../RUN/attempt_N/LOCAL_RANK/error.json is what torchrun tells a worker; RUN is the same for all attempts."""
    told = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(told).parents[2] / "ringspan.json" if told else None
