"""benchmarks/training.py: its cases, and what it makes of a process that trains several of them."""

import math
import os

import pytest
import training
from training import Case, configured, predicted, rates, together

LINE = {
    "perf/tokens_per_second_per_gpu": 100.0,
    "perf/step_seconds": 2.0,
    "perf/mfu": 0.5,
    "memory/peak_allocated_gib": 3.0,
    "memory/peak_reserved_gib": 4.0,
}
TRAINER = """
import json, sys
steps, runs = json.loads(sys.argv[1])
for number, run in enumerate(runs):
    seq_len = run["slice"][0] if "slice" in run else next(int(x[8:]) for x in run["overrides"] if x[:8] == "seq_len=")
    if seq_len == 2:
        sys.exit("no more of this")
    if seq_len == 3 and number:
        break
    found = {"failed": "too long"} if seq_len == 5 else {"lines": [dict(%r, **{"perf/mfu": seq_len})] * steps}
    print("noise\\n" + json.dumps({"found": found}))
"""


def test_a_process_that_fails_or_leaves_is_followed_by_another(tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "training_steps.py").write_text(TRAINER % LINE)
    monkeypatch.setattr(training, "ROOT", tmp_path)
    cases = [Case("tiny", n, 1, "keep") for n in (1, 2, 3, 3, 5, 6)]
    cases.append(Case("tiny", 7, 1, "keep", ("slice=2",)))
    found = list(together(cases, 2, 60.0))
    assert [x.get("utilisation") for x in found] == [1, None, 3, 3, None, 6, None]
    assert [x.get("failed") for x in found] == [None, "no more of this", None, None, "too long", None, None]
    assert found[-1]["value"] == 100.0


def test_a_process_that_says_nothing_is_ended(tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "training_steps.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(training, "ROOT", tmp_path)
    assert list(together([Case("tiny", 1, 1, "keep")], 2, 0.2)) == [{"failed": "nothing"}]


def test_rates_are_of_the_steps_after_the_first_two():
    lines = [{**LINE, "perf/step_seconds": s, "memory/peak_allocated_gib": s} for s in (90.0, 80.0, 1.0, 2.0, 9.0)]
    found = rates(lines, Case("1b", 65536, 1, "keep"))
    assert (found["step_seconds"], found["peak_gib"]) == (2.0, 9.0)
    assert rates(lines[:2], Case("1b", 65536, 1, "keep"))["step_seconds"] == 80.0  # fewer: the last


def test_a_slice_is_predicted_with_the_states_of_all_layers(tmp_path):
    (tmp_path / "text.py").write_text(os.linesep.join(["a line of text"] * 500))
    more = ("data.cross_document=false", f"data.path={tmp_path}", "engine.offload_optimizer=true")
    whole, part = (Case("llama8b", 4096, 1, "recompute", (*more, *extra)) for extra in ((), ("slice=4",)))
    assert part.slice == 4
    assert part.overrides == whole.overrides
    full, short = (predicted(case, configured(case), 320) for case in (whole, part))
    assert short.gpu["parameters"] == full.gpu["parameters"]
    assert short.seconds["update"] == full.seconds["update"]
    assert 7.9 < full.seconds["matrices"] / short.seconds["matrices"] <= 8.0
    assert short.gpu_gib < full.gpu_gib
    assert math.isnan(short.utilisation)


@pytest.mark.parametrize("policy", training.POLICIES)
def test_every_policy_is_a_configuration(policy):
    assert configured(Case("1b", 65536, 1, policy)).train.policy("cuda") is not None
