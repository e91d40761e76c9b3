"""The grid of ranks: data x ring x ulysses, ulysses fastest, so that its ranks are neighbours on the fast wire.

The ranks of a host are consecutive, as torchrun numbers them. So where ulysses divides a host's, it stays inside of
hosts and the ring goes across, which hides its exchanges under computation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _get_default_group, _set_pg_timeout

from ringspan.parallel.watchdog import time_out


class LayoutName(str, Enum):
    contiguous = "contiguous"
    zigzag = "zigzag"
    striped = "striped"
    balanced = "balanced"  # made for each micro-batch's documents


class StrategyName(str, Enum):
    auto = "auto"  # the one that loses less time, by the shard's length and the kv heads
    ring = "ring"  # keys come a shard at a time, under the block before
    allgather = "allgather"  # all keys come at once, then one block


@dataclass(kw_only=True)
class ParallelConfig:
    data: int | None = None  # groups that read different samples; what ring and ulysses leave of the ranks
    ring: int | None = None  # ranks that share a sequence by passing keys on; all ranks that are left
    ulysses: int = 1  # ranks that share a sequence by trading heads for positions, inside the ring's shards
    layout: LayoutName = LayoutName.balanced  # which positions a rank of the ring holds
    strategy: StrategyName = StrategyName.auto  # how a rank of the ring comes by the others' keys

    def __post_init__(self) -> None:
        for name in ("data", "ring", "ulysses"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"parallel.{name}={size}: must be at least 1")

    def sizes(self, world: int) -> tuple[int, int, int]:
        """(data, ring, ulysses) for ``world`` ranks. ValueError: they do not multiply to it."""
        known = self.ulysses * (self.ring or 1) * (self.data or 1)
        data, ring = self.data, self.ring
        if world % known == 0:
            ring = ring or (world // known)
            data = data or (world // (self.ulysses * ring))
        if (data or 1) * (ring or 1) * self.ulysses != world:
            asked = " x ".join(
                f"{name}={size}"
                for name, size in (("data", self.data), ("ring", self.ring), ("ulysses", self.ulysses))
                if size is not None
            )
            raise ValueError(
                f"parallel: {asked} does not multiply to the {world} processes of this run; {self._way_out(world)}"
            )
        assert data is not None
        assert ring is not None
        return data, ring, self.ulysses

    def _way_out(self, world: int) -> str:
        """The first size that alone could be another: it divides what the others leave, or is that if all are given."""
        given = {"ring": self.ring, "data": self.data, "ulysses": self.ulysses}
        for name, size in given.items():
            others = math.prod(n or 1 for other, n in given.items() if other != name)
            if size is None or world % others:
                continue
            rest = world // others
            sizes = [n for n in range(1, rest + 1) if rest % n == 0] if None in given.values() else [rest]
            return f"with the others as they are, parallel.{name} can be {', '.join(map(str, sizes))}"
        return "leave them out, and the ring takes all processes"


def across_hosts(ulysses: int, hosts: Sequence[str]) -> str | None:
    """What to warn of if ranks that trade heads lie on several hosts; ``hosts`` has each rank's. No error: some hosts
    share a fast wire."""
    for first in range(0, len(hosts), ulysses):
        there = list(dict.fromkeys(hosts[first : first + ulysses]))
        if len(there) > 1:
            inside = math.gcd(ulysses, *(hosts.count(host) for host in set(hosts)))
            return (
                f"parallel.ulysses={ulysses}: ranks {first} to {first + ulysses - 1} trade heads in every layer, and "
                f"lie on {' and '.join(there)}; parallel.ulysses={inside} stays inside of hosts, the ring goes across"
            )
    return None


@dataclass(frozen=True)
class Mesh:
    """Sizes of the three axes, this rank's place on them, and the groups that share a sequence."""

    data: int
    ring: int
    ulysses: int
    data_rank: int
    ring_rank: int
    ulysses_rank: int
    ring_group: dist.ProcessGroup
    ulysses_group: dist.ProcessGroup

    @staticmethod
    def create(data: int, ring: int, ulysses: int, device_type: str = "cpu") -> Mesh:
        """The mesh over all ranks of the default group. ValueError: sizes that do not multiply to its size."""
        world = dist.get_world_size()
        if data * ring * ulysses != world:
            raise ValueError(f"data={data} x ring={ring} x ulysses={ulysses} does not multiply to {world} ranks")
        grid = init_device_mesh(device_type, (data, ring, ulysses), mesh_dim_names=("data", "ring", "ulysses"))
        data_rank, ring_rank, ulysses_rank = (grid.get_local_rank(axis) for axis in ("data", "ring", "ulysses"))
        groups = grid.get_group("ring"), grid.get_group("ulysses")
        seconds = time_out(_get_default_group(), torch.device(device_type))
        for group in groups:  # a new group has PyTorch's time-out, 10 to 30 minutes, whatever the default group has
            _set_pg_timeout(timedelta(seconds=seconds), group)
        return Mesh(data, ring, ulysses, data_rank, ring_rank, ulysses_rank, *groups)

    @property
    def world(self) -> int:
        return self.data * self.ring * self.ulysses
