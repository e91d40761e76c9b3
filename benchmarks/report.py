"""What the benchmarks' reports have in common: rows of one machine and its versions, tables in Markdown, plots."""

import importlib
import json
import shlex
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def begin(path: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """The report so far, if all that ``fresh`` says of machine and versions holds of it, else an empty one; and with
    this process's command."""
    report = json.loads(path.read_text()) if path.exists() else {}
    if any(report.get(name) != value for name, value in fresh.items()):
        report = {**fresh, "commands": [], "cases": []}
    report["commands"].append(shlex.join(sys.argv))
    return report


def put(report: dict[str, Any], row: dict[str, Any], names: Iterable[str]) -> None:
    """In place of an older row of the same ``names``."""
    case = {name: row[name] for name in names}
    report["cases"] = [old for old in report["cases"] if any(old[name] != case[name] for name in case)] + [row]


def write(path: Path, report: dict[str, Any]) -> None:
    """To be done after each case: a run that is cut short keeps what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def machine(device: torch.device, packages: Iterable[str]) -> dict[str, Any]:
    """What a report in bf16 is of: the GPU, and the versions of what is installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {"machine": name, "dtype": "bfloat16", "versions": found}


def head(names: list[str]) -> str:
    return cells(names) + "\n|" + "---|" * len(names)


def cells(values: Iterable[str]) -> str:
    return "| " + " | ".join(values) + " |"


def versions(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def left_out(name: str, reason: BaseException) -> None:
    """Says so: a contestant or a case that is not installed, or cannot run."""
    first = (str(reason).splitlines() or [""])[0]
    print(f"  {name} left out: {type(reason).__name__}: {first[:100]}", flush=True)


def pyplot() -> Any:
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        print("matplotlib is not installed: no plot")
        return None
    matplotlib.use("agg")
    return importlib.import_module("matplotlib.pyplot")
