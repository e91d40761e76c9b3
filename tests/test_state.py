"""The optimizer's state by parameters: what every mesh and ZeRO stage writes, and reads of each other's."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_engine import CLIP, OPTIM, STEPS, batches, build, inputs, weights
from test_manifest import saved

from ringspan.train import checkpoint
from ringspan.train.checkpoint import Checkpointer, Reader
from ringspan.train.engine import Dtype, Engine, EngineConfig
from ringspan.train.manifest import read_manifest
from ringspan.train.optim import adamw, learning_rate

CPU = torch.device("cpu")


def plain_state():
    """(kind, name) -> tensor, of AdamW in plain PyTorch on all rows."""
    model = build("cpu", torch.float32)
    optimizer = adamw(model.parameters(), OPTIM)
    for step, (tokens, labels) in enumerate(batches(), start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(OPTIM, step, STEPS)
        optimizer.zero_grad()
        (model(*inputs(tokens, labels)) / (labels >= 0).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    state = {("master", name): p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        state.update({(kind, name): optimizer.state[p][kind] for kind in ("exp_avg", "exp_avg_sq")})
    return state


def engine_at(zero, dtype="fp32", accumulation=1):
    return Engine(build, EngineConfig(zero=zero, clip=CLIP, dtype=Dtype(dtype)), OPTIM, accumulation, CPU)


def train(engine, accumulation=1):
    rank, world = dist.get_rank(), dist.get_world_size()
    for step, (tokens, labels) in enumerate(batches(), start=1):
        mine = [x.chunk(world)[rank].chunk(accumulation) for x in (tokens, labels)]
        for number, part in enumerate(zip(*mine, strict=True), start=1):
            engine.backward(engine.loss_sum(*inputs(*part)), (labels >= 0).sum(), last=number == accumulation)
        engine.step(learning_rate(OPTIM, step, STEPS))


def write(engine, run_dir):
    checkpoints = Checkpointer(run_dir)
    checkpoints.begin(engine.state, CPU, saved(STEPS))
    assert checkpoints.wait() is None
    checkpoints.close()
    return str(Path(run_dir, "checkpoints", f"step-{STEPS:08d}"))


def train_and_write(zero, dtype, run_dir, accumulation=1):
    engine = engine_at(zero, dtype, accumulation)
    train(engine, accumulation)
    return write(engine, run_dir), weights(engine)


def load_and_write(zero, dtype, folder, run_dir, accumulation=1):
    engine = engine_at(zero, dtype, accumulation)
    checkpoint.load(engine.state, Path(folder), CPU)
    return write(engine, run_dir), weights(engine)


def all_of(folder):
    told = read_manifest(Path(folder))
    reader = Reader(Path(folder), told)
    size = {name: torch.Size(shape).numel() for name, shape in told.parameters.items()}
    return {
        (kind, name): reader.read(kind, name, 0, size[name]).view(shape)
        for kind in told.kinds
        for name, shape in told.parameters.items()
    }, told


ROUTES = [  # (ZeRO stage, ranks) in turn
    [(0, 2), (3, 4), (1, 1), (2, 2)],
    [(1, 4), (0, 1), (2, 4), (3, 2)],
    [(3, 2), (2, 1), (0, 4), (1, 2)],
]


@pytest.mark.parametrize("route", ROUTES)
def test_every_stage_and_mesh_writes_plain_pytorch_s_state_and_reads_the_others(route, tmp_path, ranks):
    (zero, world), *others = route
    folder, _ = ranks(world)(train_and_write, zero, "fp32", str(tmp_path / "first"), timeout=200)[0]
    first, told = all_of(folder)
    assert told.scalars == {"step": STEPS}
    assert len(told.files) == world
    expected = plain_state()
    assert set(first) == set(expected)
    for key, value in first.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6, msg=str(key))
    for stop, (stage, size) in enumerate(others):
        run_dir = str(tmp_path / str(stop))
        folder, model = ranks(size)(load_and_write, stage, "fp32", folder, run_dir, timeout=200)[size - 1]
        again, told = all_of(folder)
        assert told.scalars == {"step": STEPS}
        for key, value in again.items():
            assert torch.equal(value, first[key]), key  # nothing is computed: to the bit
        for name, value in model.items():
            assert torch.equal(value, first["master", name]), name


@pytest.mark.parametrize(("zero", "accumulation"), [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)])
def test_bf16_weights_are_those_of_the_fp32_ones(zero, accumulation, tmp_path, ranks):
    folder, before = ranks(2)(train_and_write, zero, "bf16", str(tmp_path / "a"), accumulation, timeout=200)[0]
    masters, _ = all_of(folder)
    assert all(torch.equal(before[name], masters["master", name].bfloat16()) for name in before)
    assert any(not torch.equal(before[name].float(), masters["master", name]) for name in before)
    other = {1: 3, 2: 1, 3: 2}[zero]
    again, model = ranks(1)(load_and_write, other, "bf16", folder, str(tmp_path / "b"), accumulation, timeout=200)[0]
    assert all(torch.equal(model[name], before[name]) for name in before)
    assert all(torch.equal(value, masters[key]) for key, value in all_of(again)[0].items())


def load_into_another_model(folder):
    engine = Engine(lambda *at: build(*at, tied=True), EngineConfig(), OPTIM, 1, CPU)
    try:
        checkpoint.load(engine.state, Path(folder), CPU)
    except ValueError as error:
        return str(error)


def test_a_checkpoint_of_another_model_is_refused(tmp_path, ranks):
    folder, _ = ranks(1)(train_and_write, 1, "fp32", str(tmp_path))[0]
    assert (
        "is of another model: it has ['head.weight [40, 16]'], and this one []"
        in ranks(1)(load_into_another_model, folder)[0]
    )
