"""The same GPT as others train it: a process a GPU, started by benchmarks/training.py; prints its seconds and memory.

fsdp2       PyTorch alone: FSDP2 over all ranks, context_parallel for the sequence, cuDNN's attention, compiled layers
deepspeed   DeepSpeed's long-sequence parts: Ulysses over all ranks, its tiled MLP and tiled loss, ZeRO 1

Both keep all activations (`keep`), or each layer's input alone (`recompute`). Tokens are random, a row is one document.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from ringspan.train.engine import import_deepspeed

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
TILE = 4096  # tokens that a tiled part sees at once
CHUNK = 8192  # tokens whose logits are there at once


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def angles(n: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    speed = 500_000.0 ** -(torch.arange(0, dim, 2, device=device) / dim)
    turned = torch.arange(n, device=device)[None, :, None, None] * speed
    return turned.cos(), turned.sin()


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, S, heads, D); k and v of fewer heads are repeated, as context_parallel knows no groups."""
    heads_first = (x.transpose(1, 2) for x in (q, *(x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))))
    kernel = sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if q.is_cuda else contextlib.nullcontext()
    with kernel:
        return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


class Mlp(nn.Module):
    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.gate_and_value, self.down = nn.Linear(dim, 2 * width, bias=False), nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate_and_value(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class Layer(nn.Module):
    def __init__(self, m: dict[str, int], attend: Attend, mlp: Callable[[Mlp, Tensor], Tensor]) -> None:
        super().__init__()
        self.heads = m["n_heads"], m["n_kv_heads"], m["n_kv_heads"]
        self.head_dim, self.attend, self.run_mlp = m["head_dim"], attend, mlp
        self.qkv = nn.Linear(m["dim"], sum(self.heads) * self.head_dim, bias=False)
        self.out = nn.Linear(m["n_heads"] * self.head_dim, m["dim"], bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(n) for n in (m["dim"], m["dim"], self.head_dim, self.head_dim))
        self.mlp = Mlp(m["dim"], m["mlp_dim"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)
        q, k = rotate(self.norms[2](q), cos, sin), rotate(self.norms[3](k), cos, sin)
        x = x + self.out(self.attend(q, k, v).flatten(2))
        return x + self.run_mlp(self.mlp, self.norms[1](x))


class Gpt(nn.Module):
    def __init__(self, case: dict[str, Any], attend: Attend, mlp: Any = Mlp.forward, loss: Any = None) -> None:
        super().__init__()
        m, self.recompute, self.loss = case["model"], case["activations"] == "recompute", loss or chunked_loss
        self.embedding = nn.Embedding(case["vocab_size"], m["dim"])
        self.layers = nn.ModuleList(Layer(m, attend, mlp) for _ in range(m["n_layers"]))
        self.norm, self.head = nn.RMSNorm(m["dim"]), nn.Linear(m["dim"], case["vocab_size"], bias=False)

    def forward(self, tokens: Tensor, labels: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, cos, sin, use_reentrant=False) if self.recompute else layer(x, cos, sin)
        return self.loss(self.head, self.norm(x), labels)


def loss_of_rows(head: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(x).float().flatten(0, -2), labels.flatten())


def chunked_loss(head: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    parts = list(zip(x.split(CHUNK, 1), labels.split(CHUNK, 1), strict=True))
    losses = [checkpoint(loss_of_rows, head, *part, use_reentrant=False) * part[1].shape[1] for part in parts]
    return sum(losses, x.new_zeros((), dtype=torch.float32)) / labels.shape[1]


def fsdp2(case: dict[str, Any], device: torch.device) -> Callable[[], Any]:
    """One step of training."""
    world = dist.get_world_size()
    with device:
        model = Gpt(case, causal)
    if device.type == "cuda":
        for layer in model.layers:
            layer.compile()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        tokens, labels = (torch.randint(case["vocab_size"], (1, case["seq_len"]), device=device) for _ in range(2))
        cos, sin = angles(case["seq_len"], case["model"]["head_dim"], device)
        whole = [tokens, labels, cos, sin]
        split: Any = contextlib.nullcontext()
        if world > 1:
            from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
            from torch.distributed.tensor.experimental import context_parallel  # noqa: PLC0415

            mesh = init_device_mesh(device.type, (world,))
            split = context_parallel(mesh, buffers=whole, buffer_seq_dims=[1] * 4, no_restore_buffers=set(whole))
        with split:
            model(*whole).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def deepspeed(case: dict[str, Any], device: torch.device) -> Callable[[], Any]:
    """One step of training."""
    library = import_deepspeed(device)  # without building its C++ all-reduce on a CPU, which takes a minute
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss, TiledMLP  # noqa: PLC0415
    from deepspeed.sequence.layer import DistributedAttention  # noqa: PLC0415

    world, rank = dist.get_world_size(), dist.get_rank()

    def mlp(module: Mlp, x: Tensor) -> Tensor:
        weights = [module.gate_and_value.weight, module.down.weight]
        return TiledMLP.apply(Mlp.forward, module, x, -(-x.shape[1] // TILE), weights)

    def loss(head: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        shards = -(-x.shape[1] // TILE)
        return TiledFusedLogitsLoss.apply(loss_of_rows, head, x, labels, None, shards, [head.weight], "mean")

    local = torch.compile(causal) if device.type == "cuda" else causal
    attend: Attend = local
    if world > 1:
        attend = partial(DistributedAttention(local, dist.group.WORLD, scatter_idx=2, gather_idx=1), batch_dim_idx=0)
    with device:
        model = Gpt(case, attend, mlp, loss)
    bf16 = device.type == "cuda"
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    engine = library.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]

    def step() -> None:
        n = case["seq_len"] // world
        tokens, labels = (torch.randint(case["vocab_size"], (1, n), device=device) for _ in range(2))
        cos, sin = (x[:, rank * n : (rank + 1) * n] for x in angles(n * world, case["model"]["head_dim"], device))
        engine.backward(engine(tokens, labels, cos, sin))
        engine.step()

    return step


PEERS = {"fsdp2": fsdp2, "deepspeed": deepspeed}


def main() -> None:
    name, case = sys.argv[1], json.loads(sys.argv[2])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if case["cuda"] else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    synchronize = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    step, seconds = PEERS[name](case, device), []
    for _ in range(case["steps"]):
        started = time.perf_counter()
        step()
        synchronize()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    if dist.get_rank() == 0:
        print("\n" + json.dumps({"seconds": seconds, "peak_gib": peak}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
