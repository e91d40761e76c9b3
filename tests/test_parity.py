"""The loss curve and the gradient norms of a run do not depend on the mesh, the ZeRO stage or the accumulation."""

import json
import math
import random
from pathlib import Path

import pytest

from ringspan.parallel.mesh import LayoutName, ParallelConfig, StrategyName
from ringspan.train.activations import Activations
from ringspan.train.config import TrainConfig
from ringspan.train.data import DataConfig
from ringspan.train.engine import EngineConfig
from ringspan.train.loop import train
from ringspan.train.loop_config import LoopConfig
from ringspan.train.metrics import LoggerConfig, WandbMode
from ringspan.train.model import ModelConfig
from ringspan.train.optim import OptimConfig

SEQ_LEN, ROWS, STEPS = 64, 8, 12
STAGES = (0, 1, 2, 3)
MESHES = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (4, 1, 1), (2, 2, 1), (1, 4, 1), (1, 2, 2)]  # data, ring, ulysses


def write_texts(folder, shortest, longest, n=40):
    draw = random.Random(0)
    folder.mkdir()
    for i in range(n):
        words = [draw.choice(["ring ", "span ", "key ", "a ", "of "]) for _ in range(longest)]
        (folder / f"{i:02}.txt").write_text("".join(words)[: draw.randint(shortest, longest) - 1])
    return str(folder)


def job(
    root, name, text, *, mesh=(1, 1, 1), zero=1, accumulation=1, layout="contiguous", steps=STEPS, n_layers=2, **loop
):
    data, ring, ulysses = mesh
    run_dir = Path(root, name)
    run_dir.mkdir(exist_ok=True)
    return TrainConfig(
        name=name,
        run_dir=str(run_dir),
        seq_len=SEQ_LEN,
        steps=steps,
        model=ModelConfig(dim=32, n_layers=n_layers, n_heads=4, n_kv_heads=2, head_dim=8, mlp_dim=48),
        parallel=ParallelConfig(data=data, ring=ring, ulysses=ulysses, layout=LayoutName(layout)),
        data=DataConfig(path=text, cache=f"{root}/cache"),
        engine=EngineConfig(zero=zero, clip=1.5),
        optim=OptimConfig(lr=1e-2, warmup_steps=5),
        train=LoopConfig(micro_batch=ROWS // data // accumulation, accumulation=accumulation, **loop),
        logger=LoggerConfig(wandb=WandbMode.disabled),
    )


def run_all(configs):
    """On a rank: every run, one after the other in one process."""
    for config in configs:
        train(config, config.run_dir)


def curve(config):
    """[(loss, gradient norm)] by step."""
    lines = Path(config.run_dir, "metrics.jsonl").read_text().splitlines()
    return [(line["train/loss"], line["train/grad_norm"]) for line in map(json.loads, lines)]


def assert_same_curve(config, expected):
    got = curve(config)
    assert len(got) == len(expected) == STEPS
    for step, (ours, theirs) in enumerate(zip(got, expected, strict=True), start=1):
        assert ours == pytest.approx(theirs, rel=1e-4), f"{config.name} at step {step}"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def ragged(root):
    """Documents of 33 to 47 tokens: each has a row of 64 for itself, so a contiguous ring's last of 4 ranks, which
    holds positions 48 to 63, never has a label, and the others have unequal numbers."""
    return write_texts(root / "ragged", 33, 47)


@pytest.fixture(scope="module")
def expected(root, ragged, ranks):
    config = job(root, "reference", ragged, zero=0, n_layers=1)
    ranks(1)(run_all, [config], timeout=200)
    reference = curve(config)
    assert max(norm for _, norm in reference) > 1.5 > min(norm for _, norm in reference)  # some steps are clipped
    assert reference[-1][0] < reference[0][0] - 1  # and it learns
    return reference


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_stage_and_accumulation_gives_the_same_curve(mesh, root, ragged, expected, ranks):
    """Half of the product, and a quarter on 4 ranks: a stage has one micro-batch a step on every other mesh, and two on
    the others."""
    turn = MESHES.index(mesh)
    stages = STAGES if math.prod(mesh) < 4 else STAGES[turn // 2 % 2 :: 2]
    configs = [
        job(root, f"{mesh}-{zero}", ragged, mesh=mesh, zero=zero, accumulation=1 + (zero + turn) % 2, n_layers=1)
        for zero in stages
    ]
    ranks(math.prod(mesh))(run_all, configs, timeout=280)
    for config in configs:
        assert_same_curve(config, expected)


def test_every_layout_and_activation_policy_gives_the_same_curve(root, ranks):
    """On short documents, of which many share a row, so that rings have steps without keys."""
    text = write_texts(root / "short", 5, 40, n=150)
    reference = job(root, "short-reference", text)
    ranks(1)(run_all, [reference], timeout=200)
    configs = [
        job(root, f"{layout}-{policy}", text, mesh=(1, 2, 1), zero=zero, layout=layout, activations=Activations(policy))
        for layout, policy, zero in [
            ("zigzag", "recompute", 1),
            ("striped", "recompute_keep_attention", 2),
            ("balanced", "recompute_keep_attention", 3),
        ]
    ]
    configs[1].parallel.strategy = StrategyName.allgather
    ranks(2)(run_all, configs, timeout=280)
    for config in configs:
        assert_same_curve(config, curve(reference))
