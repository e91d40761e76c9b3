"""50 steps in bf16 on a GPU, by every kind of policy, beside the plainest configuration and the same in fp32."""

from pathlib import Path

import pytest
import torch

from ringspan.kernels.attention import attention
from ringspan.kernels.spans import Spans
from ringspan.train.activations import Activations, Offload, Policy
from ringspan.train.engine import Dtype, Engine, EngineConfig
from ringspan.train.model import GPT, ModelConfig
from ringspan.train.optim import OptimConfig

STEPS, TOKENS, SEEDS = 50, 1024, (0, 1, 2)
MODEL = ModelConfig(dim=256, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=64, mlp_dim=512)
KEEP_ATTENTION, RECOMPUTE = Activations.recompute_keep_attention, Activations.recompute
POLICIES = {
    "keep": Policy(compiler="inductor"),
    "keep attention, tiles": Policy(activations=KEEP_ATTENTION, mlp_tile=300, compiler="inductor"),
    "keep attention, offload": Policy(activations=KEEP_ATTENTION, offload=Offload.cpu, compiler="inductor"),
    "recompute 3, offload": Policy(activations=RECOMPUTE, recompute_layers=3, offload=Offload.cpu, compiler="inductor"),
}


def losses(policy, backend, dtype, seed, steps=STEPS, device="cuda"):
    """Nats a token of each step, of a model and rows that the seed decides."""

    def attend(q, k, v, spans):
        return attention(q, k, v, spans, backend=backend)

    def build(device, dtype):
        return GPT(MODEL, 256, attend, policy, seed=seed, device=device, dtype=dtype)

    device = torch.device(device)
    text = torch.tensor(list(Path(torch.__file__).with_name("_torch_docs.py").read_bytes()), device=device)
    spans, positions = Spans.causal(TOKENS).to(device), torch.arange(TOKENS, device=device)[None]
    engine = Engine(build, EngineConfig(dtype=dtype), OptimConfig(), 1, device)
    count, curve = torch.tensor(TOKENS, device=device), []
    for step in range(steps):
        row = text[(seed * steps + step) * TOKENS :][: TOKENS + 1].long()
        loss = engine.loss_sum(row[None, :-1], row[None, 1:], positions, spans)
        engine.backward(loss, count, last=True)
        engine.step(1e-3)
        curve.append(loss.detach() / TOKENS)
    engine.deepspeed.destroy()
    return torch.stack(curve).double().cpu()


def noise(policies, **changes):
    """Root mean square, over steps and seeds, of the difference from fp32: of the plainest configuration (keep, not
    compiled, attention in plain PyTorch), and of each policy on the GPU's own backend."""
    squares = dict.fromkeys(["plain", *policies], 0.0)
    for seed in SEEDS:
        exact = losses(Policy(), "torch", Dtype.fp32, seed, **changes)
        found = {"plain": losses(Policy(), "torch", Dtype.bf16, seed, **changes)}
        found |= {name: losses(policy, "auto", Dtype.bf16, seed, **changes) for name, policy in policies.items()}
        assert exact[-1] < 0.8 * exact[0]
        for name, curve in found.items():
            squares[name] += (curve - exact).square().mean().item() / len(SEEDS)
    return {name: square**0.5 for name, square in squares.items()}


@pytest.mark.gpu
def test_losses_of_50_steps_are_the_plainest_ones_within_the_noise_of_bf16(ranks):
    (found,) = ranks(1, cuda=True)(noise, POLICIES, timeout=300)
    print(found)
    assert all(off < 2 * found["plain"] for off in found.values()), found
