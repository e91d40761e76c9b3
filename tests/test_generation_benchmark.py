"""benchmarks/generation.py at tiny sizes: every part of its report, and what its contestants attend to."""

import json
import sys

import generation
import generation_parts
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")


def test_every_part_is_measured_written_and_shown(tmp_path, monkeypatch, capsys):
    out, queries = tmp_path / "report.json", []
    scores = torch.nn.functional.scaled_dot_product_attention

    def noted(q, k, *others, **given):
        queries.append((q.shape[2], k.shape[2]))
        return scores(q, k, *others, **given)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", noted)
    only = "decode|query|parity (qwen3|gpt_oss)|prefill"
    command = f"--small --only {only.replace(' ', '.')} --rounds 1 --tokens 6 --peers hf|fa2 --out {out}"
    monkeypatch.setattr(sys, "argv", ["generation.py", *command.split()])
    generation.main()
    rows = {row["part"] + " " + row["sizes"]: row for row in json.loads(out.read_text())["cases"]}
    decode, query_row = rows["decode 96 2"], rows["query 64 2"]
    assert decode["cache_bytes"] == 2 * 2 * 2 * 96 * 2 * 16 * 2  # k, v; layers, rows, tokens, kv heads, dim; bf16
    for found in (decode["ours"], decode["peers"]["hf dynamic"], decode["peers"]["hf static"]):
        assert found["value"] == pytest.approx(2 / found["step_seconds"])
    # Transformers, too, runs one query a token, which both of its heads may share, behind the whole cache
    behind = [(query, keys) for query, keys in queries if keys > 64]
    assert len(behind) == 2 * 2 * 6  # layers, caches, tokens
    assert {keys for _, keys in behind} == set(range(91, 97))
    assert max(query for query, _ in behind) <= 2
    assert query_row["peers"]["copy"]["of_copy"] == 1
    mine, copy = query_row["ours"], query_row["peers"]["copy"]
    assert mine["of_copy"] == pytest.approx(mine["value"] / copy["value"])
    assert "sdpa" in rows["parity qwen3"]["peers"]
    assert "sdpa" not in rows["parity gpt_oss"]["peers"]
    for name in ("qwen3", "gpt_oss"):  # 64 tokens of which all logits are below 1
        assert 0 < rows[f"parity {name}"]["ours"]["wide_logits"] < 0.02
    assert rows["prefill 300"]["ours"]["seconds"] > 0
    assert "left out" not in capsys.readouterr().out
    said = out.with_suffix(".md").read_text()
    assert said.count("\n## ") == 4
    assert "| 96 | 2 | 0.00 | - |" in said


def test_a_case_without_memory_says_so_and_the_others_go_on(monkeypatch):
    def made(shape, place):
        def run():
            raise torch.OutOfMemoryError("1 TiB")

        return run

    monkeypatch.setattr(
        generation_parts, "DECODERS", {"hf dynamic": made, "ours": lambda *_: lambda: ([0.0, 1, 2, 3, 4, 4.5], None)}
    )
    shape = generation_parts.Shape(generation.ModelConfig(), 320, 4, 96, 6)
    place = generation_parts.Place(torch.device("cpu"), None)
    found = generation_parts.decoding(shape, ["ours", "hf dynamic"], 2, place)
    assert found["hf dynamic"] == {"failed": "out of memory"}
    assert found["ours"]["step_seconds"] == 0.5
    assert generation.shown_step(found["hf dynamic"]) == "out of memory"
    row = {"ours": found["ours"], "peers": found}
    assert generation.compared(row, "hf dynamic", generation.shown_step) == "out of memory"
