"""The budget of model=hf beside what Transformers' layers really allocate on a CPU, and beside sums made by hand."""

from dataclasses import replace

import pytest
import torch
from commands import exit_code
from test_budget import SMALL, a_job

from ringspan.kernels.attention import attention
from ringspan.kernels.plan import plan
from ringspan.kernels.spans import Spans
from ringspan.train.activations import Activations, Policy
from ringspan.train.budget import Machine, gpu_bytes, policies
from ringspan.train.duration import step_seconds
from ringspan.train.footprint import Live
from ringspan.train.huggingface_config import HuggingFaceConfig
from ringspan.train.memory import gradient_bytes, host_bytes, kept_bytes, layer_bytes, loss_bytes, moments, state_bytes
from ringspan.train.metrics import GIB

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

from test_huggingface_model import folder_of  # noqa: E402

from ringspan.train import huggingface_model  # noqa: E402

WIDE = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 5, "head_dim": 32}
KEEP, RECOMPUTE = Policy(), Policy(activations=Activations.recompute)


@pytest.mark.parametrize(
    "kind, fields, lora, policy, off",
    [
        ("Llama", {}, None, KEEP, 0.05),
        ("Llama", {}, 4, RECOMPUTE, 0.12),
        ("Mixtral", {"num_local_experts": 4}, 4, KEEP, 0.12),  # seen in bf16, whose sums are fp32's here
    ],
)
def test_predicts_what_is_allocated(kind, fields, lora, policy, off, tmp_path):
    n, config = 600, HuggingFaceConfig(path=folder_of(kind, tmp_path, **WIDE, **fields), pretrained=False, lora=lora)
    inner = huggingface_model.loaded(config, 0).train()
    if policy is RECOMPUTE:
        huggingface_model.recomputing(inner)
    model = huggingface_model.CausalModel(inner, 0.0)
    tokens, positions = torch.randint(300, (2, 1, n)), torch.arange(n)[None]
    mask = plan(Spans.causal(n, window=8), n)
    with Live([*model.parameters(), *model.buffers(), *tokens, positions]) as live:
        loss = model(*tokens, positions, lambda q, k, v, **_: attention(q, k, v, mask))
        live.most = live.now
        loss.backward()
    job = a_job(config, 300, n, zero=0, element=4, policy=policy)
    predicted = {when: sum(parts.values()) - sum(state_bytes(job).values()) for when, parts in moments(job).items()}
    assert max(predicted["last layer"], predicted["first layer"]) == pytest.approx(live.most, rel=off)


def test_a_llama_keeps_more_than_our_layers(tmp_path):
    config = HuggingFaceConfig(path=folder_of("Llama", tmp_path, **WIDE))
    theirs, gpt = (a_job(model, 300, policy=KEEP) for model in (config, SMALL))
    assert config.sizes == gpt.sizes
    assert 1.8 < kept_bytes(theirs) / kept_bytes(gpt) < 2.5
    again = [replace(job, policy=RECOMPUTE) for job in (theirs, gpt)]
    assert kept_bytes(again[0]) < kept_bytes(theirs) / 8
    assert layer_bytes(again[0])["layer"] > layer_bytes(theirs)["layer"]


def test_what_is_frozen_takes_its_place_and_no_more(tmp_path):
    path = folder_of("Llama", tmp_path, **WIDE)
    whole, lora = (a_job(HuggingFaceConfig(path=path, lora=rank), 300, data=4) for rank in (None, 3))
    q, kv, dim, mlp = 128, 64, 128, 352
    adapters = 5 * 3 * (2 * (dim + q) + 2 * (dim + kv) + 3 * (dim + mlp))
    assert lora.parameters == adapters
    assert lora.all_parameters == whole.parameters + adapters
    assert state_bytes(lora) == {"parameters": 2 * lora.all_parameters, "optimizer": 12 * adapters / 4}
    assert gradient_bytes(lora)[0] == 2 * adapters
    assert loss_bytes(whole) - loss_bytes(lora) >= 4 * 300 * dim
    away = replace(lora, zero=3, offload_parameters=True, offload_optimizer=True)
    assert host_bytes(away)["parameters"] == 2 * lora.all_parameters / 4
    seconds, fewer = step_seconds(whole, Machine()), step_seconds(lora, Machine())
    # Of three products a frozen matrix has two, and an adapter all three
    products = (2 * (whole.layer_parameters * 5) + 3 * adapters) / (3 * whole.layer_parameters * 5)
    assert fewer["matrices"] / seconds["matrices"] == pytest.approx(products)
    assert fewer["loss"] < seconds["loss"]


def test_the_command_and_the_ways_out_are_what_such_a_run_takes(tmp_path, capsys):
    path = folder_of("Mixtral", tmp_path, **WIDE, num_local_experts=4)
    config = HuggingFaceConfig(path=path)
    job = a_job(config, 300, zero=3, policy=KEEP)
    assert {one.policy for one in policies(job)} == {KEEP, RECOMPUTE}
    arguments = (
        "model=hf",
        f"model.path={path}",
        "model.pretrained=false",
        "nproc=2",
        "seq_len=65536",
        "engine.zero=2",
    )
    assert exit_code("budget.py", *arguments) == 0
    out = capsys.readouterr().out
    assert f"{config.all_parameters(300) / 1e9:.2f} G parameters" in out
    now = replace(job, zero=2, ring=2, seq_len=65536)
    assert f"{sum(gpu_bytes(now).values()) / GIB:9.2f} of " in out
    assert exit_code("budget.py", "model=hf", "model.path=/nowhere") == 1
    assert "model.path=/nowhere: no such folder" in capsys.readouterr().err
