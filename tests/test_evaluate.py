"""Evaluation against numbers by hand, on any mesh; length curricula; and a whole run that has both."""

import json
import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_parity import job

from ringspan.parallel.attention import SequenceAttention
from ringspan.parallel.mesh import Mesh
from ringspan.train import picture
from ringspan.train.config import TrainConfig
from ringspan.train.data import DataConfig, prepare
from ringspan.train.evaluate import BLANK, Evaluation, EvaluationConfig, Once
from ringspan.train.loop import train
from ringspan.train.loss import token_losses
from ringspan.train.manifest import read_manifest
from ringspan.train.measured import Measured
from ringspan.train.needle import DEPTHS, NEEDLES
from ringspan.train.packing import IGNORE
from ringspan.train.phases import Phase, check_phases, phase_at
from ringspan.train.rows import Text


@pytest.mark.parametrize("chunk", [1, 7, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_token_losses_are_those_of_whole_logits(chunk, dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 11, 8, dtype=dtype), torch.randn(13, 8, dtype=dtype)
    labels = torch.randint(0, 13, (3, 11))
    labels[1, 3:7] = IGNORE
    labels[0, 0] = (hidden[0, 0] @ weight.T).argmax()
    losses, hits = token_losses(hidden, weight, labels, chunk)
    logits = hidden.double() @ weight.double().T
    expected = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORE)
    torch.testing.assert_close(
        losses.double(), expected, rtol=0, atol=16 * torch.finfo(dtype).eps * logits.abs().max().item()
    )
    assert torch.equal(hits, logits.argmax(-1) == labels)
    assert hits[0, 0]
    assert not hits[1, 3:7].any()


def text_in(folder: str, **fields) -> Text:
    config = DataConfig(path=folder, cache=f"{folder}-cache", held_out=0.3, needles=0.5, **fields)
    return Text(prepare(config), config)


def by_hand(mb):
    """A loss and hits that say where they are from, and do not know of ranks."""
    return (mb.labels + 1000 * mb.positions).double(), (mb.labels + mb.tokens) % 3 == 0


def measured_on(folder: str, mesh: tuple[int, int, int], rows: int) -> Measured:
    attend = SequenceAttention(Mesh.create(*mesh, "cpu"), "zigzag")
    evaluation = Evaluation(EvaluationConfig(every=1, rows=rows), text_in(folder), 300, attend, 2, torch.device("cpu"))
    if rows > 3:
        evaluation.needles = []
    return evaluation.measure(by_hand)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("evaluate") / "text"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(30):
        (folder / f"{n:02}.txt").write_text("".join(map(chr, rng.integers(97, 123, rng.integers(10, 700)))))
    return str(folder)


@pytest.mark.parametrize(
    ("mesh", "rows"), [((1, 1, 1), 3), ((2, 1, 1), 3), ((1, 2, 1), 3), ((1, 1, 2), 3), ((1, 1, 1), 1000)]
)
def test_what_is_measured_is_of_every_label_once_on_any_mesh(folder, ranks, mesh, rows):
    text = text_in(folder)
    held = text.held_out(300)
    found = {}
    for row in held.order(0, min(rows, len(held))):
        _, labels, positions = held.load(row, np.arange(300))
        for label, position in zip(labels, positions, strict=True):
            if label != IGNORE:
                start = max(s for k in range(10) for s in (0, 2**k, 3 * 2**k // 2) if s <= position)
                found.setdefault(int(start), []).append(label + 1000 * position)
    losses = [loss for part in found.values() for loss in part]
    for measured in ranks(math.prod(mesh))(measured_on, folder, mesh, rows):
        assert measured.loss == pytest.approx(np.mean(losses), rel=1e-12)
        assert [start for start, _ in measured.by_position] == sorted(found)
        assert [x for _, x in measured.by_position] == pytest.approx([np.mean(found[s]) for s in sorted(found)])
        held_bytes = text.corpora[0].bytes[text.held[0]]
        per_byte = (held_bytes + 1).sum() / held_bytes.sum()
        assert measured.bits_per_byte == pytest.approx(measured.loss * per_byte / math.log(2))
        assert list(measured.needles) == ([75, 150, 300] if rows == 3 else [])
        for length, shares in measured.needles.items():
            needles = text.needles(300, 0, length)
            hits = np.zeros(NEEDLES)
            for row in range(3):
                tokens, labels, _ = needles.load(row, np.arange(300))
                asked = np.flatnonzero(labels != IGNORE)
                hits[DEPTHS] += (labels[asked] + tokens[asked]) % 3 == 0
            assert shares == pytest.approx(hits / 3)


def test_rows_that_are_not_there_are_blank(folder):
    once = Once(text_in(folder).held_out(50), 3)
    assert once.order(1, 5) == [*once.taken[1:], BLANK, BLANK, BLANK]
    assert once.lengths(BLANK) == [50]
    positions = np.array([0, 3, -1])
    assert [x.tolist() for x in once.load(BLANK, positions)] == [[0] * 3, [IGNORE] * 3, [0, 3, 0]]
    assert len(Once(text_in(folder).held_out(50), 10**6)) == len(text_in(folder).held_out(50))


def run(config: TrainConfig) -> float:
    return train(config, config.run_dir)


def lines(config: TrainConfig, name: str) -> list[dict]:
    return [json.loads(line) for line in Path(config.run_dir, name).read_text().splitlines()]


def long_job(root, name: str, text: str, **fields) -> TrainConfig:
    config = job(root, name, text, mesh=(1, 2, 1), steps=5, save_every=1, keep=0)
    data = replace(config.data, held_out=0.2, needles=0.25)
    phases = [Phase(step=2, seq_len=96), Phase(step=4, seq_len=128, rope_base=1e6)]
    evaluation = EvaluationConfig(every=2, rows=4)
    return replace(config, data=data, phases=phases, evaluation=evaluation, **fields)


def test_a_run_with_phases_is_measured_and_resumes_anywhere(folder, tmp_path, ranks):
    whole = long_job(tmp_path, "whole", folder)
    ranks(2)(run, whole, timeout=200)
    tokens = [line["tokens"] for line in lines(whole, "metrics.jsonl")]
    assert np.diff([0, *tokens]).tolist() == [8 * 64] * 2 + [8 * 96] * 2 + [8 * 128]
    measured = lines(whole, "evaluations.jsonl")
    assert [line["step"] for line in measured] == [2, 4, 5]
    assert set(measured[0]["needles_by_depth"]) == {"64"}
    assert set(measured[2]["needles_by_depth"]) == {"64", "128"}
    assert all(0 < line["eval/loss"] < 7 for line in measured)
    ElementTree.parse(Path(whole.run_dir, "loss_by_position.svg"))
    needles = ElementTree.parse(Path(whole.run_dir, "needles.svg"))
    assert [x.text for x in needles.iter("{http://www.w3.org/2000/svg}text") if x.get("text-anchor") == "end"] == [
        "64",
        "128",
    ]
    last = Path(whole.run_dir, "checkpoints", "step-00000005")
    assert read_manifest(last).saved.rows_seen == 8  # of the last phase, which has begun with its first row
    other = long_job(tmp_path, "other-base", folder)
    other.phases[1].rope_base = None
    other.resume = str(last.with_name("step-00000003"))
    ranks(2)(run, other, timeout=200)
    before, after = ([line["train/loss"] for line in lines(c, "metrics.jsonl")][-2:] for c in (whole, other))
    assert before[0] == after[0]
    assert before[1] != after[1]
    for step in (2, 3):  # at the border of two phases, and inside one
        resumed = replace(long_job(tmp_path, f"from-{step}", folder))
        resumed.resume = str(Path(whole.run_dir, "checkpoints", f"step-{step:08d}"))
        resumed.train.log_every = 5 if step == 3 else 1
        ranks(2)(run, resumed, timeout=200)
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            kept = ("step", "tokens", "train/loss", "eval/loss", "loss_by_position")
            told = [[{k: line[k] for k in kept if k in line} for line in lines(c, name)] for c in (whole, resumed)]
            assert told[1] == told[0][-len(told[1]) :]
    (line,) = lines(resumed, "metrics.jsonl")[-1:]  # of steps 4 and 5
    assert line["perf/tokens_per_second_per_gpu"] * line["perf/step_seconds"] == pytest.approx(8 * (96 + 128) / 2 / 2)


def test_phases_go_up():
    first, phases = Phase(seq_len=8), [Phase(step=3, seq_len=16), Phase(step=5, seq_len=32, rope_base=1e6)]
    check_phases(phases)
    assert [phase_at(phases, first, step).seq_len for step in (0, 2, 3, 4, 5, 99)] == [8, 8, 16, 16, 32, 32]
    for bad, message in (
        ([Phase(step=0, seq_len=8)], r"phases\[0\]\.step=0: must be 1 or more; before it seq_len holds"),
        ([Phase(step=3)], r"phases\[0\]\.seq_len=0: must be 1 or more"),
        ([Phase(step=3, seq_len=8, rope_base=1.0)], r"phases\[0\]\.rope_base=1\.0: must be above 1"),
        ([*phases, phases[0]], r"phases: step=3 after step=5; they must go up"),
    ):
        with pytest.raises(ValueError, match=message):
            check_phases(bad)


@pytest.mark.parametrize("fields", [{"every": -1}, {"rows": 0}])
def test_bad_values_are_named(fields):
    with pytest.raises(ValueError, match=r"evaluation\.(every=-1|rows=0): must be"):
        EvaluationConfig(**fields)


def test_an_evaluation_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"evaluation\.every=5: there is nothing to measure; give data\.held_out"):
        TrainConfig(name="x", run_dir="x", evaluation=EvaluationConfig(every=5))


@pytest.mark.parametrize("points", [[(1, 3.0), (2, 2.0), (300, 1.0)], [(1, 1.0), (2, 1.0)]])
def test_a_curve_is_drawn_inside_its_picture(points):
    drawn = ElementTree.fromstring(picture.curve(points, "a < b", "x", "y"))
    (line,) = drawn.iter("{http://www.w3.org/2000/svg}polyline")
    at = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
    assert len(at) == len(points)
    assert all(picture.LEFT <= x <= picture.WIDTH and 0 <= y <= picture.HEIGHT for x, y in at)
    assert [x for x, _ in at] == sorted(x for x, _ in at)
    assert [y for _, y in at] == sorted((y for _, y in at), reverse=points[0][1] < points[-1][1])


def test_a_table_of_shares_is_drawn_field_by_field():
    drawn = ElementTree.fromstring(picture.heat([[0.0, 0.25, 1.0], [0.5, 0.1, 0.2]], ["a", "b"], ["x", "y", "z"], "<"))
    fields = [x for x in drawn.iter("{http://www.w3.org/2000/svg}rect") if x.get("stroke")]
    assert [float(x.get("fill-opacity")) for x in fields] == [0.0, 0.25, 1.0, 0.5, 0.1, 0.2]
    edges = [(float(x.get("x")), float(x.get("y")), float(x.get("width")), float(x.get("height"))) for x in fields]
    assert len({(x, y) for x, y, _, _ in edges}) == 6
    assert all(x + w <= picture.WIDTH and y + h <= picture.HEIGHT for x, y, w, h in edges)
    said = [x.text for x in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert said == ["<", "a", "0%", "25%", "100%", "b", "50%", "10%", "20%", "x", "y", "z"]
