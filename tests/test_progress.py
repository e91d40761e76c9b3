"""What a run prints: plain lines, the one line of a terminal and what stands above it, and who prints."""

import io
import re

import pytest
from test_metrics import NUMBERS

from ringspan.train.metrics import record
from ringspan.train.progress import Progress, short_time


class Screen(io.StringIO):
    """A terminal: what it shows once it has done what it was told."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        shown, row, column = [""], 0, 0
        for text, code in re.findall(r"([^\x1b]+)|\x1b\[([?\d;]*[a-zA-Z])", self.getvalue()):
            if code == "2K":
                shown[row] = ""
            elif code.endswith("A"):
                row -= int(code[:-1])
            else:
                assert not code or code.endswith("m") or code in {"?25l", "?25h"}, f"unknown: {code!r}"
            for letter in text:
                if letter in "\r\n":
                    row, column = row + (letter == "\n"), 0
                    shown += [""] * (row + 1 - len(shown))
                else:
                    shown[row] = shown[row][:column].ljust(column) + letter + shown[row][column + 1 :]
                    column += 1
        return [line.rstrip() for line in shown]


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    return Screen()


def step(number: int, **values) -> dict:
    return record(**{**NUMBERS, "step": number, "tokens": 2000 * number, **values})


def test_plain_lines_with_the_time_left():
    progress = Progress(10, out := io.StringIO())
    for number in (1, 2):
        progress.step(step(number))
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("step  2/10 | loss 2.5000 | lr 1.00e-03 | norm 0.70 | 1,000 tok/s/gpu | mem ")
    assert lines[1].endswith(" | data 10.0% | comm 1.0% | 0.50 s | 4.0K tok | eta 4s")  # 8 steps of half a second
    assert "mfu" not in lines[1]


def test_the_first_step_says_nothing_of_the_time_left():
    progress = Progress(10, out := io.StringIO())
    for number, seconds in ((1, 100.0), (2, 1.0), (3, 1.0)):  # 100: it compiles
        progress.step(step(number, step_seconds=seconds))
    assert out.getvalue().endswith("eta 7s\n")


def full(number: int) -> dict:
    """A step on a GPU."""
    peak = {"perf/mfu": 0.484, "memory/peak_reserved_gib": 38.1, "perf/tokens_per_second_per_gpu": 25300.0}
    return {**step(number), **peak}


def test_a_terminal_has_one_line_below_what_was_said(screen):
    progress = Progress(1000, screen)
    progress.say("facts")
    progress.step(full(1))
    progress.step(full(2))
    said = "step 2: " + "a longer line than the terminal is wide, which has to be whole [bold]" * 2
    progress.say(said)
    progress.step(full(3))
    *above, line = screen.lines()
    assert above == ["facts", said]
    assert line == "3/1000 loss 2.5000 25,300 tok/s/gpu 48.4% mfu 38.1 GiB data 10.0% 8m18s left"
    progress.end()
    progress.say("done")
    assert screen.lines() == ["facts", said, line, "done", ""]
    assert screen.getvalue().rindex("\x1b[?25h") > screen.getvalue().rindex("\x1b[?25l"), "no cursor is left hidden"


def test_the_cursor_is_there_while_a_run_runs(screen):
    """A run that is killed could not bring it back."""
    Progress(10, screen).step(step(1))
    assert screen.getvalue().rindex("\x1b[?25h") > screen.getvalue().rindex("\x1b[?25l")


@pytest.mark.parametrize("columns", [20, 60, 80, 100, 140, 200])
def test_the_line_fits_and_a_wide_terminal_has_more(screen, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    progress = Progress(1000, screen)
    progress.step(full(500))
    (line,) = screen.lines()
    assert len(line) <= columns
    assert line.split()[:3] == ["500/1000", "loss", "2.5000"]
    assert ("comm 1.0%" in line) == (columns >= 100)
    assert ("━" in line) == (columns >= 140)


def test_lines_are_not_rewritten_where_that_is_not_possible(screen, monkeypatch):
    for term, rewrites in (("dumb", True), ("", True), ("xterm", False)):
        monkeypatch.setenv("TERM", term)
        Progress(10, screen, rewrites=rewrites, prefix="rank 3: ").step(step(1))
    assert screen.getvalue().count("rank 3: step  1/10 | loss 2.5000") == 3
    assert "\x1b" not in screen.getvalue()


class Gone(Screen):
    def write(self, text: str) -> int:
        raise BrokenPipeError("gone")


def test_a_terminal_that_has_gone_ends_no_run(screen):
    for stream in (Gone(), screen):
        progress = Progress(10, stream)
        progress.say("x")
        progress.step(step(1))
        progress.end()


def test_who_has_no_stream_says_nothing(capfd):
    progress = Progress(10, None)
    progress.say("x")
    progress.step(step(1))
    progress.end()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("seconds", "text"), [(4.2, "4s"), (65, "1m05s"), (5 * 3600 + 12 * 60 + 1, "5h12m")])
def test_time_left_in_words(seconds, text):
    assert short_time(seconds) == text
