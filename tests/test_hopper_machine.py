"""The Hopper kernels' logic without a GPU, on the machine of `hopper_machine.py`: masks, merging, groups, barriers."""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import hopper_language
import pytest
import torch
from hopper_cases import MASKS, Case, fuzz, run, tensors

from ringspan.kernels import hopper_backend
from ringspan.kernels.plan import plan

GROWING = Case(mask="full", queries=200, keys=700, heads=1, kv_heads=1, spread=4.0, forward_only=True)
CASES = {
    "causal": Case(queries=300, keys=300, heads=4, kv_heads=2),
    "random": Case(mask="random", queries=260, keys=385, batch=2, dtype=torch.float16, seed=1),
    "packed": Case(mask="packed", queries=397, keys=397, heads=3, kv_heads=1, batch=2, fused=True),
    "window": Case(mask="window", queries=150, keys=700, seed=2),
    "softcap": Case(queries=200, keys=200, softcap=5.0, heads=4, kv_heads=1),
    "no key is seen": Case(mask="none", queries=70, keys=130, into=True),
    "only the last key": Case(mask="last", queries=129, keys=129),
    "ring step": Case(mask="random", queries=200, keys=300, into=True, seed=1),
    "last ring step": Case(queries=193, keys=270, into=True, seed=2, heads=4, kv_heads=2),
    "in a fixed order": Case(mask="packed", queries=500, keys=400, batch=2, deterministic=True, seed=3),
    "softcapped ring step": Case(queries=150, keys=150, softcap=20.0, into=True, seed=3, deterministic=True),
    "one query, one key": Case(queries=1, keys=1),
    "maxima grow": GROWING,
}


@pytest.fixture
def machine() -> Iterator[Callable[[Case, int], dict[str, float]]]:
    """`machine(case, seed)` runs it, with what happens when drawn from ``seed``; errors as `hopper_cases.run`."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(*size: Any, make: Callable[..., torch.Tensor], **options: Any) -> torch.Tensor:
        x = make(*size, **options)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    def on_machine(case: Case, seed: int = 0) -> dict[str, float]:
        with hopper_language.simulated(seed):
            return run(case, "cpu")

    with (
        mock.patch.object(hopper_backend, "is_short", return_value=False),
        mock.patch.object(torch, "empty", functools.partial(poisoned, make=empty)),
        mock.patch.object(torch, "empty_like", functools.partial(poisoned, make=empty_like)),
    ):
        yield on_machine


def require_good(machine: Callable[..., dict[str, float]], case: Case, seed: int) -> None:
    errors = machine(case, seed)
    assert max(errors.values()) <= 1.5, f"{errors} {case} {seed}"


@pytest.mark.parametrize(("name", "head_dim"), [*zip(CASES, itertools.cycle((64, 128)), strict=False)])
def test_against_float64(machine, name, head_dim):  # type: ignore[no-untyped-def]
    require_good(machine, replace(CASES[name], head_dim=head_dim), seed=head_dim)


def test_random_cases(machine):  # type: ignore[no-untyped-def]
    for seed, case in enumerate(fuzz(4, 6)):
        require_good(machine, case, seed)


def nothing(*arguments: Any, **options: Any) -> None: ...


def freed_early(number: Any, threads: int) -> None:
    """Goes on without the others, who are counted all the same."""
    hopper_language.pass_by(number, threads)


FAULTS = {
    "no fence": ("forward", "fence_async_shared", nothing),
    "no fence, in backward": ("backward", "fence_async_shared", nothing),
    "a turn is not passed": ("forward", "pass_by", nothing),
    "memory is filled while it is read": ("forward", "meet", freed_early),
    "results are overwritten before they are stored": ("forward", "tma_store_wait", nothing),
    "nobody waits for dq's memory": ("backward_copies", "tma_store_wait", nothing),
    "tiles come too late": ("forward", "mbarrier", mock.Mock(wraps=hopper_language.mbarrier, wait=nothing)),
    "barriers of one arrival": ("forward", "barriers", lambda n, arrivals: hopper_language.Barriers(n, 1)),
    "a product is used at once": (
        "backward",
        "warpgroup_mma_wait",
        lambda n, deps: hopper_language.warpgroup_mma_wait(2, deps),
    ),
}


def require_good_often(machine: Callable[..., dict[str, float]], case: Case) -> None:
    for seed in range(5):
        require_good(machine, case, seed)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(machine, fault):  # type: ignore[no-untyped-def]
    where, name, broken = FAULTS[fault]
    names = hopper_language.names_of(f"ringspan.kernels.hopper_{where}")
    with mock.patch.dict(names, {name: broken}), pytest.raises(AssertionError):
        require_good_often(machine, Case(queries=260, keys=400, mask="full", heads=1, kv_heads=1))


def test_a_maximum_that_is_not_followed_well_is_found(machine):  # type: ignore[no-untyped-def]
    names = hopper_language.names_of("ringspan.kernels.hopper_forward")
    softmax, ones = names["softmax"], torch.ones(64)
    faults = {"softmax": lambda *given: (*softmax(*given)[:3], ones), "exceeded": lambda sums, number: 0}
    for (name, broken), case in zip(faults.items(), (GROWING, replace(GROWING, dtype=torch.float16)), strict=True):
        with mock.patch.dict(names, {name: broken}), pytest.raises(AssertionError, match="'out'"):
            require_good(machine, case, 0)


def dq_of(head_dim: int, mask: str, seed: int) -> torch.Tensor:
    """fp32 sums of a fixed order, of the same inputs whatever the seed."""
    case = Case(head_dim=head_dim, queries=260, keys=600, mask=mask)
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = tensors(case, generator, "cpu")
    spans = plan(MASKS[mask](case, generator), case.keys)
    lse, delta, dq = torch.full((1, 2, 260), 9.0), torch.zeros(1, 2, 260), torch.zeros(q.shape)
    with hopper_language.simulated(seed):
        hopper_backend.backward(
            dout, q, k, v, lse, delta, spans, scale=0.1, softcap=0.0, dq=dq, dk=None, dv=None, deterministic=True
        )
    return dq


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("mask", ["full", "causal", "random"])
def test_sums_of_a_fixed_order_are_the_same_to_the_bit(head_dim, mask):  # type: ignore[no-untyped-def]
    first = dq_of(head_dim, mask, seed=0)
    assert first.abs().sum() > 0
    assert all(torch.equal(dq_of(head_dim, mask, seed), first) for seed in (1, 2))


def test_turns_that_nobody_waits_for_are_found():  # type: ignore[no-untyped-def]
    names = hopper_language.names_of("ringspan.kernels.hopper_backward_copies")
    with mock.patch.dict(names, {"_wait_turn": nothing}):
        assert any(not torch.equal(dq_of(128, "full", seed), dq_of(128, "full", 0)) for seed in range(1, 5))


FEW_KEYS = [(64, "causal"), (64, "window"), (128, "causal"), (128, "window"), (128, "packed")]


@pytest.mark.parametrize("head_dim, mask", FEW_KEYS)
def test_where_some_rows_see_few_keys_of_a_tile_none_is_multiplied_twice(machine, mask, head_dim):  # type: ignore[no-untyped-def]
    names, found = hopper_language.names_of("ringspan.kernels.hopper_forward"), []
    exceeded = names["exceeded"]
    with mock.patch.dict(names, {"exceeded": lambda *given: found.append(exceeded(*given)) or found[-1]}):
        case = Case(mask=mask, head_dim=head_dim, queries=700, keys=700, spread=1.0, forward_only=True, seed=4)
        require_good(machine, case, 0)
    assert found
    assert not any(found)
