import functools
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from ringspan.kernels.attention import attention
from ringspan.kernels.spans import Spans
from ringspan.train.activations import Activations, Policy
from ringspan.train.engine import Dtype, Engine, EngineConfig, deepspeed_settings, import_deepspeed
from ringspan.train.model import GPT, ModelConfig
from ringspan.train.optim import OptimConfig, adamw, learning_rate

VOCABULARY, ROWS, TOKENS, STEPS = 40, 4, 12, 5
# eps is large, so that the gradient's size matters, as Adam else makes nothing of it
OPTIM = OptimConfig(lr=1e-2, eps=1e-2, warmup_steps=2, weight_decay=0.5)
CLIP = 0.4


def build(device, dtype, activations=Activations.keep, tied=False):
    config = ModelConfig(dim=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, mlp_dim=24, tie_embeddings=tied)
    return GPT(config, VOCABULARY, attention, Policy(activations=activations), device=device, dtype=dtype)


def batches():
    """(tokens, labels) of each step; the first half of the rows has few labels, the first row none."""
    g = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        tokens, labels = torch.randint(VOCABULARY, (2, ROWS, TOKENS), generator=g)
        labels[: ROWS // 2][torch.rand(ROWS // 2, TOKENS, generator=g) < 0.6] = -100
        labels[0] = -100
        yield tokens, labels


def inputs(tokens, labels):
    return tokens, labels, torch.arange(TOKENS).expand(len(tokens), -1), Spans.causal(TOKENS)


def plain_training(tied):
    """[(loss, gradient norm)] of AdamW and clipping in plain PyTorch on all rows, and the weights."""
    model = build("cpu", torch.float32, tied=tied)
    optimizer, curve = adamw(model.parameters(), OPTIM), []
    for step, (tokens, labels) in enumerate(batches(), start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(OPTIM, step, STEPS)
        loss = model(*inputs(tokens, labels)) / (labels >= 0).sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        curve.append((loss.item(), norm.item()))
    return curve, {name: p.detach() for name, p in model.named_parameters()}


def train(zero, accumulation, dtype, activations, tied, **offloaded):
    """On a rank: the same by the engine, each rank on its rows."""
    rank, world = dist.get_rank(), dist.get_world_size()
    config = EngineConfig(zero=zero, clip=CLIP, dtype=Dtype(dtype), **offloaded)
    engine = Engine(lambda *at: build(*at, activations, tied), config, OPTIM, accumulation, torch.device("cpu"))
    curve = []
    for step, (tokens, labels) in enumerate(batches(), start=1):
        total = torch.zeros(())
        mine = [x.chunk(world)[rank].chunk(accumulation) for x in (tokens, labels)]
        for number, part in enumerate(zip(*mine, strict=True), start=1):
            loss = engine.loss_sum(*inputs(*part))
            engine.backward(loss, (labels >= 0).sum(), last=number == accumulation)
            total += loss.detach()
        norm = engine.step(learning_rate(OPTIM, step, STEPS))
        dist.all_reduce(total)
        curve.append((total.item() / (labels >= 0).sum().item(), norm))
    return curve, weights(engine)


def weights(engine):
    deepspeed = import_deepspeed(torch.device("cpu"))
    with deepspeed.zero.GatheredParameters(list(engine.deepspeed.module.parameters()), enabled=engine.zero == 3):
        return {name: p.detach().clone() for name, p in engine.deepspeed.module.named_parameters()}


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_every_stage_is_plain_pytorch(zero, ranks):
    tied, accumulation = zero in (1, 3), 2 if zero in (0, 3) else 1
    activations = Activations.recompute_keep_attention if zero >= 2 else Activations.recompute
    curve, expected = plain_training(tied)
    results = ranks(2)(train, zero, accumulation, "fp32", activations, tied, timeout=200)
    assert max(norm for _, norm in curve) > CLIP
    for got, end in results:
        assert got == [pytest.approx(step, rel=1e-5) for step in curve]  # fp32: sums in another order
        for name, value in end.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)


OPTIMIZER, BOTH = {"offload_optimizer": True}, {"offload_optimizer": True, "offload_parameters": True}


@pytest.mark.parametrize(
    ("zero", "dtype", "offloaded"), [(1, "bf16", OPTIMIZER), (2, "fp32", OPTIMIZER), (3, "fp32", BOTH)]
)
def test_updates_on_the_host_are_those_on_the_device(zero, dtype, offloaded, ranks):
    for accumulation in (1, 2):
        results = [
            ranks(2)(functools.partial(train, **where), zero, accumulation, dtype, Activations.keep, False, timeout=200)
            for where in (offloaded, {})
        ]
        for (there, end), (here, expected) in zip(*results, strict=True):
            # the same fp32 update of the same gradients, but for sums over parameters in another order
            assert there == [pytest.approx(step, rel=1e-5 if dtype == "fp32" else 1e-2) for step in here]
            for name, value in end.items():
                eps = torch.finfo(value.dtype).eps
                torch.testing.assert_close(value, expected[name], rtol=8 * eps, atol=8 * eps * 0.1, msg=name)


def resumed(zero, offloaded):
    """Norm and weights of a third step, gone on with: in the same engine, and in one that offloads nothing."""
    steps = list(batches())[:3]
    engine = Engine(build, EngineConfig(zero=zero, **offloaded), OPTIM, 1, torch.device("cpu"))

    def step(engine, tokens, labels):
        engine.backward(engine.loss_sum(*inputs(tokens, labels)), (labels >= 0).sum(), last=True)
        return engine.step(1e-2)

    for one in steps[:2]:
        step(engine, *one)
    saved = {(kind, name): x.clone() for kind, name, _, x in engine.state.to_save()}
    other = Engine(build, EngineConfig(zero=1), OPTIM, 1, torch.device("cpu"))
    source = SimpleNamespace(read=lambda kind, name, start, stop: saved[kind, name][start:stop])
    other.state.restore(source, {kind for kind, _ in saved}, engine.state.scalars())
    back = Engine(build, EngineConfig(zero=zero, **offloaded), OPTIM, 1, torch.device("cpu"))
    back.state.restore(source, {kind for kind, _ in saved}, engine.state.scalars())
    return [(step(one, *steps[2]), weights(one)) for one in (engine, other, back)]


@pytest.mark.parametrize(("zero", "offloaded"), [(2, OPTIMIZER), (3, BOTH)])
def test_state_on_the_host_is_written_and_read_as_any_other(zero, offloaded, ranks):
    ((norm, expected), *others) = ranks(1)(resumed, zero, offloaded, timeout=200)[0]
    for again, found in others:
        assert again == pytest.approx(norm, rel=1e-6)
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7, msg=name)


def test_bf16_follows_fp32_at_every_stage(ranks):
    curve, _ = plain_training(False)
    for zero in (1, 2, 3):
        got, end = ranks(2)(train, zero, 1, "bf16", Activations.keep, False, timeout=200)[0]
        assert end["head.weight"].dtype == torch.bfloat16
        # a loss near ln 40 = 3.7 from logits of size 0.1, and gradients of many bf16 terms
        assert got == [pytest.approx(step, rel=16 * torch.finfo(torch.bfloat16).eps) for step in curve]


def gradients(zero, steps):
    """What the optimizer is given for the micro-batches of each step, by (parameter, first element): the first moment
    is half of it, and half of the one before. A rate of 0 leaves the weights as they are."""
    g, rank = torch.Generator().manual_seed(5), dist.get_rank()
    tokens, labels = torch.randint(VOCABULARY, (2, 16, TOKENS), generator=g)
    config = EngineConfig(zero=zero, dtype=Dtype.bf16, clip=0.0)
    engine = Engine(build, config, OptimConfig(beta1=0.5), 8, torch.device("cpu"))  # fp32 sums, also of one
    before = defaultdict(float)
    for micro_batches in steps:
        for number in micro_batches:
            loss = engine.loss_sum(*inputs(*(x[2 * number + rank, None] for x in (tokens, labels))))
            engine.backward(loss, torch.tensor(labels.numel()), last=number == micro_batches[-1])
        engine.step(0.0)
        now = {(name, at): x.double() for kind, name, at, x in engine.state.to_save() if kind == "exp_avg"}
        yield {key: 2 * moment - before[key] for key, moment in now.items()}
        before = now


def error_of_the_sum(zero):
    whole, *alone = gradients(zero, [range(8), *([number] for number in range(8))])
    exact = {key: sum(part[key] for part in alone) for key in whole}
    wrong = sum((whole[key] - exact[key]).square().sum() for key in whole)
    return (wrong / sum(x.square().sum() for x in exact.values())).sqrt().item()


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_micro_batches_in_bf16_are_summed_in_fp32(zero, ranks):
    """Against the sum in fp64 of what each gives alone."""
    for error in ranks(2)(error_of_the_sum, zero, timeout=200):
        assert error < 8 * torch.finfo(torch.float32).eps  # bf16 sums are off by 4e-3


def poisoned(zero):
    """Norms of a step with a gradient of NaN and of one with a loss of infinity; then of a good one, and that."""
    engine = Engine(build, EngineConfig(zero=zero), OPTIM, 1, torch.device("cpu"))
    tokens, labels = next(batches())
    before, bad, count = weights(engine), dist.get_rank() == 1, (labels >= 0).sum()
    norms = []
    for spoil in (lambda loss: loss * math.nan, lambda loss: loss + math.inf):
        loss = engine.loss_sum(*inputs(tokens, labels))
        engine.backward(spoil(loss) if bad else loss, count, last=True)
        norms.append(engine.step(1e-2))
    unchanged = all(torch.equal(value, before[name]) for name, value in weights(engine).items())
    engine.backward(engine.loss_sum(*inputs(tokens, labels)), count, last=True)
    plain = build("cpu", torch.float32)
    (dist.get_world_size() * plain(*inputs(tokens, labels)) / count).backward()  # every rank has all rows here
    expected = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()]).item()
    return norms, unchanged, engine.step(1e-2), expected


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_loss_or_gradient_that_is_not_finite_changes_no_weight_and_no_later_step(zero, ranks):
    for norms, unchanged, good, expected in ranks(2)(poisoned, zero, timeout=200):
        assert not any(math.isfinite(norm) for norm in norms)
        assert unchanged
        assert good == pytest.approx(expected, rel=1e-5)


def shards():
    linear = F.linear
    engine = Engine(build, EngineConfig(zero=3), OPTIM, 1, torch.device("cpu"))
    sizes = {
        name: (p.numel(), p.ds_numel, p.ds_tensor.numel(), p.ds_persist)
        for name, p in engine.deepspeed.module.named_parameters()
    }
    return sizes, engine.parameters, F.linear is linear


def test_zero_3_shards_every_matrix_as_it_is_drawn_and_leaves_torch_alone(ranks):
    total = sum(p.numel() for p in build("cpu", torch.float32).parameters())
    for sizes, parameters, untouched in ranks(2)(shards, timeout=200):
        assert untouched
        assert parameters == total == sum(whole for _, whole, _, _ in sizes.values())
        for name, (here, whole, shard, stays_whole) in sizes.items():
            assert (here, shard) == (0, whole // 2), name
            assert stays_whole == ("norm" in name), name  # once gathered: it would not pay to gather a norm each time


def test_settings_leave_nothing_to_deepspeeds_defaults():
    settings = deepspeed_settings(EngineConfig(clip=0, zero=2), torch.bfloat16, accumulation=3)
    assert settings["gradient_clipping"] == 0
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["bf16"] == {"enabled": True}
    assert settings["zero_optimization"]["stage"] == 2
    assert not {"sequence_parallel_size", "data_parallel_size", "mesh_param"} & set(settings)


def test_dtype_is_picked_by_the_device():
    assert EngineConfig().resolve("cuda") is torch.bfloat16
    assert EngineConfig().resolve("cpu") is torch.float32
    assert EngineConfig(zero=0).resolve("cpu") is torch.float32
    assert EngineConfig(dtype=Dtype.bf16).resolve("cpu") is torch.bfloat16


def test_what_deepspeed_gets_wrong_is_refused():
    with pytest.raises(ValueError, match=r"engine\.zero=0 with bf16 is wrong in DeepSpeed: use engine\.zero=1"):
        EngineConfig(zero=0, dtype=Dtype.bf16)
    with pytest.raises(ValueError, match=r"engine\.zero=0 with bf16"):
        EngineConfig(zero=0).resolve("cuda")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EngineConfig(zero=4), r"engine\.zero=4: must be 0, 1, 2 or 3"),
        (lambda: EngineConfig(clip=-1), r"engine\.clip=-1: must be 0"),
        (lambda: EngineConfig(zero=0, offload_optimizer=True), r"engine\.offload_optimizer=true: needs engine\.zero=1"),
        (lambda: EngineConfig(offload_parameters=True), r"engine\.offload_parameters=true: needs .*=3, and it is 1"),
        (lambda: OptimConfig(lr=0), r"optim\.lr=0: must be above 0"),
        (lambda: OptimConfig(beta2=1), r"optim\.beta2=1: must be 0 or more and below 1"),
        (lambda: OptimConfig(min_lr=1.5), r"optim\.min_lr=1\.5: .* from 0 to 1"),
        (lambda: OptimConfig(warmup_steps=-1), r"optim\.warmup_steps=-1: must be 0 or more"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_learning_rate_rises_linearly_and_falls_by_a_cosine():
    config = OptimConfig(lr=2.0, warmup_steps=4, min_lr=0.25)
    rates = [learning_rate(config, step, 12) for step in range(1, 13)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[7] == pytest.approx((2.0 + 0.5) / 2)  # half way from step 4 to 12
    assert rates[-1] == 0.5
    assert learning_rate(OptimConfig(lr=2.0, warmup_steps=0, min_lr=0.0), 10, 10) == 0
    assert learning_rate(OptimConfig(lr=2.0, warmup_steps=5), 3, 2) == pytest.approx(1.2)  # a warm-up past the end


def test_only_matrices_decay_and_every_setting_arrives():
    config = OptimConfig(lr=0.1, beta1=0.5, beta2=0.6, eps=0.7, weight_decay=0.8)
    model = build("cpu", torch.float32)
    matrices, vectors = adamw(model.parameters(), config).param_groups
    assert {p.dim() for p in matrices["params"]} == {2}
    assert {p.dim() for p in vectors["params"]} == {1}
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.8, 0.0)
    assert (matrices["lr"], matrices["betas"], matrices["eps"]) == (0.1, (0.5, 0.6), 0.7)
