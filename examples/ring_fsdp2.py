"""Ring attention under FSDP2, in a training loop of your own: torchrun --nproc_per_node=2 examples/ring_fsdp2.py

Each rank has a part of every row, and of every parameter, gradient and moment.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ring_ddp import Transformer, draw
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ringspan.kernels.spans import Spans
from ringspan.parallel.layout import Layout
from ringspan.parallel.ring_plan import plan_ring


def train(steps: int = 30, lengths: tuple[int, ...] = (110, 7, 133)) -> list[float]:
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    spans = Spans.packed(lengths)
    layout = Layout.balanced(spans, ranks)
    ring_plan = plan_ring(spans, layout, rank).to(device)  # once a batch, for all layers
    torch.manual_seed(0)
    model = Transformer(vocabulary=17, longest=max(lengths)).to(device)
    sharding = {
        "mesh": init_device_mesh(device.type, (ranks,)),
        "mp_policy": MixedPrecisionPolicy(dtype, torch.float32),
    }
    for layer in (*model.qkv, *model.mlp):
        fully_shard(layer, **sharding)
    fully_shard(model, **sharding)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(steps):
        tokens, labels, positions = draw(lengths)  # alike on all ranks
        parts = (tokens, 0), (positions, 0), (labels, -100)
        x, p, y = (layout.shard(t, rank, 1, fill=fill).to(device) for t, fill in parts)
        loss = F.cross_entropy(model(x, p, ring_plan, group).flatten(0, 1).float(), y.flatten(), reduction="sum")
        optimizer.zero_grad()
        (loss * ranks / labels.numel()).backward()  # FSDP averages over ranks, each of which has a part of the sum
        optimizer.step()
        dist.all_reduce(total := loss.detach())
        losses.append(total.item() / labels.numel())
    return losses


if __name__ == "__main__":
    dist.init_process_group()
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_rank())
    print(f"rank {dist.get_rank()}, every tenth loss: {train()[::10]}")
    dist.destroy_process_group()
