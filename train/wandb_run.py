"""The W&B run of a folder: online, offline or none, and the same one again when the run goes on."""

import netrc
import os
import re
import secrets
from pathlib import Path
from typing import Any

from ringspan.train.files import replace
from ringspan.train.metrics import LoggerConfig, WandbMode


def start_wandb(folder: Path, config: dict[str, Any], logger: LoggerConfig, *, fresh: bool) -> Any:
    """The W&B run of this folder: a new one, or the one that wandb_id remembers. Its files stay inside the folder."""
    import wandb  # noqa: PLC0415 - it takes a second, on every rank, and one of them needs it

    id_file = folder / "wandb_id"
    if fresh or not id_file.exists():
        replace(id_file, secrets.token_hex(4) + "\n")
    run = wandb.init(
        project=logger.project,
        name=config["name"],
        group=logger.group,
        id=id_file.read_text(encoding="utf-8").strip(),
        resume="allow",
        mode=wandb_mode(logger.wandb),
        dir=str(folder),
        config=config,
        settings=wandb.Settings(console="off", silent=True),  # RunLog prints, and says where to look
    )
    run.define_metric("tokens")
    run.define_metric("*", step_metric="tokens")  # and never log(step=): W&B drops a step it has seen before a resume
    return run


def place(run: Any) -> str:
    """Where to look at it."""
    if run.disabled:
        return "disabled"
    return f"offline; upload: wandb sync {run.settings.sync_dir}" if run.offline else run.url


def wandb_mode(asked: WandbMode) -> Any:
    """One of online, offline and disabled. An online run without a key would stop and ask for one."""
    if asked is not WandbMode.auto:
        return asked.value
    return os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")


def has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    host = re.sub(r"^https?://|/.*$", "", os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):  # no such file, or one for other programs to understand
        return False
