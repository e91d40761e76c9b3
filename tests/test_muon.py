"""Muon on the shards of every ZeRO stage, against the same in fp64 on whole matrices, by singular values."""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from test_engine import CLIP, STEPS, VOCABULARY, batches, inputs, weights

from ringspan.kernels.attention import attention
from ringspan.train.engine import Dtype, Engine, EngineConfig
from ringspan.train.model import GPT, ModelConfig
from ringspan.train.muon import ITERATIONS, QUINTIC, orthogonal
from ringspan.train.optim import OptimConfig, Optimizer, adamw, learning_rate, optimizer_of

OPTIM = OptimConfig(name=Optimizer.muon, lr=1e-2, eps=1e-2, warmup_steps=2, weight_decay=0.5, momentum=0.8)
# Three layers, so that the shards of two ranks and of four cut matrices, and three of odd sizes
MODEL = ModelConfig(dim=16, n_layers=3, n_heads=2, n_kv_heads=1, head_dim=8, mlp_dim=24)
STACKED = {  # rows of the matrices in each parameter of a layer
    "attention.qkv": (16, 8, 8),
    "attention.out": (16,),
    "mlp.gate_and_value": (24, 24),
    "mlp.out": (16,),
}
HIDDEN = {f"layers.{i}.{name}.weight": rows for i in range(3) for name, rows in STACKED.items()}
STEEP = QUINTIC[0] ** ITERATIONS  # how much the smallest singular values, and mistakes in them, grow
CPU = torch.device("cpu")


def build(device, dtype):
    return GPT(MODEL, VOCABULARY, attention, device=device, dtype=dtype)


def by_singular_values(matrix):
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ s.diag() @ v


def update_of(weight, gradient, momentum, rows, lr):
    """A step of Muon in fp64, in place."""
    momentum.mul_(OPTIM.momentum).add_(gradient, alpha=1 - OPTIM.momentum)
    ahead = OPTIM.momentum * momentum + (1 - OPTIM.momentum) * gradient
    each = [0.2 * math.sqrt(max(one.shape)) * by_singular_values(one) for one in ahead.split(rows)]
    weight.mul_(1 - lr * OPTIM.weight_decay).sub_(lr * torch.cat(each))


@functools.cache
def plain_training():
    """[(loss, gradient norm)] in fp64 on all rows, and the weights."""
    model = build(CPU, torch.float64)
    hidden = {name: p for name, p in model.named_parameters() if name in HIDDEN}
    others = adamw([p for name, p in model.named_parameters() if name not in HIDDEN], OPTIM)
    momentum = {name: torch.zeros_like(p) for name, p in hidden.items()}
    curve = []
    for step, (tokens, labels) in enumerate(batches(), start=1):
        for group in others.param_groups:
            group["lr"] = learning_rate(OPTIM, step, STEPS)
        model.zero_grad()
        loss = model(*inputs(tokens, labels)) / (labels >= 0).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        others.step()
        with torch.no_grad():
            for name, p in hidden.items():
                update_of(p, p.grad, momentum[name], HIDDEN[name], learning_rate(OPTIM, step, STEPS))
        curve.append((loss.item(), norm.item()))
    return curve, {name: p.detach() for name, p in model.named_parameters()}


def train(zero, accumulation, dtype="fp32", device=CPU, **offloaded):
    """On a rank: the same by the engine, each rank on its rows."""
    rank, world = dist.get_rank(), dist.get_world_size()
    config = EngineConfig(zero=zero, clip=CLIP, dtype=Dtype(dtype), **offloaded)
    engine, curve = Engine(build, config, OPTIM, accumulation, device), []
    for step, (tokens, labels) in enumerate(batches(), start=1):
        total, count = torch.zeros((), device=device), (labels >= 0).sum().to(device)
        mine = [x.chunk(world)[rank].chunk(accumulation) for x in (tokens, labels)]
        for number, part in enumerate(zip(*mine, strict=True), start=1):
            loss = engine.loss_sum(*(x.to(device) for x in inputs(*part)))
            engine.backward(loss, count, last=number == accumulation)
            total += loss.detach()
        norm = engine.step(learning_rate(OPTIM, step, STEPS))
        dist.all_reduce(total)
        curve.append(((total / count).item(), norm))
    kept = {(kind, name) for kind, name, _, _ in engine.state.to_save()}
    return curve, {name: p.cpu() for name, p in weights(engine).items()}, kept


@pytest.mark.parametrize("shape", [(7, 7), (5, 33), (33, 5), (1, 9), (64, 48)])
def test_the_iteration_is_its_polynomial_of_the_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected, bound = by_singular_values(matrix), STEEP * torch.finfo(torch.float32).eps
    torch.testing.assert_close(orthogonal(matrix).double(), expected, rtol=0, atol=bound)
    torch.testing.assert_close(orthogonal(1e6 * matrix).double(), expected, rtol=0, atol=bound)
    assert not orthogonal(0 * matrix).any()


def test_the_definition_is_pytorch_s_own():
    """One update of torch.optim.Muon, which is in bf16, to be held to by what the other tests compare with."""
    g = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(24, 16, generator=g))
    other = torch.optim.Muon(
        [weight], lr=0.1, weight_decay=OPTIM.weight_decay, momentum=OPTIM.momentum, adjust_lr_fn="match_rms_adamw"
    )
    expected, momentum = weight.detach().double(), torch.zeros(24, 16, dtype=torch.float64)
    for _ in range(2):
        weight.grad = torch.randn(24, 16, generator=g)
        other.step()
        update_of(expected, weight.grad.double(), momentum, (24,), 0.1)
    size = 0.1 * 0.2 * math.sqrt(24)  # of an update's singular values
    torch.testing.assert_close(weight.double(), expected, rtol=0, atol=16 * torch.finfo(torch.bfloat16).eps * size)


@pytest.mark.parametrize(
    ("zero", "accumulation", "offload"),
    [(0, 2, ()), (1, 1, ()), (2, 2, ("optimizer",)), (3, 1, ()), (3, 2, ("optimizer", "parameters"))],
)
def test_every_stage_is_the_definition(zero, accumulation, offload, ranks):
    curve, expected = plain_training()
    offloaded = {f"offload_{what}": True for what in offload}
    results = ranks(2)(functools.partial(train, **offloaded), zero, accumulation, timeout=200)
    assert max(norm for _, norm in curve) > CLIP
    # fp32 gradients, whose error grows where a matrix's singular values are small, in updates of 0.2 lr sqrt(24)
    bound = STEPS * OPTIM.lr * 0.2 * math.sqrt(24) * STEEP * 8 * torch.finfo(torch.float32).eps
    for got, end, _ in results:
        assert got == [pytest.approx(step, rel=1e-4) for step in curve]
        for name, value in end.items():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=bound, msg=name)


def test_bf16_follows_and_each_parameter_has_its_optimizer_s_state(ranks):
    curve, _ = plain_training()
    kinds = {True: {"master", "momentum_buffer"}, False: {"master", "exp_avg", "exp_avg_sq"}}
    results = ranks(2)(train, 1, 2, "bf16", timeout=200)
    for got, _, _ in results:
        assert got == [pytest.approx(step, rel=16 * torch.finfo(torch.bfloat16).eps) for step in curve]
    found = {(name, kind) for _, _, kept in results for kind, name in kept}
    assert found == {(name, kind) for name, _ in found for kind in kinds[name in HIDDEN]}


def third_step(engine):
    rank, world = dist.get_rank(), dist.get_world_size()
    for tokens, labels in list(batches())[2:3]:
        mine = inputs(*(x.chunk(world)[rank] for x in (tokens, labels)))
        engine.backward(engine.loss_sum(*mine), (labels >= 0).sum(), last=True)
        engine.step(1e-2)
    return weights(engine)


def begun(zero):
    """On a rank: its pieces of the state after two steps, what is kept once, and the weights after a third."""
    engine = Engine(build, EngineConfig(zero=zero), OPTIM, 1, CPU)
    for _ in range(2):
        third_step(engine)
    pieces = [(kind, name, at, x.clone()) for kind, name, at, x in engine.state.to_save()]
    return pieces, engine.state.scalars(), third_step(engine)


def gone_on(zero, whole, scalars):
    engine = Engine(build, EngineConfig(zero=zero), OPTIM, 1, CPU)
    source = SimpleNamespace(read=lambda kind, name, start, stop: whole[kind, name][start:stop])
    engine.state.restore(source, {kind for kind, _ in whole}, scalars)
    return third_step(engine)


@pytest.mark.parametrize(("zero", "other"), [(1, 3), (3, 0)])
def test_going_on_gives_the_same_bits_and_on_other_ranks_and_stages_the_same_weights(zero, other, ranks):
    results, whole = ranks(2)(begun, zero, timeout=200), {}
    _, scalars, expected = results[0]
    for pieces, _, _ in results:  # in the order of ranks, which is that of the elements
        for kind, name, _, x in pieces:
            whole[kind, name] = torch.cat([whole.get((kind, name), x[:0]), x])
    again = ranks(2)(gone_on, zero, whole, scalars, timeout=200)[1]
    elsewhere = ranks(1)(gone_on, other, whole, scalars, timeout=200)[0]
    for name, value in expected.items():
        assert torch.equal(again[name], value), name
        torch.testing.assert_close(elsewhere[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_the_matrices_of_layers_are_muon_s_and_the_rest_adamw_s():
    model = build(CPU, torch.float32)
    names = {p: name for name, p in model.named_parameters()}
    matrices, vectors, hidden = optimizer_of(model, OPTIM, CPU).param_groups
    assert {names[p] for p in matrices["params"]} == {"embedding.weight", "head.weight"}
    assert all("norm" in names[p] for p in vectors["params"])
    assert {names[p] for p in hidden["params"]} == set(HIDDEN)
    assert [group["weight_decay"] for group in (matrices, vectors, hidden)] == [0.5, 0.0, 0.5]
    for name, shapes in model.matrices().items():
        assert tuple(rows for rows, _ in shapes) == HIDDEN[name], name
        assert {columns for _, columns in shapes} == {dict(model.named_parameters())[name].shape[1]}
    with pytest.raises(ValueError, match=r"optim\.momentum=1: must be 0 or more and below 1"):
        OptimConfig(momentum=1)


@pytest.mark.gpu
@pytest.mark.parametrize(("zero", "offload"), [(1, False), (2, True), (3, True)])
def test_on_a_gpu_in_bf16(zero, offload, ranks):
    curve, _ = plain_training()
    on_gpu = functools.partial(train, device=torch.device("cuda", 0), offload_optimizer=offload)
    ((got, _, _),) = ranks(1, cuda=True)(on_gpu, zero, 1, "bf16", timeout=200)
    assert got == [pytest.approx(step, rel=16 * torch.finfo(torch.bfloat16).eps) for step in curve]
