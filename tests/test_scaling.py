"""The cost model of benchmarks/scaling.py on reports that are made up by it, and by something else."""

import itertools
import json

import pytest
import scaling


def report(costs: tuple[float, ...], rings: tuple[int, ...] = (2,)) -> dict:
    rows = []
    for ranks, kv_heads, tokens in itertools.product(rings, (32, 8), (1024, 8192, 16384, 32768, 65536, 262144)):
        parts = scaling.lost_parts(tokens, ranks, kv_heads, 128, (600e12, 500e12), 32, scaling.NVLINK)
        forward, backward, both = (scaling.efficiency(one, scaling.Costs(*costs)) for one in (*parts, parts))
        sizes = {"tokens_a_gpu": tokens, "gpus": ranks, "heads": 32, "kv_heads": kv_heads, "dim": 128}
        ours = {"value": 525 * both, "forward": 600 * forward, "backward": 500 * backward}
        alone = {"value": 525.0, "forward": 600.0, "backward": 500.0}
        peers = {"ours, all-gather": {"value": 300.0}} if tokens == 1024 else {}
        rows.append({"mask": "causal", **sizes, "ours": ours, "one_gpu": alone, "peers": peers})
    packed = {"mask": "packed-8192", "ours": {"value": 1.0}, "one_gpu": None, "peers": {}}
    return {"machine": "made up", "cases": [*rows, packed]}


def test_seconds_by_hand():
    """2 ranks of 16K tokens, 32 heads of 128 and 8 kv heads, at 500 and 400 TFLOP/s: the forward pass, of 4 x 128 x 32
    x 32768^2 / 2 / 2 FLOPs, is 8.796 ms, 4.398 ms a step. Keys and values of 16K tokens are 64 MiB: 184 us at 364 GB/s,
    and 10 more. In fp32, partial results are 256 MiB, written and read, and gradients 128 MiB, which pass the memory
    six times."""
    forward, backward = scaling.lost_parts(16384, 2, 8, 128, (500e12, 400e12), 32, scaling.NVLINK)
    wire = 184.4e-6 + 10e-6
    assert forward == pytest.approx([8.796e-3, 1, 1, wire, 2 * 2**28 / 3e12, 0], rel=1e-3)
    assert backward == pytest.approx([8.796e-3 * 2.5 * 1.25, 1, 1, 3 * wire, 6 * 2**27 / 3e12, 0], rel=1e-3)
    slow = scaling.lost_parts(64, 2, 8, 128, (500e12, 400e12), 32, scaling.NETWORK)  # a step of 0.07 us, 26.6 of wire
    assert slow[:, 5] == pytest.approx(slow[:, 3] - slow[:, 0] / 2)


@pytest.mark.parametrize(
    "costs, rings",
    [
        ((40e-6, 0.0, 0.3, 0.0), (2,)),
        ((0.0, 0.0, 0.5, 0.4), (2,)),
        ((80e-6, 0.0, 0.0, 0.0), (2,)),
        ((0.0, 0.0, 0.0, 0.0), (2,)),
        ((30e-6, 50e-6, 0.2, 0.5), (2, 4)),  # steps and calls are told apart by rings of two sizes alone
    ],
)
def test_the_fit_finds_what_a_report_was_made_of(costs, rings):
    points = scaling.measured(report(costs, rings))
    assert len(points) == 10 * len(rings)
    assert tuple(scaling.fit(points[::2])) == pytest.approx(costs, rel=1e-6, abs=1e-12)


def test_the_page_says_what_was_fitted_checked_and_assumed(tmp_path):
    (tmp_path / "ring.json").write_text(json.dumps(report((40e-6, 0.0, 0.3, 0.0))))
    scaling.render(tmp_path / "ring.json", tmp_path / "scaling")
    page = (tmp_path / "scaling.md").read_text()
    assert "Fitted on 5 of the 10 measured causal cases: 40 us a step" in page
    assert "wrong by at most 0.0%" in page
    assert "HOP_SECONDS of parallel/attention.py: 4.0e-05 s" in page
    assert "shards of 4 MiB of keys and values on 2 GPUs: ring" in page
    assert page.count("| fitted |") == page.count("| checked |") == 5
    assert "4,096 GPUs" in page
    assert "| 64M |" in page


def test_more_tokens_and_faster_wires_lose_less():
    costs, rates = scaling.Costs(40e-6, 0.0, 0.3, 0.5), (600e12, 500e12)
    by_tokens = [scaling.best(tokens, 512, rates, costs)[0] for tokens in scaling.TOKENS]
    assert by_tokens == sorted(by_tokens)
    by_gpus = [scaling.best(2**20, gpus, rates, costs)[0] for gpus in scaling.GPUS]
    assert by_gpus == sorted(by_gpus, reverse=True)
    assert all(0 < value < 1 for value in (*by_tokens, *by_gpus))


def test_too_little_to_fit_is_refused(tmp_path):
    few = report((1e-5, 0.0, 0.1, 0.0))
    (tmp_path / "ring.json").write_text(json.dumps({**few, "cases": few["cases"][:4]}))
    with pytest.raises(ValueError, match="has 3 causal cases"):
        scaling.render(tmp_path / "ring.json", tmp_path / "scaling")
