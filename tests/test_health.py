"""Steps without a finite gradient, and losses that stand out."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_loop import lines, run
from test_parity import job, write_texts

from ringspan.train.checkpoint import Reader
from ringspan.train.engine import Engine
from ringspan.train.health import LEARNED, Spikes, first_not_finite, report, statistics
from ringspan.train.manifest import read_manifest
from ringspan.train.optim import OptimConfig


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("health")


@pytest.fixture(scope="module")
def text(root):
    return write_texts(root / "text", 5, 90)


def run_with_losses(config, bad, rank):
    """Rank ``rank``'s loss is multiplied by what ``bad`` has for a step."""
    loss_sum, steps = Engine.loss_sum, []

    def spoilt(self, *inputs):
        steps.append(0)
        factor = bad.get(len(steps), 1.0) if torch.distributed.get_rank() == rank else 1.0
        return loss_sum(self, *inputs) * factor

    Engine.loss_sum = spoilt
    try:
        return run(config)
    finally:
        Engine.loss_sum = loss_sum


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_a_step_without_a_finite_gradient_is_left_out_and_counted(zero, root, text, ranks):
    config = job(root, f"skips-{zero}", text, mesh=(1, 2, 1), zero=zero, steps=6, save_every=1, keep=0, skip_limit=2)
    bad = {2: math.nan, 4: math.inf}  # never two in a row
    last = ranks(2)(run_with_losses, config, bad, 1, timeout=200)
    assert last[0] == last[1] == lines(config)[-1]["train/loss"]
    assert [line["train/skipped"] for line in lines(config)] == [0, 1, 1, 2, 2, 2]
    assert [line["train/grad_norm"] is None for line in lines(config)] == [False, True, False, True, False, False]

    def weights_after(step):
        folder = Path(config.run_dir, "checkpoints", f"step-{step:08d}")
        manifest = read_manifest(folder)
        return Reader(folder, manifest).read("master", "norm.weight", 0, 32), manifest.scalars

    assert torch.equal(weights_after(1)[0], weights_after(2)[0])
    assert not torch.equal(weights_after(2)[0], weights_after(3)[0])
    assert weights_after(6)[1] == {"step": 4.0}  # Adam's own count


def test_steps_in_a_row_without_a_finite_gradient_end_the_run_with_a_report(root, text, ranks):
    config = job(root, "diverges", text, mesh=(1, 2, 1), steps=9, skip_limit=3)
    for told in ranks(2)(run_with_losses, config, {4: math.nan, 5: math.nan, 6: math.nan, 7: math.nan}, 1, timeout=200):
        assert "step 6: the gradient norm is not finite, in 3 steps in a row" in told
        assert "(first in the gradient of head on rank 1, rows [" in told
        assert "lower optim.lr (now 0.01)" in told
        assert f"all layers are in {config.run_dir}/not-finite-00000006.json" in told
    assert len(lines(config)) == 5
    said = json.loads(Path(config.run_dir, "not-finite-00000006.json").read_text())
    assert (said["step"], [one["rank"] for one in said["ranks"]]) == (6, [0, 1])
    for rank, one in enumerate(said["ranks"]):
        (seen,) = one["micro_batches"]
        assert seen["rows"] == said["ranks"][0]["micro_batches"][0]["rows"]
        assert len(set(seen["rows"])) == 8
        assert (seen["loss_sum"] == "nan") == (rank == 1)
        assert list(seen["layers"]) == ["embedding", "layers.0", "layers.1", "norm", "head"]
        assert seen["layers"]["layers.1"]["output"]["not_finite"] == 0
        assert (seen["layers"]["layers.1"]["gradient"]["not_finite"] > 0) == (rank == 1)


def test_a_learning_rate_far_too_high_is_named(root, text, ranks):
    config = replace(job(root, "too-high", text, steps=9), optim=OptimConfig(lr=1e30, warmup_steps=2))
    (told,) = ranks(1)(run, config, timeout=200)
    assert "step 6: the gradient norm is not finite, in 5 steps in a row" in told
    assert "lower optim.lr (now 1e+30)" in told


def test_a_spike_is_told_and_does_not_become_usual():
    spikes, g = Spikes(), torch.Generator().manual_seed(0)
    noise = torch.randn(200, generator=g).tolist()
    said = [spikes.see(5 - 0.01 * i + 0.1 * noise[i]) for i in range(200)]
    assert not any(said)
    assert spikes.see(math.nan) is None
    for _ in range(3):
        assert spikes.see(9.0).startswith("loss spike: 9.000 after a mean of 3.")
    assert spikes.see(3.0) is None


def test_the_first_losses_are_no_spikes():
    spikes = Spikes()
    assert [spikes.see(loss) for loss in [1.0] * (LEARNED - 1) + [50.0]] == [None] * LEARNED


def test_statistics_leave_out_what_is_not_finite():
    told = statistics(torch.tensor([1.0, -3.0, math.nan, math.inf]))
    assert told == {"not_finite": 2, "largest": 3.0, "mean": -0.5}


def seen(**counts):
    """Layers a, b of a micro-batch: numbers that are not finite in (output, gradient) of each."""
    pairs = {"a": (0, 0), "b": (0, 0), **counts}
    layers = {name: {"output": {"not_finite": x}, "gradient": {"not_finite": y}} for name, (x, y) in pairs.items()}
    return [{"rows": [7], "layers": layers}]


def test_a_report_that_cannot_be_written_is_still_told(tmp_path):
    told = report(tmp_path / "no" / "folder.json", {}, [[seen(b=(1, 9))[0]]])
    assert told.startswith(
        "first in the output of b on rank 0, rows [7]; the layers could not be written: No such file"
    )


@pytest.mark.parametrize(
    ("ranks", "where"),
    [
        ([seen(), seen()], None),
        ([seen(b=(1, 9)), seen(a=(2, 0))], "output of a on rank 1"),
        ([seen(b=(1, 9)), seen(b=(5, 0))], "output of b on rank 1"),
        ([seen(a=(0, 3)), seen(b=(0, 1))], "gradient of b on rank 1"),
    ],
)
def test_the_first_place_in_the_order_of_computation_is_named(ranks, where):
    assert first_not_finite(ranks) == (where and f"first in the {where}, rows [7]")
