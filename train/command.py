"""What the commands of launch/ share: values alone from a configuration, and one line about a mistake in it."""

import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import hydra.utils
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

Config = TypeVar("Config")
STOPPED = {128 + number: number.name for number in (signal.SIGINT, signal.SIGTERM)}  # exit codes, as a shell has them

# For hydra.main, as an absolute path: what a console script imports is a module to it, whose folders need __init__.py
CONF = str(Path(__file__).resolve().parents[1] / "conf")


def run_hydra(on_job: Callable[[], object], script: str, schema: type, usage: str | None = None) -> int:
    """Call what ``hydra.main`` has made, for the command line. The exit code: 1 where Hydra or OmegaConf refuses, 130
    at a Ctrl-C that nobody else has heard. ``usage``: what --help begins with; None: it is Hydra's."""
    if usage and {"--help", "-h"} & set(sys.argv[1:]):
        print(help_of(script, usage))
        return 0
    for argument in sys.argv[1:]:
        # Of a group, what cannot be an option's name: Hydra has a traceback for it
        no_name = re.fullmatch(r"(\w+)=(null|true|false|[][0-9.,+-]+)", argument)
        if no_name and (options := sorted(Path(CONF, no_name[1]).glob("*.yaml"))):
            names = ", ".join(option.stem for option in options)
            print(f"{script}: {argument}: must be one of {names}", file=sys.stderr, flush=True)
            return 1
    hydra.utils.instantiate = _no_code
    # Hydra then raises what it would print, over several lines and with a hint at this very variable
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        on_job()
    except (HydraException, OmegaConfBaseException) as error:
        from ringspan.train.config import explain  # noqa: PLC0415 - imports torch, which preparing text does without

        print(f"{script}: {explain(error, schema)}", file=sys.stderr, flush=True)
        return 1
    except (KeyboardInterrupt, SystemExit) as left:
        code = left.code if isinstance(left, SystemExit) else 128 + signal.SIGINT
        if code not in STOPPED:  # it has been told why
            raise
        print(f"{script}: stopped by {STOPPED[code]}", file=sys.stderr, flush=True)
        return code
    return 0


def help_of(script: str, usage: str) -> str:
    """With the fields that the command's file in conf/ explains."""
    lines = Path(CONF, script).with_suffix(".yaml").read_text(encoding="utf-8").splitlines()
    fields = [f"  {line}" for line in lines if line[:1].isalpha() and " # " in line]
    rest = "--cfg job shows all values, also of groups; docs/configuration.md explains each."
    return "\n".join([usage.strip(), "", "fields, as name=value", *fields, "", rest])


def values(cfg: DictConfig, schema: type[Config]) -> Config:
    """The configuration as dataclasses. ValueError: it breaks their rules, has a key that they have not, or a number
    that is not finite."""
    for key, part in _keys(cfg):
        if key.rpartition(".")[2] not in {one.name for one in fields(part)}:  # OmegaConf takes +key=value
            from ringspan.train.config import unknown_key  # noqa: PLC0415 - as below

            raise ValueError(unknown_key(key, part))
    try:
        config = cast(Config, OmegaConf.to_object(cfg))
    except OmegaConfBaseException as error:  # a value that is missing, or made of others that are
        from ringspan.train.config import explain  # noqa: PLC0415 - imports torch, which preparing text does without

        raise ValueError(explain(error, schema)) from error
    for key, number in _floats(OmegaConf.to_container(cfg, resolve=True)):
        if not math.isfinite(number):  # NaN passes every "must be above" and "must be below"
            raise ValueError(f"{key}={number}: must be a finite number")
    return config


def _keys(cfg: DictConfig, prefix: str = "") -> Iterator[tuple[str, type]]:
    """All that stand there, and the class of each one's parent."""
    for name in map(str, cfg):
        yield prefix + name, cast(type, OmegaConf.get_type(cfg))
        part = cfg._get_node(name)  # the node: values may not be there yet, or not resolve
        if OmegaConf.is_dict(part) and is_dataclass(OmegaConf.get_type(part)):  # a mapping's names are the user's
            yield from _keys(cast(DictConfig, part), f"{prefix}{name}.")


def _floats(tree: Any, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(tree, float):
        yield key, tree
    for name, part in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from _floats(part, f"{key}.{name}".lstrip(".") if isinstance(tree, dict) else f"{key}[{name}]")


def _no_code(*_: object, **__: object) -> object:
    """By Hydra's callbacks, which any file it reads may name, a configuration could run code; ours are values."""
    raise HydraException("hydra.callbacks: a configuration cannot run code here; delete that key")
