"""benchmarks/layer_parts.py at tiny sizes: its report, and that its contestants compute the same."""

import json
import sys

import layer_parts
import pytest
import torch
from layer_parts import Case

CPU = torch.device("cpu")


def test_every_part_is_measured_written_and_shown(tmp_path, monkeypatch, capsys):
    out = tmp_path / "report.json"
    monkeypatch.setattr(sys, "argv", ["layer_parts.py", *f"--small --rounds 1 --out {out}".split()])
    layer_parts.main()
    rows = json.loads(out.read_text())["cases"]
    assert [row["part"] for row in rows] == ["loss", "norm", "swiglu", "rotary"]
    assert all(row["ours"]["value"] > 0 for row in rows)
    assert {"deepspeed", "whole logits"} <= set(rows[0]["peers"])
    assert all("not compiled" in row["peers"] for row in rows[1:])
    said = out.with_suffix(".md").read_text()
    assert said.count("\n## ") == 4
    assert "| 64 | 4 x 2 x 16 |" in said
    assert "out of memory" not in capsys.readouterr().out


def test_losses_have_the_same_gradients():
    made = layer_parts.losses(Case("loss", 96, (32, 300)), CPU)
    ours, whole = (made[name]()() for name in ("ours", "whole logits"))
    for found, expected in zip(ours, whole, strict=True):
        assert (found - expected).float().norm() < 0.01 * expected.float().norm()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "part, sizes", [("loss", (64, 1000)), ("norm", (512,)), ("swiglu", (256,)), ("rotary", (4, 2, 64))]
)
def test_on_a_gpu_peers_give_what_ours_do(part, sizes):
    torch.manual_seed(0)
    pytest.importorskip("liger_kernel", reason="liger_kernel is not installed")
    made = layer_parts.PARTS[part](Case(part, 512, sizes), torch.device("cuda"))
    ours, theirs = (flat(made[name]()()) for name in ("ours", "liger"))
    if part == "swiglu":
        theirs = [torch.cat(theirs, -1)]  # of both halves
    for expected in theirs:  # theirs are gradients alone, ours may have results too
        same = [x for x in ours if x.numel() == expected.numel()]
        assert (
            min((x.flatten().float() - expected.flatten().float()).norm() for x in same)
            < 0.02 * expected.float().norm()
        )


def flat(found):
    return [y for x in found for y in flat(x)] if isinstance(found, (list, tuple)) else [found]
