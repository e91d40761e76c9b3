import pytest
import torch
import torch.distributed as dist

from ringspan.parallel.mesh import Mesh, ParallelConfig, across_hosts


@pytest.mark.parametrize(
    "asked, world, sizes",
    [
        ({}, 4, (1, 4, 1)),
        ({"ulysses": 2}, 4, (1, 2, 2)),
        ({"ring": 2}, 4, (2, 2, 1)),
        ({"data": 4}, 4, (4, 1, 1)),
        ({"data": 2, "ulysses": 2}, 8, (2, 2, 2)),
        ({"data": 1, "ring": 1}, 1, (1, 1, 1)),
    ],
)
def test_what_is_not_said_takes_the_ranks_that_are_left(asked, world, sizes):
    assert ParallelConfig(**asked).sizes(world) == sizes


@pytest.mark.parametrize(
    "asked, world, way_out",
    [
        ({"ring": 3}, 4, "parallel.ring can be 1, 2, 4"),
        ({"ring": 3, "ulysses": 2}, 8, "parallel.ring can be 1, 2, 4"),
        ({"data": 2, "ring": 1}, 4, "parallel.ring can be 2"),
        ({"data": 3, "ring": 4}, 8, "parallel.data can be 2"),
        ({"ulysses": 8}, 4, "parallel.ulysses can be 1, 2, 4"),
        ({"data": 3, "ring": 3}, 4, "leave them out, and the ring takes all processes"),
    ],
)
def test_a_mesh_that_does_not_multiply_to_the_world_is_refused(asked, world, way_out):
    with pytest.raises(ValueError, match=f"does not multiply to the {world} processes of this run; .*{way_out}$"):
        ParallelConfig(**asked).sizes(world)


def test_a_size_below_one_is_refused():
    with pytest.raises(ValueError, match=r"parallel.ring=0"):
        ParallelConfig(ring=0)


@pytest.mark.parametrize(
    "ulysses, hosts, inside",
    [
        (1, "aabb", None),
        (2, "aabb", None),
        (4, "aaaabbbb", None),
        (2, "aaaabb", None),  # hosts need not be alike
        (4, "aabb", 2),
        (2, "ab", 1),
        (2, "aaabbb", 1),
        (4, "aaaaaabbbbbb", 2),
        (8, "aaaabbbb", 4),
    ],
)
def test_ranks_that_trade_heads_stay_inside_of_hosts_or_are_warned_of(ulysses, hosts, inside):
    said = across_hosts(ulysses, hosts)
    assert (said is None) == (inside is None)
    if inside is not None:
        assert f"parallel.ulysses={inside} stays inside of hosts" in str(said)
        assert across_hosts(inside, hosts) is None


def members() -> tuple[tuple[int, ...], list[int], list[int]]:
    mesh = Mesh.create(2, 2, 2)
    everyone = []
    for group in (mesh.ring_group, mesh.ulysses_group):
        ranks = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
        dist.all_gather(ranks, torch.tensor([dist.get_rank()]), group=group)
        everyone.append([int(rank) for rank in ranks])
    return (mesh.data_rank, mesh.ring_rank, mesh.ulysses_rank), *everyone


def test_ulysses_ranks_are_neighbours_and_rings_cross_them(ranks):
    for rank, (place, ring, ulysses) in enumerate(ranks(8)(members)):
        data, ring_rank, ulysses_rank = place
        assert rank == data * 4 + ring_rank * 2 + ulysses_rank
        assert ring == [data * 4 + ulysses_rank, data * 4 + 2 + ulysses_rank]
        assert ulysses == [data * 4 + ring_rank * 2, data * 4 + ring_rank * 2 + 1]
