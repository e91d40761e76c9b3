"""Checkpoints: taken into host memory between two steps, written in the background, found again and verified.

    checkpoints = Checkpointer(run_dir, keep=3)
    checkpoints.begin(engine.state, device, saved)  # training goes on while files are written
    problem = checkpoints.wait()                    # what has kept it from being whole, if anything has

A checkpoint is written under another name and renamed when every rank has finished: what bears its name is whole.
"""

from __future__ import annotations

import functools
import os
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ringspan.train import manifest, tensors
from ringspan.train.agree import from_rank_zero, of_every_rank
from ringspan.train.manifest import Manifest, Saved
from ringspan.train.state import State

Value = TypeVar("Value")
WRITE_TIMEOUT = timedelta(hours=2)  # ranks wait for the slowest disk
RANDOM = "random"  # torch's generators; nothing else that Ringspan computes with draws from a hidden state


class Checkpointer:
    """Saves a run into ``run_dir``; made and called by all ranks together.

    ``keep``, ``every`` and ``best`` say which checkpoints stay when a new one is whole (see `manifest.superfluous`).
    """

    def __init__(self, run_dir: str, *, keep: int = 0, every: int = 0, best: bool = False) -> None:
        self.run_dir = run_dir
        self.superfluous = functools.partial(manifest.superfluous, run_dir, keep=keep, every=every, best=best)
        # A group of its own: the writing threads talk to each other while the steps do
        self.group = dist.new_group(backend="gloo", timeout=WRITE_TIMEOUT)
        self.host: dict[str, Tensor] = {}  # what the last snapshot lies in, used again by the next
        self.writing: Task | None = None

    def begin(self, state: State, device: torch.device, saved: Saved) -> None:
        """Copy the state, and write it in the background. `wait` comes before the next one."""
        assert self.writing is None
        snapshot = self.snapshot(state, device)
        parameters, scalars = state.shapes(), state.scalars()
        told = Manifest(saved=replace(saved, seconds=time.time()), parameters=parameters, kinds=[], scalars=scalars)
        self.writing = Task(lambda: self._write(snapshot, told))

    def snapshot(self, state: State, device: torch.device) -> dict[str, Tensor]:
        """Copies in host memory, by kind/parameter/first element."""
        for kind, name, start, view in state.to_save():
            self._copy(f"{kind}/{name}/{start}", view)
        for kind, generator in random_states(device).items():
            self._copy(f"{RANDOM}/{kind}", generator)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return self.host

    def _copy(self, key: str, tensor: Tensor) -> None:
        if key not in self.host:
            self.host[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self.host[key].copy_(tensor, non_blocking=True)

    def wait(self) -> str | None:
        """Until the checkpoint that is being written is whole, or has failed: then why, the same on every rank."""
        writing, self.writing = self.writing, None
        if writing is None:
            return None
        return writing.result()

    def close(self) -> None:
        """Where something is still being written all is lost: a peer may be gone, and nothing waits for it."""
        if self.writing is None:
            dist.destroy_process_group(self.group)

    def _write(self, snapshot: Mapping[str, Tensor], told: Manifest) -> str | None:
        whole = Path(self.run_dir, "checkpoints", f"step-{told.saved.step:08d}")
        half = whole.with_name(f"{whole.name}.half")
        file = f"rank-{dist.get_rank():05d}.safetensors"
        entries = {key: tensors.Entry(x.dtype, tuple(x.shape)) for key, x in snapshot.items()}
        size = sum(entry.size for entry in entries.values()) * dist.get_world_size()
        kinds = sorted({key.split("/")[0] for key in snapshot} - {RANDOM})
        try:
            self._together(lambda: make_room(half, size), zero_only=True)
            written = self._together(lambda: (file, tensors.write(half / file, entries, snapshot.values()), kinds))
            complete = replace(
                told,
                files={name: one for name, one, _ in written},
                kinds=sorted({kind for *_, there in written for kind in there}),
            )
            self._together(lambda: publish(half, whole, complete), zero_only=True)
            self._together(lambda: manifest.discard(self.superfluous()), zero_only=True)
        except WriteError as failed:
            if dist.get_rank() == 0:  # what others write needs the room
                shutil.rmtree(half, ignore_errors=True)
            return f"checkpoint {whole} is not complete: {failed}"
        return None

    def _together(self, act: Callable[[], Value], zero_only: bool = False) -> list[Value]:
        """``act()`` of every rank, by rank, or of rank 0 alone. WriteError: what went wrong on any, on all of them."""
        mine: tuple[Any, str | None] = None, None
        if not zero_only or dist.get_rank() == 0:
            try:
                mine = act(), None
            except OSError as error:
                mine = None, f"{error.strerror} ({error.filename})" if error.filename else str(error)
            except ValueError as error:
                mine = None, str(error)
        every = of_every_rank(mine, self.group)
        if mistakes := [f"rank {rank}: {mistake}" for rank, (_, mistake) in enumerate(every) if mistake]:
            raise WriteError("; ".join(mistakes))
        return [value for value, _ in every]


class WriteError(Exception):
    """A checkpoint could not be written; every rank knows why."""


class Task:
    """A function in a thread that nobody waits for when the process leaves."""

    def __init__(self, act: Callable[[], str | None]) -> None:
        self.act = act
        self.outcome: str | None = None
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run, daemon=True, name="checkpoint")
        self.thread.start()

    def _run(self) -> None:
        try:
            self.outcome = self.act()
        except Exception as error:  # it belongs to whoever asks for the result
            self.error = error

    def result(self) -> str | None:
        self.thread.join()
        if self.error:
            raise self.error
        return self.outcome


def make_room(half: Path, size: int) -> None:
    """An empty folder to write in. ValueError: the disk has no place for ``size`` bytes."""
    half.parent.mkdir(parents=True, exist_ok=True)
    # What a killed run has left: half written, or half deleted
    manifest.discard(path for end in ("half", "old") for path in half.parent.glob(f"step-*.{end}"))
    require_room(half.parent, size)
    half.mkdir()


def require_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ValueError(
            f"{folder} has {free / 1e9:.1f} GB free and a checkpoint takes {size / 1e9:.1f} GB: make room, keep fewer "
            "(train.keep), or give another run_dir"
        )


def publish(half: Path, whole: Path, complete: Manifest) -> None:
    manifest.write_manifest(half, complete)
    sync_folder(half)
    if whole.exists():  # of an earlier run through the same steps; gone only when this one is in its place
        whole.rename(whole.with_name(f"{whole.name}.old"))
    half.rename(whole)
    sync_folder(whole.parent)
    manifest.discard(whole.parent.glob(f"{whole.name}.old"))


def sync_folder(folder: Path) -> None:
    """Names, too, are on the disk when this returns."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(run_dir: str, size: int) -> None:
    """ValueError: a checkpoint of ``size`` bytes could not be written here."""
    folder = Path(run_dir, "checkpoints")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"probe-{os.getpid()}"
        try:
            probe.write_text("can this be written?")
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"run_dir={run_dir}: {error.strerror} ({error.filename}); give another") from error
    require_room(folder, size)


def choose(run_dir: str, resume: str) -> tuple[Path | None, dict[str, str]]:
    """(the checkpoint to go on from, if any; why others were refused), all ranks together, each reading its share.

    ValueError: the folder that ``resume`` names is no whole checkpoint, or there are checkpoints and none is whole.
    """
    paths, refused = from_rank_zero(lambda: manifest.find(run_dir, resume))
    for path in paths:
        told = from_rank_zero(lambda path=path: manifest.read_manifest(path))  # type: ignore[misc]
        harm = manifest.damage(path, told, dist.get_rank(), dist.get_world_size())
        problem = next((found for found in of_every_rank(harm) if found), None)
        if problem is None:
            return path, refused
        refused[path.name] = problem
    if refused:
        why = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise ValueError(f"resume={resume}: no checkpoint is whole ({why}); resume=none starts anew")
    return None, refused


class Reader:
    """The tensors of a checkpoint, by kind and parameter, whatever ranks have written them."""

    def __init__(self, folder: Path, told: Manifest) -> None:
        self.runs: dict[tuple[str, str], list[tuple[int, int, tensors.TensorFile, str]]] = defaultdict(list)
        self.random: list[dict[str, Tensor]] = []  # of each rank
        for file in (tensors.TensorFile(folder / name) for name in sorted(told.files)):
            self.random.append({})
            for key, entry in file.entries.items():
                kind, name, *start = key.split("/")
                if kind == RANDOM:
                    self.random[-1][name] = file.read(key)
                else:
                    self.runs[kind, name].append((int(*start), int(*start) + entry.shape[0], file, key))

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of a parameter, 1-D. ValueError: they are not there."""
        run, found = torch.empty(stop - start), 0
        for first, last, file, key in self.runs[kind, name]:
            begin, end = max(first, start), min(last, stop)
            if begin < end:
                run[begin - start : end - start] = file.read(key, begin - first, end - first)
                found += end - begin
        if found != stop - start:
            raise ValueError(
                f"the checkpoint is damaged: of {kind} of {name} it has {found} elements of {start}:{stop}"
            )
        return run


def load(state: State, folder: Path, device: torch.device) -> None:
    """Put a checkpoint into an engine of any mesh and ZeRO stage, all ranks together.

    ValueError: it is of another model.
    """
    told = manifest.read_manifest(folder)
    if told.parameters != state.shapes():
        theirs, ours = ({f"{name} {shape}" for name, shape in x.items()} for x in (told.parameters, state.shapes()))
        only = sorted(theirs - ours)[:3], sorted(ours - theirs)[:3]
        raise ValueError(f"{folder} is of another model: it has {only[0]}, and this one {only[1]}")
    reader = Reader(folder, told)
    state.restore(reader, told.kinds, told.scalars)
    if dist.get_world_size() == len(reader.random):
        set_random_states(device, reader.random[dist.get_rank()])


def random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_states(device: torch.device, states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
