"""A checkpoint's manifest.json: which files belong to it and what is in them; which checkpoint a run goes on from.

    run_dir/checkpoints/step-00000020/manifest.json
                                      rank-00000.safetensors ...

A folder is whole if its manifest is and every file has the size and the SHA-256 that stand there. Reading one runs no
code, and a file's name can only be one of the folder's own.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ringspan.train.tensors import Written, sha256_of

FORMAT = 1  # raised when what an older Ringspan writes can no longer be read
NAME = re.compile(r"step-\d{8,}")
FILE = re.compile(r"rank-\d{5,}\.safetensors")
MANIFEST = "manifest.json"
# Of the configuration, what decides what a weight or a row is. All else may change from one start to the next.
FIXED = ("model", "optim.name")
OLDER = {"optim.name": "adamw", "optim.momentum": 0.95}  # what those that do not say have had
# What may change without a word: where and how long a run goes on, not what it computes
FREE = ("name", "run_dir", "resume", "nproc", "logger", "steps", "check", "profile")


@dataclass(kw_only=True)
class Saved:
    """What a run has to know, besides the engine's state, to go on as if it had never stopped."""

    step: int  # updates done, or skipped
    tokens: int  # positions seen, over all ranks
    rows_seen: int
    loss: float  # of the last logged step; NaN before that
    skipped: int  # of the steps: those whose gradient was not finite
    mesh: dict[str, int]  # ranks on each axis
    zero: int
    dtype: str
    vocab_size: int
    data: str  # digest of the corpus
    config: dict[str, Any]  # the TrainConfig as plain values
    seconds: float = 0.0  # since 1970, when it was written

    @property
    def world(self) -> int:
        return math.prod(self.mesh.values())


@dataclass(kw_only=True)
class Manifest:
    saved: Saved
    parameters: dict[str, list[int]]  # shapes
    kinds: list[str]  # master, and what the optimizer keeps of each element
    scalars: dict[str, float]  # what it keeps once
    files: dict[str, Written] = field(default_factory=dict)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    content = {**asdict(manifest), "files": {name: file._asdict() for name, file in manifest.files.items()}}
    if math.isnan(manifest.saved.loss):
        content["saved"]["loss"] = None  # JSON has no NaN
    text = json.dumps({"format": FORMAT, "sha256": _digest(content), "content": content}, indent=1, allow_nan=False)
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """ValueError: it is not there, not as it was written, of another format, or names a file that is not its own."""
    try:
        told = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if told["format"] != FORMAT:
            raise ValueError(f"its format is {told['format']}, and this Ringspan reads {FORMAT}")
        content = told["content"]
        if told["sha256"] != _digest(content):
            raise ValueError(f"{MANIFEST} has changed since it was written")
        if content["saved"]["loss"] is None:
            content["saved"]["loss"] = math.nan
        files = {_own(folder, name): Written(**file) for name, file in content["files"].items()}
        return Manifest(**{**content, "saved": Saved(**content["saved"]), "files": files})
    except OSError as error:
        raise ValueError(f"{MANIFEST}: {error.strerror}") from error
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} is not as it should be: {error!r}") from error


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _own(folder: Path, name: str) -> str:
    if not FILE.fullmatch(name) or (folder / name).is_symlink():
        raise ValueError(f"{MANIFEST} names {name!r}, which is no file of this folder")
    return name


def damage(folder: Path, manifest: Manifest, rank: int = 0, world: int = 1) -> str | None:
    """What is wrong with the files, of which each of ``world`` ranks looks at its share; None if nothing is."""
    try:
        for name, file in list(manifest.files.items())[rank::world]:
            size = (folder / name).stat().st_size
            if size != file.size:
                return f"{name} has {size:,} bytes instead of {file.size:,}"
            if sha256_of(folder / name) != file.sha256:
                return f"{name} has another SHA-256 than when it was written"
    except OSError as error:
        return f"{name}: {error.strerror}"
    return None


def find(run_dir: str, resume: str) -> tuple[list[Path], dict[str, str]]:
    """(folders that ``resume`` asks for, the best first; why others were refused). Their files are not yet looked at.

    ValueError: ``resume`` is a folder, and that is no checkpoint.
    """
    if resume == "none":
        return [], {}
    if resume != "auto":
        try:
            read_manifest(Path(resume))
        except ValueError as error:
            raise ValueError(
                f"resume={resume}: not a whole checkpoint ({error}); give auto, none or a folder such as "
                "RUN_DIR/checkpoints/step-00000100"
            ) from error
        return [Path(resume)], {}
    found, refused = {}, {}
    for path in checkpoints_in(run_dir):
        try:
            found[path] = read_manifest(path).saved.seconds  # not by step: the run may have started again
        except ValueError as error:
            refused[path.name] = str(error)
    return sorted(found, key=lambda path: (found[path], path.name), reverse=True), refused


def checkpoints_in(run_dir: str) -> list[Path]:
    return sorted(path for path in Path(run_dir, "checkpoints").glob("step-*") if NAME.fullmatch(path.name))


def require_same(saved: Saved, run: Saved, path: Path) -> list[str]:
    """How the run's configuration differs from the checkpoint's, where it may.

    ValueError: it is another model or other data; all differences are told.
    """
    was, now = OLDER | _flat(saved.config), OLDER | _flat(run.config)
    changes = {key: (was.get(key), now.get(key)) for key in {**was, **now} if was.get(key) != now.get(key)}
    wrong = {key: pair for key, pair in changes.items() if key in FIXED or key.split(".")[0] in FIXED}
    if saved.vocab_size != run.vocab_size:
        wrong["vocabulary"] = saved.vocab_size, run.vocab_size
    if saved.data != run.data:
        wrong["data (digest of its tokens)"] = saved.data[:12], run.data[:12]
    if wrong:
        raise ValueError(
            f"checkpoint {path} is not of this run: {_diff(wrong)}; start it as it was, or anew with "
            f"resume=none, where init={path} takes the weights of the same model"
        )
    return [_diff({key: pair}) for key, pair in changes.items() if key.split(".")[0] not in FREE]


def _diff(changes: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key} was {old} and is {new}" for key, (old, new) in changes.items())


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat


def superfluous(run_dir: str, *, keep: int, every: int, best: bool) -> list[Path]:
    """Checkpoints to delete: all but the ``keep`` newest (0: all), multiples of ``every`` steps and the best loss."""
    saved = {}
    for path in find(run_dir, "auto")[0]:
        saved[path] = read_manifest(path).saved
    kept = set(list(saved)[: keep or None])
    kept.update(path for path, one in saved.items() if every and one.step % every == 0)
    finite = [path for path, one in saved.items() if math.isfinite(one.loss)]
    if best and finite:
        kept.add(min(finite, key=lambda path: saved[path].loss))
    return [path for path in saved if path not in kept]


def discard(paths: Iterable[Path]) -> None:
    """Delete folders; one that a kill has left half deleted does not bear a checkpoint's name."""
    for path in paths:
        doomed = path.with_name(f"{path.name.removesuffix('.old')}.old")
        if doomed != path:
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
        shutil.rmtree(doomed)
