"""The page about runs: what it says, how it looks in a browser, and what it says of folders that are none."""

import json
import re
import shutil
import struct
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from commands import exit_code
from matplotlib.image import imread

from ringspan.train.metrics import METRICS
from ringspan.train.report_figures import SERIES, WIDE, smoothed, thinned
from ringspan.train.report_runs import differences, expand, read_runs

KERNEL = f"void kernel<{'int, ' * 20}>"
VOID = {"meta", "link", "br", "img", "path", "use", "rect"}


def make_run(
    folder, *, steps=100, done=None, lr=1e-3, mfu=0.4, evaluations=True, profile=True, first=0, every=1, **facts
):
    """A run's folder as training leaves it, with numbers that are known."""
    folder.mkdir(parents=True)
    config = {"name": folder.name, "run_dir": str(folder), "steps": steps, "optim": {"lr": lr}, "data": {"path": "a<b"}}
    run = {
        "config": config,
        "versions": {"torch": "2.13.0"},
        "started": "2026-01-01T00:00:00+0000",
        "command": ["launch/train.py"],
        "unigram_entropy": 3.0,
        "model": {"parameters": 1_500_000},
        "mesh": {"data": 1, "ring": 2, "ulysses": 1},
        "engine": {"device": "NVIDIA H100"},
        "resumed": "no",
        **facts,
    }
    (folder / "run.json").write_text(json.dumps(run))
    lines = []
    for step in range(first + every, (steps if done is None else done) + 1, every):
        line = dict.fromkeys(METRICS, 0.0)
        line |= {"step": step, "tokens": 1000 * step, "train/loss": 6.0 - 4.0 * step / 100, "perf/mfu": mfu}
        line |= {"perf/tokens_per_second_per_gpu": 9.0 if step == first + 1 else 2000.0 + lr, "perf/step_seconds": 0.5}
        line |= {"perf/data_seconds": 0.01, "memory/peak_allocated_gib": 3.5, "memory/peak_reserved_gib": 4.25}
        line |= {"memory/weights_gib": 1.5, "memory/activations_gib": 0.01 * step, "memory/gradients_gib": None}
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    if evaluations:
        (folder / "evaluations.jsonl").write_text(
            "".join(
                json.dumps(
                    {
                        "step": step,
                        "tokens": 1000 * step,
                        "eval/loss": 5.0 - 3.0 * step / 100,
                        "eval/bits_per_byte": 1.5,
                        "loss_by_position": [[0, 3.0], [1, 2.5], [2, 2.25]],
                        "loss_by_length": {"64": 2.0, "128": 1.5},
                        "needles_by_depth": {"64": [0.125] * 8, "128": [1.0] * 4 + [0.5] * 4},
                    }
                )
                + "\n"
                for step in (50, 100)
            )
        )
    if profile:
        (folder / "profile").mkdir()
        one = {"seconds": 0.5, "parts": {"attention": 0.2, "ring": 0.01, "mlp": 0.25, "other": 0.04}}
        one["kernels"] = [{"name": KERNEL, "part": "mlp", "seconds": 0.125, "calls": 1234}]
        told = {"step": 5, "device": "cuda", **one, "ranks": [one, one]}
        (folder / "profile" / "step-00000005.json").write_text(json.dumps(told))
        (folder / "profile" / "step-00000005-rank0.trace.json.gz").write_bytes(b"for others to read")
    return folder


class Page(HTMLParser):
    """Text of the elements, by tag; every tag that is opened is closed, in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.ids = [], [], []  # elements: (tag, attributes, texts)
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]
        self.found.append((tag, dict(attributes), []))
        if tag not in VOID:
            self.open.append(self.found[-1])

    def handle_startendtag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open:
            self.open[-1][2].append(data)

    def texts(self, tag):
        return [" ".join("".join(said).split()) for name, _, said in self.found if name == tag]

    def labels(self):
        return {a["aria-label"].partition(".")[0]: a["aria-label"] for _, a, _ in self.found if a.get("role") == "img"}


def opened(folder):
    text = (folder / "index.html").read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#)|@import|url\((?!#)|https?:|<script""", text), "fetches"
    page = Page(text)
    assert len(set(page.ids)) == len(page.ids)
    return page


def size_of(png):
    head = png.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


ALL = {"loss", "throughput", "utilisation", "memory", "memory_parts", "parts", "position", "length", "needles"}


def test_one_run_is_told_whole(tmp_path, capsys):
    folder = make_run(tmp_path / "first $x$ <b>")
    assert exit_code("report.py", folder) == 0
    out = folder / "report"
    assert capsys.readouterr().out.strip() == str(out / "index.html")
    assert {path.name for path in out.iterdir()} == {"index.html", *(f"{name}.png" for name in ALL)}
    assert size_of(out / "loss.png") == tuple(round(160 * inches) for inches in WIDE)
    page = opened(out)
    assert page.texts("h1") == ["first $x$ <b>"]
    assert "1.5M parameters · ring 2 · NVIDIA H100 · finished, 100 steps" in " ".join(page.texts("p"))
    numbers = dict(zip(page.texts("dt"), page.texts("dd"), strict=True))
    assert numbers["training loss"] == "2.0000"
    assert numbers["held-out loss"] == "2.0000"
    assert numbers["throughput"] == "2,000"  # the median, in which the first step does not count
    assert numbers["utilisation"] == "40.0%"
    assert numbers["waiting for data"] == "2.00%"
    assert numbers["peak memory"] == "4.25"
    assert numbers["training time"] == "0:00:50"
    assert "skipped steps" not in numbers
    told = page.labels()
    assert "from 5.960 to 2.000" in told["Loss"]
    assert "held out: from 3.500 to 2.000" in told["Loss"]
    assert "0.500 s, of which attention 40.0%, exposed ring 2.0%, MLP and projections 50.0%" in str(told)
    assert "perplexity of the same text" in told["Perplexity by tokens seen at once"].lower()
    assert "12% at 64, 75% at 128 tokens" in told["Needles found"]
    assert [text for text in page.texts("text") if text.endswith("%")].count("100%") >= 4
    assert told["Memory by part"].endswith("weights: 1.50 GiB; " + f"{folder.name}, activations: 1.00 GiB.")
    assert f"{KERNEL[:69]}..." in page.texts("th")
    cells = page.texts("td")
    assert {"0.1250", "1,234"} <= set(cells)
    assert {"0.2000", "40.0%", "0.5000", "a<b", "2.13.0"} <= set(cells)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Runs, and the folder of their report."""
    root = tmp_path_factory.mktemp("two")
    first = make_run(root / "a" / "same", evaluations=False, profile=False)
    second = make_run(root / "b" / "same", lr=500.0, steps=200, done=150, mfu=None, resumed="x/step-00000040")
    assert exit_code("report.py", first, second, "--out", root / "out") == 0
    return first, second, root / "out"


def test_runs_are_compared(two):
    first, second, out = two
    page = opened(out)
    heads = page.texts("th")
    assert [str(first), str(second)] == [text for text in heads if text in {str(first), str(second)}][:2]
    bold = page.texts("b")
    assert {"0.0000", "2,500"} <= set(bold)  # loss and throughput: the better of the two
    assert not {"2.0000", "2,000", "40.0%", "4.25"} & set(bold)  # worse, alone, or the same in both
    rows = dict(differences(read_runs([first, second])))
    assert set(rows) == {"steps", "optim.lr"}
    assert rows["optim.lr"] == ["0.001", "500.0"]
    said = " ".join(page.texts("p"))
    assert "at step 150 of 200, last logged" in said
    assert "resumed from step-00000040" in said
    hints = " ".join(page.texts("li"))
    assert f"{first}: not evaluated: data.held_out=0.02" in hints
    assert f"{first}: not profiled: profile=[5,6]" in hints
    assert f"{second}: utilisation is not known" in hints


def test_a_run_that_has_just_begun_and_one_that_is_being_written(tmp_path):
    begun = make_run(tmp_path / "begun", done=0, evaluations=False, profile=False)
    (begun / "metrics.jsonl").unlink()
    assert exit_code("report.py", begun) == 0
    page = opened(begun / "report")
    assert "started, no step of 100 logged yet" in " ".join(page.texts("p"))
    assert page.labels() == {}
    writing = make_run(tmp_path / "writing", done=40, evaluations=False, profile=False)
    with open(writing / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "tok')
    (run,) = read_runs([writing])
    assert run.metrics[-1]["step"] == 40
    with open(writing / "metrics.jsonl", "w") as file:
        for step, loss in ((1, 5.0), (2, None), (3, 4.0), (2, 4.5)):  # a run that went back, and one bad step
            file.write(json.dumps({"step": step, "tokens": step, "train/loss": loss}) + "\n")
    (run,) = read_runs([writing])
    assert [(line["step"], line["train/loss"]) for line in run.metrics] == [(1, 5.0), (2, 4.5), (3, 4.0)]
    assert exit_code("report.py", writing) == 0


def test_the_jobs_of_a_sweep_are_its_runs(tmp_path):
    for job in (0, 2, 10):
        make_run(tmp_path / "sweep" / str(job), evaluations=False, profile=False, done=1)
    (tmp_path / "sweep" / "multirun.yaml").touch()
    assert [path.name for path in expand(tmp_path / "sweep")] == ["0", "2", "10"]


def test_seconds_are_of_all_steps_and_not_of_the_logged_ones(tmp_path):
    (run,) = read_runs([make_run(tmp_path / "run", every=10)])
    assert len(run.metrics) == 10
    assert run.seconds() == pytest.approx(50.0)
    (short,) = read_runs([make_run(tmp_path / "short", done=2)])
    assert short.typical("perf/tokens_per_second_per_gpu") == 2000.001  # the first step, which compiles, is not


MISTAKES = {
    "nowhere": "nowhere: no such folder; give that of a run",
    "empty": "empty: there is no run.json",
    "no_config": "no_config/run.json: it has no config",
    "cut_facts": "cut_facts/run.json: not JSON (",
    "list": "list/run.json: not a JSON object",
    "broken": "broken/metrics.jsonl: line 3 is no JSON object with a step",
    "no_step": "no_step/metrics.jsonl: line 1 is no JSON object with a step",
    "bad_profile": "bad_profile/profile/step-00000005.json: not JSON",
}


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    root = tmp_path_factory.mktemp("mistakes")
    for name in set(MISTAKES) - {"nowhere"}:
        make_run(root / name, done=5)
    (root / "empty" / "run.json").unlink()
    (root / "no_config" / "run.json").write_text("{}")
    (root / "cut_facts" / "run.json").write_text('{"config": {')
    (root / "list" / "run.json").write_text("[]")
    lines = (root / "broken" / "metrics.jsonl").read_text().splitlines()
    (root / "broken" / "metrics.jsonl").write_text("\n".join([*lines[:2], lines[2][:30], *lines[3:], ""]))
    (root / "no_step" / "metrics.jsonl").write_text("{}\n")
    (root / "bad_profile" / "profile" / "step-00000005.json").write_text("\x00")
    return root


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line(mistake, mistakes, monkeypatch, capsys):
    monkeypatch.chdir(mistakes)
    assert exit_code("report.py", mistake, "--out", "never") == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("report.py: ")
    assert MISTAKES[mistake] in line
    assert not (mistakes / "never").exists()


def test_long_lines_are_thinned_by_means_and_smoothed_by_the_past():
    x = np.arange(10_001, dtype=float)
    thin_x, thin_y = thinned(x, 2 * x)
    assert len(thin_x) <= 1200
    assert thin_y == pytest.approx(2 * thin_x)
    assert thin_x[0] == pytest.approx(np.mean(x[:9]))
    y = np.random.default_rng(0).normal(size=90)
    expected = [np.mean(y[max(0, i - 2) : i + 1]) for i in range(90)]
    assert smoothed(y) == pytest.approx(expected)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: there is no chromium here")
def test_a_browser_shows_it(two, tmp_path):
    shot = tmp_path / "shot.png"
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,2400", f"--screenshot={shot}", "--dump-dom",
        (two[2] / "index.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    page = Page(done.stdout)
    assert len(page.labels()) == 9
    assert page.texts("h1") == ["2 runs"]
    assert len([tag for tag, _, _ in page.found if tag == "svg"]) == 9
    drawn = (imread(shot)[..., :3] * 255).round().astype(int)
    assert drawn.shape == (2400, 1100, 3)
    for i in range(2):  # each run's lines, in the colour of the style sheet
        colour = [int(SERIES[i][at : at + 2], 16) for at in (1, 3, 5)]
        assert (drawn == colour).all(axis=-1).sum() > 300
