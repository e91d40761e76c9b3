"""Which code a run was made by: the commit it stands at, and the versions of the packages under it."""

import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
TOLD = ("ringspan", "torch", "triton", "deepspeed", "numpy", "datasets", "hydra-core", "wandb")
SECONDS = 10  # that git may take, on a slow file system


def versions() -> dict[str, str]:
    """Of Python, of those of TOLD that are installed, and of CUDA and NCCL where there is a GPU."""
    found = {"python": platform.python_version()}
    for name in TOLD:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    if torch.cuda.is_available():
        found |= {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return found


def source(root: Path = ROOT) -> dict[str, Any]:
    """{"commit", "dirty"} of the git checkout that the code is run from; {"commit": None, "why"} where there is none.

    ``dirty``: files that git follows are not as they were committed.
    """
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel")) != root:  # a package inside somebody else's checkout
            return {"commit": None, "why": "installed as a package"}
        changes = _git(root, "status", "--porcelain", "--untracked-files=no")
        return {"commit": _git(root, "rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.SubprocessError) as error:  # no git, no checkout, or one that git does not trust
        said = str(getattr(error, "stderr", None) or error).strip().splitlines()
        return {"commit": None, "why": said[0] if said else "git failed"}


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS).stdout.strip()
