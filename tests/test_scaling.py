"""The cost model of benchmarks/scaling.py on reports that are made up by it, and by something else."""

import importlib.util
import json
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent.parent / "benchmarks" / "scaling.py"
spec = importlib.util.spec_from_file_location("scaling", HERE)
assert spec is not None
assert spec.loader is not None
scaling = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scaling)


def report(step: float, beside: float) -> dict:
    rows = []
    for kv_heads in (32, 8):
        for tokens in (8192, 16384, 32768, 65536, 262144):
            parts = scaling.lost_parts(tokens, 2, kv_heads, 128, 600e12, 32, scaling.NVLINK)
            rate = 600 * scaling.efficiency(parts, scaling.Costs(step, beside))
            sizes = {"tokens_a_gpu": tokens, "gpus": 2, "heads": 32, "kv_heads": kv_heads, "dim": 128}
            rows.append({"mask": "causal", **sizes, "ours": {"value": rate}, "one_gpu": {"value": 600.0}})
    return {"machine": "made up", "cases": [*rows, {"mask": "packed-8192", "ours": {"value": 1.0}, "one_gpu": None}]}


def test_seconds_by_hand():
    """2 ranks of 16K tokens, 32 heads of 128 and 8 kv heads, at 500 TFLOP/s: forward, 4 x 128 x 32 x 32768^2 / 2 / 2
    FLOPs are 8.796 ms, 4.398 ms a step; keys and values of 16K tokens are 64 MiB: 184 us at 364 GB/s, and 10 more."""
    alone, steps, wire, exposed = scaling.lost_parts(16384, 2, 8, 128, 500e12, 32, scaling.NVLINK)
    assert alone == pytest.approx(8.796e-3 * 3.5, rel=1e-3)
    assert steps == 2  # one forward, one backward
    assert wire == pytest.approx((184.4e-6 + 10e-6) * 4, rel=1e-3)
    assert exposed == 0
    slow = scaling.lost_parts(64, 2, 8, 128, 500e12, 32, scaling.NETWORK)  # a step of 0.07 us under 26.6 us of wire
    assert slow[3] == pytest.approx(slow[2] - slow[0] / 2)


@pytest.mark.parametrize("costs", [(40e-6, 0.3), (0.0, 0.5), (80e-6, 0.0)])
def test_the_fit_finds_what_a_report_was_made_of(costs):
    points = scaling.measured(report(*costs))
    assert len(points) == 10
    assert tuple(scaling.fit(points[::2])) == pytest.approx(costs, rel=1e-6, abs=1e-12)


def test_the_page_says_what_was_fitted_checked_and_assumed(tmp_path):
    (tmp_path / "ring.json").write_text(json.dumps(report(40e-6, 0.3)))
    scaling.render(tmp_path / "ring.json", tmp_path / "scaling")
    page = (tmp_path / "scaling.md").read_text()
    assert "Fitted on 5 of the 10 measured causal cases: 40 us a step" in page
    assert "wrong by at most 0.0%" in page
    assert page.count("| fitted |") == page.count("| checked |") == 5
    assert "4,096 GPUs" in page
    assert "| 64M |" in page


def test_more_tokens_and_faster_wires_lose_less():
    costs = scaling.Costs(40e-6, 0.3)
    by_tokens = [scaling.best(tokens, 512, 600e12, costs)[0] for tokens in scaling.TOKENS]
    assert by_tokens == sorted(by_tokens)
    by_gpus = [scaling.best(2**20, gpus, 600e12, costs)[0] for gpus in scaling.GPUS]
    assert by_gpus == sorted(by_gpus, reverse=True)
    assert all(0 < value < 1 for value in (*by_tokens, *by_gpus))


def test_too_little_to_fit_is_refused(tmp_path):
    (tmp_path / "ring.json").write_text(json.dumps({**report(1e-5, 0.1), "cases": report(1e-5, 0.1)["cases"][:3]}))
    with pytest.raises(ValueError, match="has 3 causal cases"):
        scaling.render(tmp_path / "ring.json", tmp_path / "scaling")
