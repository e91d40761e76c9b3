"""The pool itself: it computes, it names the rank that failed, it ends a hang, and it shares no memory."""

import os

import pytest
import torch
import torch.distributed as dist


def ring_sum(x: torch.Tensor) -> torch.Tensor:
    rank, world = dist.get_rank(), dist.get_world_size()
    total, block = x[rank].clone(), x[rank].clone()
    for _ in range(world - 1):
        arriving = torch.empty_like(block)
        moves = [
            dist.P2POp(dist.isend, block, (rank + 1) % world),
            dist.P2POp(dist.irecv, arriving, (rank - 1) % world),
        ]
        for move in dist.batch_isend_irecv(moves):
            move.wait()
        block = arriving
        total += block
    return total


@pytest.mark.parametrize("world", [2, 3])
def test_ring_sum_is_the_sum(ranks, world):
    x = torch.randn(world, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(world))
    for got in ranks(world)(ring_sum, x):
        torch.testing.assert_close(got, x.sum(0), rtol=1e-14, atol=1e-14)


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("no")
    dist.barrier()


def die_on_rank_one() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def wait_on_rank_zero() -> None:
    if dist.get_rank() == 0:
        dist.barrier()


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (fail_on_rank_one, r"rank 1 failed(.|\n)*ValueError: no"),
        # gloo may tell rank 0 of the lost peer before the pool sees the exit
        (die_on_rank_one, r"rank 1 died with exit code 7|rank 0 failed(.|\n)*(closed|reset)"),
        (wait_on_rank_zero, r"no answer from ranks \[0\]"),
    ],
)
def test_a_rank_that_fails_dies_or_hangs_is_named(ranks, task, said):
    with pytest.raises(AssertionError, match=said):
        ranks(2)(task, timeout=4)
    assert len(ranks(2)(ring_sum, torch.ones(2, 3))) == 2  # and the next test gets new ranks


def spoil(x: torch.Tensor) -> tuple[torch.Tensor, float]:
    draw = torch.rand(()).item()
    before = x.clone()
    x.fill_(dist.get_rank())
    dist.barrier()
    return before, draw


def test_ranks_share_neither_memory_nor_luck(ranks):
    results = ranks(2)(spoil, torch.full((3,), -1.0))
    assert all(before.eq(-1).all() for before, _ in results)
    assert results[0][1] == results[1][1] == ranks(2)(spoil, torch.ones(1))[1][1]  # the same seed each time
