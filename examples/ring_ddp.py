"""Ring attention in a training loop of your own: torchrun --nproc_per_node=2 examples/ring_ddp.py"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ringspan.kernels.spans import Spans
from ringspan.parallel.layout import Layout
from ringspan.parallel.ring import ring_attention
from ringspan.parallel.ring_plan import plan_ring


class Transformer(nn.Module):
    def __init__(self, vocabulary: int, longest: int, dim: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.heads, self.tokens, self.positions = heads, nn.Embedding(vocabulary, dim), nn.Embedding(longest, dim)
        self.qkv = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(layers))
        mlp = [(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)) for _ in range(layers)]
        self.mlp = nn.ModuleList(nn.Sequential(*parts) for parts in mlp)
        self.head = nn.Linear(dim, vocabulary)

    def forward(self, x: Tensor, positions: Tensor, ring_plan, group) -> Tensor:  # this rank's shards
        x = (x if x.is_floating_point() else self.tokens(x)) + self.positions(positions)
        for qkv, mlp in zip(self.qkv, self.mlp, strict=True):
            q, k, v = qkv(F.layer_norm(x, x.shape[-1:])).unflatten(-1, (3, self.heads, -1)).unbind(2)
            x = x + ring_attention(q, k, v, ring_plan, group).flatten(2)
            x = x + mlp(F.layer_norm(x, x.shape[-1:]))
        return self.head(x)


def draw(lengths: tuple[int, ...]) -> list[Tensor]:
    """tokens, labels, positions of documents that count on by the same number, end to end: the same on all ranks."""
    documents = [(torch.randint(17, (4, 1)) + 3 * torch.arange(n + 1)) % 17 for n in lengths]
    tokens, labels = (torch.cat([d[:, i : i + d.shape[1] - 1] for d in documents], 1) for i in (0, 1))
    return [tokens, labels, torch.cat([torch.arange(n) for n in lengths]).expand_as(tokens)]


def train(steps: int = 30, lengths: tuple[int, ...] = (110, 7, 133)) -> list[float]:
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spans = Spans.packed(lengths)  # documents that do not see each other, in one row that all ranks share
    layout = Layout.balanced(spans, ranks)  # which positions each rank has
    ring_plan = plan_ring(spans, layout, rank).to(device)  # once a batch, for all layers
    torch.manual_seed(0)
    model = DistributedDataParallel(Transformer(vocabulary=17, longest=max(lengths)).to(device))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(steps):
        tokens, labels, positions = draw(lengths)
        parts = (tokens, 0), (positions, 0), (labels, -100)
        x, p, y = (layout.shard(t, rank, 1, fill=fill).to(device) for t, fill in parts)
        loss = F.cross_entropy(model(x, p, ring_plan, group).flatten(0, 1), y.flatten(), reduction="sum")
        optimizer.zero_grad()
        (loss * ranks / labels.numel()).backward()  # DDP averages over ranks, each of which has a part of the sum
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
