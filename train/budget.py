"""What a run takes before it starts: memory of a GPU and of the host by part, seconds of a step by part, utilisation.

budget(job_of(config, world=8, vocab_size=512), Machine())    # of one job
fastest(job, machine); longest(job, machine)                  # the job with the best policy, mesh and micro-batch

Bytes are counted in train/memory.py, as torch.cuda.max_memory_allocated() would, and seconds in train/duration.py, from
the machine's measured rates.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

import torch

from ringspan.train.activations import Activations, Offload, Policy
from ringspan.train.duration import step_seconds
from ringspan.train.memory import gpu_bytes, host_bytes
from ringspan.train.metrics import GIB, flops_per_step, peak_of
from ringspan.train.model import AnyModel, ModelSizes
from ringspan.train.optim import Optimizer

if TYPE_CHECKING:
    from ringspan.train.config import TrainConfig

Parts = dict[str, float]


@dataclass(kw_only=True)
class Machine:
    """A GPU, its host and its wires. The rates are what was measured in training, not data sheets; GB is 10^9 bytes."""

    name: str = "h100"  # of the chip; "cpu" makes it one
    peak_tflops: float = 989.0  # dense bf16 of the data sheet, which utilisation is of
    matrix_tflops: float = 650.0  # products of a layer's sizes
    attention_tflops: float = 690.0  # forward, an attended FLOP
    attention_backward_tflops: float = 615.0  # an attended FLOP, of 2.5 times as many
    memory_gb_s: float = 2600.0  # what elementwise kernels read and write
    gpu_memory_gib: float = 79.1  # torch.cuda.mem_get_info's total
    outside_gib: float = 1.0  # of it, CUDA's context and NCCL, which the allocator does not see
    unused: float = 0.04  # of the rest, what fragments leave unused
    gpus: int = 8  # of a host
    host_memory_gib: float = 1024.0  # of a host, shared by its GPUs
    host_gb_s: float = 40.0  # of a GPU's share of the host's memory, which an optimizer there reads and writes
    copy_gb_s: float = 45.0  # between a GPU and pinned host memory
    wire_gb_s: float = 364.0  # between two GPUs of a host
    network_gb_s: float = 40.0  # between hosts, a GPU
    hop_seconds: float = 60e-6  # lost at each step of a ring, a layer and pass
    layer_seconds: float = 450e-6  # lost between kernels, a layer and pass

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            rate = name == "gpus" or name.endswith(("_tflops", "_gb_s"))  # which something is divided by
            if name != "name" and not (value > 0 if rate else value >= 0):
                raise ValueError(f"machine.{name}={value}: must be {'above 0' if rate else '0 or more'}")
        if self.unused >= 1:
            raise ValueError(f"machine.unused={self.unused}: a fraction of the memory, below 1")

    @property
    def room(self) -> float:
        """GiB that a rank's tensors may take."""
        return (self.gpu_memory_gib - self.outside_gib) * (1 - self.unused)

    def host_room(self, world: int) -> float:
        """GiB of the host's memory for one of ``world`` ranks."""
        return self.host_memory_gib / max(1, min(world, self.gpus))


@dataclass(frozen=True, kw_only=True)
class Job:
    """What decides a run's memory and time."""

    model: AnyModel
    vocab_size: int
    seq_len: int  # tokens of a row, all ranks that share it together
    micro_batch: int
    accumulation: int
    data: int
    ring: int
    ulysses: int
    zero: int
    element: int  # bytes of a parameter and of an activation
    policy: Policy
    offload_optimizer: bool
    offload_parameters: bool
    muon: bool = False  # moves the matrices of the layers
    document: int = 0  # tokens of a document that sees itself alone; 0: rows are whole

    @property
    def world(self) -> int:
        return self.data * self.ring * self.ulysses

    @property
    def tokens(self) -> int:
        """Of a rank in one micro-batch."""
        return self.micro_batch * -(-self.seq_len // (self.ring * self.ulysses))

    @property
    def attended(self) -> float:
        """(query, key) pairs of a row."""
        return self.seq_len * (min(self.document or self.seq_len, self.seq_len) + 1) / 2

    @property
    def sizes(self) -> ModelSizes:
        return self.model.sizes

    @property
    def parameters(self) -> int:
        """That are trained."""
        return self.model.parameters(self.vocab_size)

    @property
    def all_parameters(self) -> int:
        return self.model.all_parameters(self.vocab_size)

    @property
    def head(self) -> int:
        """Parameters of it."""
        return self.vocab_size * self.sizes.dim

    @property
    def layer_parameters(self) -> float:
        """Of a layer, that a token is multiplied by."""
        return (self.model.matmul_parameters(self.vocab_size) - self.head) / self.sizes.n_layers

    @property
    def frozen(self) -> bool:
        """Whether all but adapters are, the head as well."""
        return self.model.frozen_parameters > 0

    @property
    def gathered_at_once(self) -> float:
        """Parameters, by ZeRO-3."""
        return max(self.layer_parameters, self.model.largest_parameter(self.vocab_size))

    @property
    def by_muon(self) -> float:
        """Parameters that Muon moves."""
        return self.muon * self.layer_parameters * self.sizes.n_layers


class Budget(NamedTuple):
    """Of one rank; gpu and host are GiB at the peak, seconds are of a step."""

    gpu: Parts
    host: Parts
    seconds: Parts
    utilisation: float
    tokens_per_second: float  # a GPU
    room: float  # GiB that a rank's tensors may take
    host_room: float  # GiB of the host's memory for a rank

    @property
    def seconds_a_step(self) -> float:
        return sum(self.seconds.values())

    @property
    def gpu_gib(self) -> float:
        return sum(self.gpu.values())

    @property
    def host_gib(self) -> float:
        return sum(self.host.values())

    @property
    def fits(self) -> bool:
        return self.gpu_gib <= self.room and self.host_gib <= self.host_room


def machine_here(device: torch.device, world: int) -> Machine:
    """The memory of this host, and an H100's rates in proportion to the chip's peak. A CPU's ranks share the host's."""
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    if device.type != "cuda":
        return Machine(name="cpu", gpu_memory_gib=host / world, gpus=world, host_memory_gib=host, outside_gib=0.5)
    base, name = Machine(), torch.cuda.get_device_name(device)
    faster = (peak_of(name) or base.peak_tflops * 1e12) / (base.peak_tflops * 1e12)
    return replace(
        base,
        name=name,
        peak_tflops=base.peak_tflops * faster,
        matrix_tflops=base.matrix_tflops * faster,
        attention_tflops=base.attention_tflops * faster,
        attention_backward_tflops=base.attention_backward_tflops * faster,
        gpu_memory_gib=torch.cuda.mem_get_info(device)[1] / GIB,
        gpus=torch.cuda.device_count(),
        host_memory_gib=host,
    )


def job_of(config: TrainConfig, world: int, vocab_size: int, device_type: str = "cuda") -> Job:
    """ValueError: a mesh that does not multiply to ``world``."""
    data, ring, ulysses = config.parallel.sizes(world)
    return Job(
        model=config.model,
        vocab_size=vocab_size,
        seq_len=max([config.seq_len, *(phase.seq_len for phase in config.phases)]),
        micro_batch=config.train.micro_batch,
        accumulation=config.train.accumulation,
        data=data,
        ring=ring,
        ulysses=ulysses,
        zero=config.engine.zero,
        element=config.engine.resolve(device_type).itemsize,
        policy=config.train.policy(device_type),
        offload_optimizer=config.engine.offload_optimizer,
        offload_parameters=config.engine.offload_parameters,
        muon=config.optim.name is Optimizer.muon,
    )


def budget(job: Job, machine: Machine) -> Budget:
    seconds = step_seconds(job, machine)
    m, rows = job.sizes, job.micro_batch * job.accumulation * job.data
    flops = flops_per_step(
        job.model.matmul_parameters(job.vocab_size),
        rows * job.seq_len,
        n_layers=m.n_layers,
        n_heads=m.n_heads,
        head_dim=m.head_dim,
        attended=round(rows * job.attended),
        frozen=job.model.frozen_parameters,
    )
    total = sum(seconds.values())
    return Budget(
        gpu={name: size / GIB for name, size in gpu_bytes(job).items()},
        host={name: size / GIB for name, size in host_bytes(job).items()},
        seconds=seconds,
        utilisation=flops / total / job.world / (machine.peak_tflops * 1e12),
        tokens_per_second=rows * job.seq_len / total / job.world,
        room=machine.room,
        host_room=machine.host_room(job.world),
    )


TILE = 4096  # tokens: products of so many rows run at the matrix units' rate
SWITCHES = {
    "train.activations": "policy.activations",
    "train.recompute_layers": "policy.recompute_layers",
    "train.offload": "policy.offload",
    "train.mlp_tile": "policy.mlp_tile",
    "engine.zero": "zero",
    "engine.offload_optimizer": "offload_optimizer",
    "engine.offload_parameters": "offload_parameters",
    "parallel.data": "data",
    "parallel.ring": "ring",
    "parallel.ulysses": "ulysses",
    "train.micro_batch": "micro_batch",
    "seq_len": "seq_len",
}


def switches(job: Job, since: Job) -> dict[str, str]:
    """The fields of a configuration that make ``since`` into ``job``, as name and value."""
    found = {}
    for name, path in SWITCHES.items():
        new, old = (getattr(x.policy if path.startswith("policy.") else x, path.split(".")[-1]) for x in (job, since))
        if new != old:
            found[name] = str(new.value if isinstance(new, Enum) else new).lower()
    return found


def policies(job: Job) -> Iterator[Job]:
    """The same rows on the same mesh with every other policy of activations, ZeRO stage and offload."""
    recomputed = [(how, k) for how in Activations if how is not Activations.keep for k in (1, 2, 4, 8)]
    kept = [(Activations.keep, 1), *((how, k) for how, k in recomputed if k <= job.sizes.n_layers)]
    engines = [(job.zero, False, False)] if job.zero == 0 else [(job.zero, False, False), (job.zero, True, False)]
    engines += [(3, False, False), (3, True, False), (3, True, True)] if job.zero != 3 else [(3, True, True)]
    tiles = sorted({0, TILE, job.policy.mlp_tile})
    for (how, k), offload, tile, engine in itertools.product(kept, Offload, tiles, engines):
        policy = replace(job.policy, activations=how, recompute_layers=k, offload=offload, mlp_tile=tile)
        zero, optimizer, parameters = engine
        if job.model.takes(policy):
            yield replace(job, policy=policy, zero=zero, offload_optimizer=optimizer, offload_parameters=parameters)


def meshes(job: Job, micro_batches: tuple[int, ...]) -> Iterator[Job]:
    """Every mesh of as many ranks."""
    world = job.world
    for ulysses, ring in itertools.product(range(1, world + 1), repeat=2):
        if world % (ulysses * ring) == 0 and job.sizes.n_heads % ulysses == 0:
            for rows in micro_batches:
                yield replace(job, data=world // (ulysses * ring), ring=ring, ulysses=ulysses, micro_batch=rows)


def fastest(job: Job, machine: Machine) -> Job | None:
    """Of all policies, meshes and micro-batches that fit, the one of most tokens a second; None: none fits."""
    jobs = (j for mesh in meshes(job, (1, 2, 4, 8)) for j in policies(mesh))
    return max((j for j in jobs if fits(j, machine)), key=lambda j: budget(j, machine).tokens_per_second, default=None)


def longest(job: Job, machine: Machine) -> Job | None:
    """The job of the longest row that fits, all ranks sharing it; of those within 2 % of it the fastest."""
    found = []
    for mesh in meshes(job, (1,)):
        if mesh.data == 1:
            for candidate in policies(mesh):
                if seq_len := longest_row(candidate, machine):
                    found.append(replace(candidate, seq_len=seq_len))
    most = max((j.seq_len for j in found), default=0)
    near = [j for j in found if j.seq_len >= 0.98 * most]
    return max(near, key=lambda j: budget(j, machine).tokens_per_second, default=None)


def longest_row(job: Job, machine: Machine) -> int:
    """Tokens, a multiple of 1024; 0 where not even that fits."""
    low, high = 0, 2**16  # in units of 1024 tokens: 64M
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(replace(job, seq_len=1024 * middle), machine) else (low, middle)
    return 1024 * low


def fits(job: Job, machine: Machine) -> bool:
    on_host = sum(host_bytes(job).values()) <= GIB * machine.host_room(job.world)
    return on_host and sum(gpu_bytes(job).values()) <= GIB * machine.room


def ways_out(job: Job, machine: Machine, most: int = 3) -> list[tuple[str, Budget]]:
    """(fields to change, the budget then), fastest first: policies that fit, each without a needless change."""
    fitting = [(budget(j, machine), switches(j, job)) for j in policies(job) if j != job and fits(j, machine)]
    found: list[tuple[Budget, dict[str, str]]] = []
    for then, changes in sorted(fitting, key=lambda one: (-one[0].tokens_per_second, len(one[1]))):
        if not any(set(old.items()) <= set(changes.items()) for _, old in found):
            found.append((then, changes))
    return [(" ".join(f"{name}={value}" for name, value in changes.items()), then) for then, changes in found[:most]]


def in_words(job: Job, machine: Machine) -> str:
    """One line: what a rank needs of what there is, and of a job that does not fit what would."""
    now = budget(job, machine)
    if now.fits:
        host = f", {now.host_gib:.2f} of the host's" if now.host_gib else ""
        return f"{now.gpu_gib:.2f} of {now.room:.1f} GiB{host}: {in_parts(now.gpu)}"
    where = f"{now.gpu_gib:.1f} GiB of the {now.room:.1f} that a rank has for tensors"
    if now.host_gib > now.host_room:
        where += f" and {now.host_gib:.1f} GiB of the {now.host_room:.1f} of a process's share of the host's memory"
    return f"WARNING: this run needs {where}: {in_parts(now.gpu)}; {advice(job, machine)}"


@contextmanager
def explained(job: Job, machine: Machine, when: Callable[[], str]) -> Iterator[None]:
    """Inside, CUDA's want of memory becomes a ValueError that tells a user what takes it and what would fit."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(out_of_memory(job, machine, when(), str(error))) from error


def out_of_memory(job: Job, machine: Machine, when: str, said: str) -> str:
    """What a user is told when the GPU's memory was not enough: ``said`` is the allocator's message."""
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", said)
    more = f", {asked[1]} more were asked for" if asked else ""
    now = budget(job, machine)
    needed = f"{now.gpu_gib:.1f} of {now.room:.1f} GiB: {in_parts(now.gpu)}"
    return f"{when}: out of GPU memory{more}; the budget is {needed}; {advice(job, machine)}"


def advice(job: Job, machine: Machine) -> str:
    ways = [
        f"{fields} ({then.gpu_gib:.1f} GiB, {then.seconds_a_step / budget(job, machine).seconds_a_step:.2f} x the time)"
        for fields, then in ways_out(job, machine)
    ]
    if ways:
        return f"what fits: {' | '.join(ways)}"
    row = max((longest_row(j, machine) for j in policies(job)), default=0)
    return f"no policy fits: use more GPUs{f', or seq_len={row}, the longest that fits on these' if row else ''}"


def in_parts(parts: Parts, most: int = 4) -> str:
    largest = sorted(parts.items(), key=lambda one: -one[1])[:most]
    return ", ".join(f"{name} {gib:.3g}" for name, gib in largest if gib >= 0.005)
