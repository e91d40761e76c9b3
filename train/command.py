"""What the commands of launch/ share: values alone from a configuration, and one line about a mistake in it."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import hydra.utils
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

# For hydra.main, as an absolute path: what a console script imports is a module to it, whose folders need __init__.py
CONF = str(Path(__file__).resolve().parents[1] / "conf")


def run_hydra(on_job: Callable[[], object], script: str, schema: type) -> int:
    """Call what ``hydra.main`` has made, for the command line. The exit code: 1 where Hydra or OmegaConf refuses."""
    hydra.utils.instantiate = _no_code
    # Hydra then raises what it would print, over several lines and with a hint at this very variable
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        on_job()
    except (HydraException, OmegaConfBaseException) as error:
        from ringspan.train.config import explain  # noqa: PLC0415 - imports torch, which preparing text does without

        print(f"{script}: {explain(error, schema)}", file=sys.stderr, flush=True)
        return 1
    return 0


def _no_code(*_: object, **__: object) -> object:
    """By Hydra's callbacks, which any file it reads may name, a configuration could run code; ours are values."""
    raise HydraException("hydra.callbacks: a configuration cannot run code here; delete that key")
