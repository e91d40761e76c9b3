import pytest
import torch

from ringspan.kernels.spans import Spans
from ringspan.parallel.layout import LAYOUTS, Layout


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", [0, 1, 7, 1009, 4096, 5000])
def test_every_position_once_and_equal_shards(name, ranks, length):
    layout = LAYOUTS[name](length, ranks)
    held = [layout.positions(rank) for rank in range(ranks)]
    real = [p[p >= 0] for p in held]
    assert torch.cat(real).sort().values.tolist() == list(range(length))
    assert all((p.diff() > 0).all() for p in real)
    counts = [len(p) for p in real]
    assert max(counts) == layout.rows
    # Equal but for rounding: one position a chunk.
    assert max(counts) - min(counts) <= max(len(chunks) for chunks in layout.chunks)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("ranks, parts", [(1, 1), (3, 1), (2, 2), (4, 3)])
def test_shards_come_back_whole(name, ranks, parts):
    layout = LAYOUTS[name](1013, ranks)
    x = torch.randn(2, 1013, 3)
    shards = [layout.shard(x, r, 1, part=u, parts=parts, fill=-7) for r in range(ranks) for u in range(parts)]
    assert len({shard.shape for shard in shards}) == 1
    assert (layout.unshard(shards, 1) == x).all()
    kept = sum((shard != -7).sum().item() for shard in shards)
    assert kept == x.numel()
    positions = [layout.local_positions(r, u, parts) for r in range(ranks) for u in range(parts)]
    for shard, where in zip(shards, positions, strict=True):
        assert (shard[:, where >= 0] == x[:, where[where >= 0]]).all()


def test_chunk_edges_are_multiples_of_256_where_the_length_allows():
    for layout in (Layout.zigzag(8192, 4), Layout.striped(8192, 4), Layout.contiguous(8192, 4)):
        assert all(edge % 256 == 0 for chunks in layout.chunks for chunk in chunks for edge in chunk)


def test_zigzag_and_stripes_balance_a_causal_mask_and_contiguous_does_not():
    spans = Spans.causal(8192)

    def work(layout: Layout, rank: int) -> int:
        mine = layout.positions(rank)
        return int((spans.hi - spans.lo)[0, mine].sum())

    for layout, most in (
        (Layout.zigzag(8192, 4), 1.001),
        (Layout.striped(8192, 4), 1.2),
        (Layout.contiguous(8192, 4), 1.8),
    ):
        done = [work(layout, rank) for rank in range(4)]
        assert max(done) / (sum(done) / 4) <= most
    contiguous = [work(Layout.contiguous(8192, 4), rank) for rank in range(4)]
    assert max(contiguous) / (sum(contiguous) / 4) > 1.7


def test_a_wrong_length_is_refused():
    with pytest.raises(ValueError, match="has 5 positions, the layout 6"):
        Layout.zigzag(6, 2).shard(torch.zeros(1, 5), 0, 1)
    with pytest.raises(ValueError, match="block=0"):
        Layout.striped(6, 2, block=0)
