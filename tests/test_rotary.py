"""Rotary frequencies against what their papers promise, in fp64."""

import math

import pytest
import torch

from ringspan.train.model import ModelConfig
from ringspan.train.rotary import YARN_FAST, Rope, Scaling

D, BASE = 64, 10_000.0
PLAIN = torch.tensor([BASE ** (-2 * i / D) for i in range(D // 2)], dtype=torch.float64)


@pytest.mark.parametrize("scaling", list(Scaling))
def test_a_factor_of_one_changes_nothing(scaling):
    rope = Rope(D, BASE, scaling, 1.0, 4096)
    torch.testing.assert_close(rope.frequencies(), PLAIN, rtol=1e-14, atol=0)
    assert rope.magnitude() == 1


def test_linear_divides_all_and_none_divides_none():
    torch.testing.assert_close(Rope(D, BASE, Scaling.linear, 8.0).frequencies(), PLAIN / 8, rtol=1e-14, atol=0)
    torch.testing.assert_close(Rope(D, BASE, Scaling.none, 8.0).frequencies(), PLAIN, rtol=1e-14, atol=0)


def test_ntk_keeps_the_fastest_and_divides_the_slowest():
    found = Rope(D, BASE, Scaling.ntk, 8.0).frequencies()
    assert found[0] == PLAIN[0]
    assert found[-1].item() == pytest.approx(PLAIN[-1].item() / 8, rel=1e-12)
    ratio = PLAIN / found
    assert (ratio.diff() > 0).all()


def test_yarn_keeps_the_fast_divides_the_slow_and_sharpens():
    trained, factor = 2048, 16.0
    rope = Rope(D, BASE, Scaling.yarn, factor, trained)
    turns = trained * PLAIN / (2 * math.pi)
    ratio = PLAIN / rope.frequencies()
    assert (ratio[turns >= YARN_FAST] == 1).all()
    torch.testing.assert_close(ratio[turns <= 1], torch.full_like(ratio[turns <= 1], factor), rtol=1e-12, atol=0)
    between = (turns > 1) & (turns < YARN_FAST)
    assert ((ratio[between] > 1) & (ratio[between] < factor)).all()
    assert min((turns >= YARN_FAST).sum(), (turns <= 1).sum(), between.sum()) > 2
    cos, sin = rope(torch.tensor([[77]]), torch.float64)
    torch.testing.assert_close(cos**2 + sin**2, torch.full_like(cos, (0.1 * math.log(16) + 1) ** 2), rtol=1e-12, atol=0)


def test_the_factor_is_how_much_longer_rows_are_than_those_trained_on():
    config = ModelConfig(rope_scaling=Scaling.yarn, rope_trained=4096)
    assert config.rope(1024).factor == config.rope(4096).factor == 1
    assert config.rope(65536) == Rope(config.head_dim, config.rope_base, Scaling.yarn, 16.0, 4096)
    assert config.rope(65536, base=7e6).base == 7e6
    assert ModelConfig().rope(1 << 20) == Rope(64, 500_000.0)


@pytest.mark.parametrize("fields", [{"rope_scaling": "yarn"}, {"rope_trained": 5}, {"rope_trained": -1}])
def test_a_scaling_needs_a_length_and_a_length_a_scaling(fields):
    with pytest.raises(ValueError, match=r"model\.rope_trained=.* with model\.rope_scaling="):
        ModelConfig(**{name: Scaling(value) if name == "rope_scaling" else value for name, value in fields.items()})


def test_ntk_needs_two_pairs():
    with pytest.raises(ValueError, match=r"model\.rope_scaling=ntk: needs model\.head_dim of 4 or more"):
        ModelConfig(head_dim=2, rope_scaling=Scaling.ntk, rope_trained=5)
