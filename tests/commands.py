"""The commands of launch/, run in this process: each would take seconds to start as one of its own."""

import os
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist
from hydra.core.global_hydra import GlobalHydra

LAUNCH = Path(__file__).parents[1] / "launch"


def exit_code(script: str, *arguments: str | Path) -> int:
    """Of `python launch/SCRIPT ...`. What it prints is for the caller's capsys or capfd; the environment stays."""
    argv = [str(LAUNCH / script), *map(str, arguments)]
    GlobalHydra.instance().clear()
    try:
        with mock.patch.dict(os.environ), mock.patch.object(sys, "argv", argv), pytest.raises(SystemExit) as leaving:
            runpy.run_path(argv[0], run_name="__main__")
    finally:
        if dist.is_initialized():  # a command that fails leaves its group for the process's end
            dist.destroy_process_group()
    code = leaving.value.code
    if isinstance(code, str):  # for the interpreter to print
        print(code, file=sys.stderr)
        return 1
    return code or 0
