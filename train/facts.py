"""What a reader of a run's log has to know of it: told once, before the first step, and kept in run.json."""

from __future__ import annotations

import os
import socket
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch._C import _distributed_c10d as c10d

from ringspan.train import budget
from ringspan.train.agree import of_every_rank
from ringspan.train.metrics import peak_flops
from ringspan.train.needle import ENDLESS
from ringspan.train.rows import packing_facts

if TYPE_CHECKING:
    from ringspan.train.loop import Trainer


def facts(run: Trainer) -> dict[str, Any]:
    """All ranks together."""
    c, m = run.config, run.config.model
    matrices = m.matmul_parameters(run.vocab_size)
    rows = len(run.batches.rows)
    return {
        "corpus": f"{run.text.name}, {run.text.tokens:,} tokens, {'endless' if rows == ENDLESS else f'{rows:,}'} rows"
        + (f", {run.text.n_skipped:,} files or rows left out" if run.text.n_skipped else ""),
        "packing": packing_facts(run.batches.rows),
        "unigram_entropy": round(run.text.unigram_entropy, 4),
        "model": {"parameters": run.engine.parameters, "in_matrices": matrices, "frozen": m.frozen_parameters},
        "machine": machine(of_every_rank(place(run.device))),
        "mesh": {"data": run.mesh.data, "ring": run.mesh.ring, "ulysses": run.mesh.ulysses},
        "attention": run.picked,
        "engine": {
            "device": device_name(run.device),
            "dtype": str(run.engine.dtype),
            "zero": c.engine.zero,
            "optimizer": c.optim.name.value,
        },
        "layers": {name: str(getattr(x, "value", x)) for name, x in vars(c.train.policy(run.device.type)).items()},
        "step": {"rows": run.batches.rows_of_a_step, "tokens": run.tokens_of_a_step},
        "first_micro_batch": run.batches.facts(run.done.rows_seen),
        "memory": budget.in_words(run.job, run.machine),
        "resumed": str(run.resumed) if run.resumed else "no",
        "expected": expected(run),
        **({"init": c.init} if run.initial and not run.resumed else {}),
        **({"refused": run.refused} if run.refused else {}),
        **({"changed": ", ".join(run.changes)} if run.changes else {}),
    }


def expected(run: Trainer) -> dict[str, Any]:
    """What the budget says of a step, for the documents of the first micro-batch: under the names of metrics.jsonl
    where those are measured. Seconds are known for GPUs whose peak is."""
    lengths = [n for row in run.batches.rows_after(run.done.rows_seen)[0] for n in run.batches.rows.lengths(row)]
    pairs = sum(n * (n + 1) / 2 for n in lengths)
    job = replace(run.job, seq_len=run.phase.seq_len)
    # A job's documents are all of one length: that which attends to as many keys
    job = replace(job, document=max(1, round(2 * pairs / (job.micro_batch * job.seq_len) - 1)))
    now = budget.budget(job, run.machine)
    memory = {"memory/peak_allocated_gib": round(now.gpu_gib, 3)}
    if peak_flops(run.device) is None:
        return {**memory, "perf/step_seconds": f"not known for {device_name(run.device)}"}
    return {
        "perf/step_seconds": round(now.seconds_a_step, 4),
        "perf/tokens_per_second_per_gpu": round(now.tokens_per_second),
        "perf/mfu": round(now.utilisation, 3),
        **memory,
    }


class Place(NamedTuple):
    """Where a rank runs. ``uuid`` is its GPU's, ``linked`` those of the GPUs that it has NVLinks to; None: no GPU, or a
    driver that does not tell."""

    host: str
    device: str
    uuid: str | None = None
    linked: list[str] | None = None


def place(device: torch.device) -> Place:
    if device.type != "cuda":
        return Place(socket.gethostname(), f"cpu ({len(os.sched_getaffinity(0))} cores)")
    uuids = [str(torch.cuda.get_device_properties(one).uuid) for one in range(torch.cuda.device_count())]
    mine = torch.cuda.current_device() if device.index is None else device.index
    links = nvlinks()
    linked = None if links is None else [uuid for uuid, n in zip(uuids, links[mine], strict=True) if n]
    return Place(socket.gethostname(), device_name(device), uuids[mine], linked)


def nvlinks() -> list[list[int]] | None:
    """Between each two of the GPUs that this process sees, also through a switch; None: the driver does not tell."""
    try:
        return c10d._detect_dma_connectivity(torch._C._autograd.DeviceType.CUDA, "nvlink").matrix  # type: ignore[attr-defined]
    except RuntimeError:
        return None


def machine(places: list[Place]) -> dict[str, Any]:
    """The ranks' hosts and devices, and how GPUs of a host reach each other."""
    devices = Counter(one.device for one in places)
    found: dict[str, Any] = {
        "hosts": len({one.host for one in places}),
        "ranks": ", ".join(f"{n} x {device}" for device, n in devices.items()),
    }
    if any(one.uuid for one in places) and len(places) > 1:
        found["nvlink"] = nvlink_in_words(places)
    return found


def nvlink_in_words(places: list[Place]) -> str:
    pairs = [(a, b) for a in places for b in places if a.host == b.host and a.uuid != b.uuid]
    if not pairs:
        return "none: a GPU a host"
    if any(one.linked is None for one in places):
        return "not known: the driver does not tell"
    linked = sum(b.uuid in (a.linked or []) for a, b in pairs)
    return "between all GPUs of a host" if linked == len(pairs) else f"between {linked} of {len(pairs)} pairs of ranks"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
