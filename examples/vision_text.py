"""Images inside text, sharded: torchrun --nproc_per_node=2 examples/vision_text.py

A row is a question, the patches of an image, and an answer: in which corner it is bright. Text is causal, patches see
their whole image, and all of it is one sequence that the ranks share: `with_blocks` is all that it takes.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ring_ddp import Transformer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ringspan.kernels.spans import Spans
from ringspan.parallel.layout import Layout
from ringspan.parallel.ring_plan import plan_ring

SIDE, PATCH, DIM = 16, 2, 32  # pixels of an image and of a patch; width of the model
PATCHES = (SIDE // PATCH) ** 2
QUESTION, ANSWERS = [0, 1, 2], [3, 4, 5, 6]  # token ids: "where is light ?", and the four corners
START, N = len(QUESTION), len(QUESTION) + PATCHES + 2  # of the image, and of a row with "it is" and an answer


class VisionText(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text = Transformer(vocabulary=8, longest=N, dim=DIM)
        self.patches = nn.Linear(PATCH * PATCH, DIM)

    def forward(self, tokens: Tensor, patches: Tensor, positions: Tensor, ring_plan, group) -> Tensor:
        """All are this rank's shards; ``patches`` (rows, tokens, pixels) are 0 where there is text."""
        image = (positions >= START) & (positions < START + PATCHES)
        x = torch.where(image[..., None], self.patches(patches), self.text.tokens(tokens))
        return self.text(x, positions, ring_plan, group)


def draw(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """tokens and labels (rows, N), patches (rows, N, pixels)."""
    corner, half = torch.randint(4, (rows,)), SIDE // 2
    images = torch.randn(rows, 2, half, 2, half) * 0.5
    images[torch.arange(rows), corner // 2, :, corner % 2] += 1
    cut = images.reshape(rows, SIDE // PATCH, PATCH, SIDE // PATCH, PATCH).transpose(2, 3).reshape(rows, PATCHES, -1)
    patches = F.pad(cut, (0, 0, START, 2))
    tokens = torch.full((rows, N), 7)
    tokens[:, :START], tokens[:, -1] = torch.tensor(QUESTION), torch.tensor(ANSWERS)[corner]
    labels = torch.full_like(tokens, -100)
    labels[:, -2] = tokens[:, -1]
    return tokens, labels, patches


def train(steps: int = 50, rows: int = 16) -> list[float]:
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spans = Spans.causal(N).with_blocks([(START, START + PATCHES)])
    layout = Layout.balanced(spans, ranks)
    ring_plan = plan_ring(spans, layout, rank).to(device)
    torch.manual_seed(0)
    model = DistributedDataParallel(VisionText().to(device))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(steps):
        tokens, labels, patches = draw(rows)  # alike on all ranks
        whole = (tokens, 0), (patches, 0), (torch.arange(N).expand(rows, -1), 0), (labels, -100)
        *shards, y = (layout.shard(x, rank, 1, fill=fill).to(device) for x, fill in whole)
        logits = model(*shards, ring_plan, group)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")
        optimizer.zero_grad()
        (loss * ranks / rows).backward()  # one label a row, on one of the ranks
        optimizer.step()
        dist.all_reduce(total := loss.detach())
        losses.append(total.item() / rows)
    return losses


if __name__ == "__main__":
    dist.init_process_group()
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_rank())
    losses = train()
    print(f"rank {dist.get_rank()}: loss {losses[0]:.3f} -> {losses[-1]:.3f}; a guess has 1.386")
    dist.destroy_process_group()
