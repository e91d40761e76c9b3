"""The budget beside what is really allocated on a CPU, which counts the same tensors, and beside sums made by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import exit_code
from test_loop import run
from test_parity import job as train_job
from test_parity import write_texts

from ringspan.kernels.attention import attention
from ringspan.kernels.plan import plan
from ringspan.kernels.spans import Spans
from ringspan.train.activations import Activations, Offload, Policy
from ringspan.train.budget import (
    Job,
    Machine,
    budget,
    explained,
    fastest,
    fits,
    in_words,
    job_of,
    longest,
    machine_here,
    switches,
    ways_out,
)
from ringspan.train.duration import step_seconds
from ringspan.train.engine import Engine
from ringspan.train.footprint import Live
from ringspan.train.memory import gpu_bytes, gradient_bytes, host_bytes, kept_bytes, moments, muon_bytes, state_bytes
from ringspan.train.model import GPT, ModelConfig
from ringspan.train.muon import orthogonal
from ringspan.train.optim import OptimConfig, Optimizer

ATTENTION, ALL = Activations.recompute_keep_attention, Activations.recompute
SMALL = ModelConfig(dim=128, n_layers=5, n_heads=4, n_kv_heads=2, head_dim=32, mlp_dim=352)
LARGE = ModelConfig(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, mlp_dim=14336)
H100 = Machine()


def a_job(model=SMALL, vocab_size=500, seq_len=1500, **changes):
    plain = {"micro_batch": 1, "accumulation": 1, "data": 1, "ring": 1, "ulysses": 1, "zero": 1, "element": 2}
    off = {"policy": Policy(compiler="inductor"), "offload_optimizer": False, "offload_parameters": False}
    return Job(model=model, vocab_size=vocab_size, seq_len=seq_len, **(plain | off | changes))


@pytest.mark.parametrize(
    "policy",
    [
        Policy(),
        Policy(mlp_tile=256),
        Policy(activations=ATTENTION),
        Policy(activations=ALL),
        Policy(activations=ATTENTION, mlp_tile=256),
        Policy(activations=ATTENTION, recompute_layers=2, mlp_tile=256),
        Policy(activations=ALL, recompute_layers=5),
    ],
    ids=lambda p: f"{p.activations.value}-{p.recompute_layers}-{p.mlp_tile}",
)
def test_predicts_what_is_allocated(policy):
    n, vocabulary = 1100, 300
    gpt = GPT(SMALL, vocabulary, attention, policy)
    tokens, positions, mask = (
        torch.randint(vocabulary, (2, 1, n)),
        torch.arange(n)[None],
        plan(Spans.causal(n, window=8), n),
    )
    job = a_job(vocab_size=vocabulary, seq_len=n, zero=0, element=4, policy=policy)
    with Live([*gpt.parameters(), tokens, positions]) as live:
        loss = gpt(*tokens, positions, mask)
        kept = live.now
        forward, live.most = live.most, 0
        loss.backward()
    # Besides what layers keep there are x of the last norm and what its gradient needs, and the loss's two gradients
    rest = 4 * (3 * n * SMALL.dim + vocabulary * SMALL.dim + 2 * n * SMALL.head_dim)
    assert kept == pytest.approx(kept_bytes(job) + rest, rel=0.01)
    predicted = {when: sum(parts.values()) - sum(state_bytes(job).values()) for when, parts in moments(job).items()}
    assert max(predicted["last layer"], predicted["first layer"]) == pytest.approx(live.most, rel=0.06)
    assert predicted["loss"] == pytest.approx(forward, rel=0.15) or forward < live.most


def test_states_and_gradients_by_hand():
    n = SMALL.parameters(500)
    assert n == a_job().parameters == 5 * 128 * (12 * 32 + 3 * 352) + 2 * 500 * 128
    assert state_bytes(a_job()) == {"parameters": 2 * n, "optimizer": 12 * n}
    assert state_bytes(a_job(data=4)) == {"parameters": 2 * n, "optimizer": 3 * n}
    assert state_bytes(a_job(ring=2, ulysses=2, offload_optimizer=True)) == {"parameters": 2 * n, "optimizer": 0}
    assert state_bytes(a_job(zero=0, element=4)) == {"parameters": 4 * n, "optimizer": 8 * n}
    sharded = state_bytes(a_job(LARGE, 128_256, data=8, zero=3))
    assert sharded["parameters"] < 0.25 * state_bytes(a_job(LARGE, 128_256, data=8))["parameters"]
    bucket = 2 * 10**8 + 4 * n
    assert gradient_bytes(a_job(data=2)) == (2 * n, bucket, 2 * n + 6 * n / 2)
    assert gradient_bytes(a_job(data=2, zero=2)) == (n + bucket, 0, n + 6 * n / 2)
    assert gradient_bytes(a_job(accumulation=2))[0] == 6 * n
    offloaded = a_job(offload_optimizer=True, data=2, policy=Policy(offload=Offload.cpu))
    assert host_bytes(offloaded) == {"activations": kept_bytes(offloaded), "optimizer": 9 * n, "parameters": 0}


def test_muon_keeps_one_moment_and_its_products_take_time():
    hidden = 5 * 128 * (12 * 32 + 3 * 352)
    adamw, muon = (a_job(data=2, muon=wanted) for wanted in (False, True))
    assert state_bytes(adamw)["optimizer"] - state_bytes(muon)["optimizer"] == 4 * hidden / 2
    assert state_bytes(a_job(muon=True, zero=0, element=4))["optimizer"] == 8 * adamw.parameters - 4 * hidden
    away = [host_bytes(replace(job, offload_optimizer=True))["optimizer"] for job in (adamw, muon)]
    assert away[0] - away[1] == 4 * hidden / 2
    large = a_job(LARGE, 128_256, muon=True)
    n, seconds = large.layer_parameters * 32, step_seconds(large, H100)["update"]
    without = step_seconds(replace(large, muon=False), H100)["update"]
    # Queries and out; keys and values; gate, value and out: in each iteration two products with the matrix, one without
    flops = 32 * 10 * (2 * 3 * 4096**3 + 2 * (2 * 1024**2 * 4096 + 1024**3) + 3 * (2 * 4096**2 * 14336 + 4096**3))
    assert seconds - without == pytest.approx(flops / (0.7 * 650e12) + 16 * n / 2.6e12)
    shared = [step_seconds(replace(large, data=8, zero=zero), H100)["update"] for zero in (1, 3)]
    assert shared[0] == pytest.approx(seconds / 8)
    assert shared[1] - shared[0] == pytest.approx(4 * n / 8 / 364e9)


def test_predicts_what_making_a_matrix_orthogonal_allocates():
    momentum = torch.randn(352, 128)
    with Live([momentum]) as live:
        orthogonal(momentum)
    expected = muon_bytes(a_job(muon=True, element=4)) - 4 * momentum.numel()
    assert live.most == pytest.approx(expected, rel=0.01)
    assert gpu_bytes(a_job(LARGE, seq_len=8, muon=True))["muon"] > 4 * 4096 * 14336
    assert muon_bytes(a_job(muon=True, zero=3, data=2)) - muon_bytes(a_job(muon=True)) == 2 * 128 * 352


def test_memory_grows_with_length_and_no_faster():
    """Of what lives on between steps nothing grows."""
    for policy in (Policy(), Policy(activations=ALL, mlp_tile=4096), Policy(offload=Offload.cpu)):
        job = a_job(LARGE, 128_256, 2**18, policy=policy)
        fixed = sum(state_bytes(job).values())
        once, twice = (sum(gpu_bytes(replace(job, seq_len=n)).values()) - fixed for n in (2**18, 2**19))
        assert 1.5 * once < twice <= 2.02 * once


def test_without_compiling_a_step_takes_what_was_measured():
    """1.75 s on 2 H200, ring=2, in steps 4 to 40."""
    one_billion = ModelConfig(dim=2048, n_layers=16, n_heads=16, n_kv_heads=8, head_dim=128, mlp_dim=8192)
    job = a_job(one_billion, 320, 65536, ring=2, policy=Policy())
    assert sum(step_seconds(job, H100).values()) == pytest.approx(1.75, rel=0.1)


def test_seconds_are_work_over_rates():
    """Of one GPU without a loss to speak of, and rates so unlike that each part is seen."""
    job = a_job(LARGE, 64, 8192)
    found = step_seconds(job, H100)
    pairs, flops = 8192 * 8193 / 2, 2 * job.layer_parameters * 32 * 8192
    assert found["attention"] == pytest.approx(4 * 4096 * pairs * 32 * (1 / 690e12 + 2.5 / 615e12))
    assert found["matrices"] == pytest.approx(3 * flops / 650e12)
    assert found["ring"] == found["offload"] == found["gradients"] == 0
    again = step_seconds(replace(job, policy=Policy(activations=ALL)), H100)
    assert again["attention"] - found["attention"] == pytest.approx(4 * 4096 * pairs * 32 / 690e12)
    assert 1 < again["matrices"] / found["matrices"] < 4 / 3
    assert step_seconds(replace(job, policy=Policy(activations=ATTENTION)), H100)["attention"] == found["attention"]
    plain = step_seconds(replace(job, policy=Policy(compiler=None)), H100)
    assert {name for name in plain if plain[name] != found[name]} == {"elementwise"}
    tiled = step_seconds(replace(job, policy=Policy(compiler="inductor", mlp_tile=1024)), H100)
    summed = tiled["elementwise"] - found["elementwise"]  # 8 tiles, 12 bytes a weight each
    assert summed == pytest.approx(8 * 12 * job.layer_parameters * 32 / 2.6e12)
    both = step_seconds(replace(job, accumulation=3), H100)
    assert both["matrices"] == pytest.approx(3 * found["matrices"])
    assert both["update"] == found["update"]
    halved = step_seconds(replace(job, ring=2), H100)
    assert halved["matrices"] == pytest.approx(found["matrices"] / 2)
    assert halved["attention"] == pytest.approx(found["attention"] / 2)
    assert halved["ring"] > 0
    slow = replace(H100, copy_gb_s=1.0)
    assert step_seconds(replace(job, policy=Policy(offload=Offload.cpu)), slow)["offload"] > 0
    # Utilisation counts 6 a parameter and 12 a pair, and no recomputation
    one = budget(job, H100)
    counted = 3 * flops + 6 * 64 * 4096 * 8192 + 12 * 32 * 4096 * pairs
    assert one.utilisation == pytest.approx(counted / one.seconds_a_step / 989e12, rel=1e-6)
    assert one.tokens_per_second == pytest.approx(8192 / one.seconds_a_step)
    short = budget(replace(job, document=512), H100)
    assert short.seconds["attention"] == pytest.approx(one.seconds["attention"] / 16, rel=0.01)


def test_picks_fit_and_nothing_better_does():
    job, machine = a_job(LARGE, 128_256, 131_072, ring=2), Machine(gpus=2, host_memory_gib=256)
    assert not fits(job, machine)
    quick = fastest(job, machine)
    assert fits(quick, machine)
    assert (quick.seq_len, quick.world) == (job.seq_len, 2)
    row = longest(job, machine)
    assert fits(row, machine)
    assert row.data == 1
    assert row.seq_len > 4 * job.seq_len
    assert not fits(replace(row, seq_len=row.seq_len + 40_960), machine)
    assert set(switches(row, job)) >= {"seq_len", "engine.zero"}
    assert longest(job, Machine(gpu_memory_gib=2)) is None
    ways = ways_out(job, machine)
    assert 1 <= len(ways) <= 3
    assert all(then.fits and "=" in fields for fields, then in ways)
    assert ways[0][1].tokens_per_second >= ways[-1][1].tokens_per_second


def test_what_does_not_fit_is_told_before_and_after():
    job = a_job(LARGE, 128_256, 131_072, ring=2)
    assert in_words(a_job(), H100).startswith("0.")
    told = in_words(job, H100)
    assert "WARNING: this run needs 2" in told
    assert "activations 184" in told
    assert "train.activations=recompute" in told
    said = (
        r"step 7: out of GPU memory, 2.00 GiB more were asked for; the budget is 2\d\d.* of 75.0 GiB: activations 184"
    )
    with pytest.raises(ValueError, match=said), explained(job, H100, lambda: "step 7"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 79")
    too_long, machine = replace(job, ring=1, seq_len=2**24), replace(H100, host_memory_gib=200)
    assert "no policy fits: use more GPUs, or seq_len=" in in_words(too_long, machine)
    here = machine_here(torch.device("cpu"), 2)
    assert here.host_memory_gib == 2 * here.gpu_memory_gib > 0


def run_out(config):
    """On a rank: a run whose second step asks for too much."""
    forward, calls = Engine.loss_sum, []

    def loss_sum(self, *inputs):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has ...")
        return forward(self, *inputs)

    Engine.loss_sum = loss_sum
    try:
        return run(config)
    finally:
        Engine.loss_sum = forward


def test_a_run_tells_its_memory_and_what_it_wanted(ranks, tmp_path):
    config = train_job(tmp_path, "run", write_texts(tmp_path / "text", 5, 90), mesh=(1, 2, 1), steps=3)
    told = ranks(2)(run_out, config)[0]
    assert told.startswith("step 2: out of GPU memory, 3.00 GiB more were asked for; the budget is")
    assert "gradients" in told
    facts = json.loads(Path(config.run_dir, "run.json").read_text())
    assert " GiB: " in facts["memory"]


def script(capsys, *arguments):
    """(exit code, what was printed, what went wrong)"""
    return (exit_code("budget.py", *arguments), *capsys.readouterr())


@pytest.mark.parametrize("name", sorted(set(vars(H100)) - {"name"}))
def test_every_figure_of_a_machine_counts(name):
    one = a_job(LARGE, 128_256, 2**20, ring=16, policy=Policy(offload=Offload.cpu), offload_optimizer=True)
    within = a_job(LARGE, 128_256, 2**17, ring=2)
    other = replace(H100, **{name: 0.5 if name == "unused" else type(getattr(H100, name))(3 * getattr(H100, name))})
    assert [budget(job, other) for job in (one, within)] != [budget(job, H100) for job in (one, within)]


@pytest.mark.parametrize("name", ["memory_gb_s", "attention_tflops", "gpus"])
def test_a_rate_of_nothing_is_refused(name):
    with pytest.raises(ValueError, match=rf"machine\.{name}=0: must be above 0"):
        Machine(**{name: 0})


def test_the_command(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = script(capsys, "model=llama8b", "nproc=2", "seq_len=131072", "vocab_size=128256")
    assert code == 0, err
    assert "2 x h100, rows of 131,072 tokens, 8.03 G parameters" in out
    assert "does not fit; what fits: train." in out
    code, out, _ = script(capsys, "model=llama8b", "nproc=2", "vocab_size=128256", "longest=true")
    assert code == 0
    assert "picked: train.activations=" in out
    assert out.endswith("fits\n")
    _, slow, _ = script(capsys, "machine=cpu", "model=tiny", "seq_len=1024", "nproc=0")
    _, packed, _ = script(capsys, "machine=h200", "model=tiny", "document=64", "fastest=true")
    assert slow.startswith("2 x cpu")
    assert packed.startswith("1 x h200")
    for arguments, said in (
        (("longest=true", "fastest=true"), "longest=true with fastest=true"),
        (("machine.unused=2",), "machine.unused=2"),
        (("machine.gpu_gib=2",), "machine.gpu_gib: there is no such key; did you mean machine.gpu_memory_gib?"),
        (("vocab_size=-1",), "vocab_size=-1"),
        (("machine.gpu_memory_gib=1.5", "fastest=true"), "no mesh and policy fits 1 GPUs"),
    ):
        code, _, err = script(capsys, *arguments)
        assert code == 1, arguments
        assert said in err
    assert not list(tmp_path.iterdir())


def test_a_job_is_what_the_configuration_says(tmp_path):
    config = train_job(tmp_path, "run", "", mesh=(1, 2, 2))
    job = job_of(config, 4, 512)
    sizes = config.parallel.sizes(4)
    assert (job.data, job.ring, job.ulysses, job.vocab_size) == (*sizes, 512)
    assert job.tokens == config.train.micro_batch * -(-config.seq_len // (job.ring * job.ulysses))
    assert job.policy == config.train.policy("cuda")
    assert not job.muon
    assert job_of(replace(config, optim=OptimConfig(name=Optimizer.muon)), 4, 512).muon
