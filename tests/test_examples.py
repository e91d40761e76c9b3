"""The examples train, and sharding changes nothing of what they compute."""

import importlib
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def losses(name: str, *steps: int) -> list[float]:
    sys.path.insert(0, str(EXAMPLES))  # where Python looks when the script is started
    try:
        return importlib.import_module(name).train(*steps)
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.mark.parametrize("name, last", [("ring_ddp", 0.2), ("ring_fsdp2", 0.2), ("vision_text", 0.2)])
def test_examples_learn_and_have_the_losses_of_one_process(name, last, ranks):
    alone = ranks(1)(losses, name)[0]
    assert alone[-1] < last * alone[0]
    for found in ranks(2)(losses, name, 12):
        # fp32 roundings, which each step of Adam's makes larger
        assert found == pytest.approx(alone[:12], rel=1e-4)


def test_a_loop_of_your_own_is_short():
    for name in ("ring_ddp", "ring_fsdp2", "hf_trainer"):
        lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
        assert sum(bool(line) for line in lines) < 60
