"""A run's small files."""

import pytest

from ringspan.train.files import whole_lines
from ringspan.train.report_runs import read_lines
from ringspan.train.sweep import measured

WHOLE = b'{"step": 1, "train/loss": 2.5, "perf/tokens_per_second_per_gpu": 10}\n'


@pytest.mark.parametrize(
    ("written", "lines"),
    [
        (None, []),
        (b"", []),
        (b"cut", []),
        (b"one\n", ["one"]),
        (b"one\n\ntwo\ncut", ["one", "", "two"]),
        (b"one\nhalf a character: \xc3", ["one"]),
        (b"\xc3(\ntwo\n", ["\ufffd(", "two"]),
    ],
)
def test_the_last_line_of_a_log_counts_once_it_has_an_end(written, lines, tmp_path):
    path = tmp_path / "metrics.jsonl"
    if written is not None:
        path.write_bytes(written)
    assert whole_lines(path) == lines


def test_a_run_that_is_writing_is_read_without_its_cut_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(WHOLE + b'{"step": 2, "train/loss": 1.')
    assert measured(tmp_path)["loss"] == 2.5
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1]
