"""docs/troubleshooting.md tells the truth: each mistake that it shows ends in the line that it shows."""

import ast
import shlex
from pathlib import Path

import pytest
import torch
from commands import exit_code
from test_docs import ROOT, blocks

from ringspan.kernels import sdpa
from ringspan.kernels.attention import attention
from ringspan.kernels.spans import Spans
from ringspan.parallel import workers

PAGE = ROOT / "docs" / "troubleshooting.md"
GPUS = 8


def shown(language: str, prompt: str) -> list[tuple[str, str]]:
    """(what is typed, what comes of it) of the page's blocks."""
    text = "\n".join(block.text for block in blocks(PAGE) if block.language == language)
    return [tuple(part.strip().split("\n", 1)) for part in text.split(prompt)[1:]]  # type: ignore[misc]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "one.txt").write_text("a line of a text\n" * 4000)
    (tmp_path / "photo.jpg").write_bytes(bytes(range(256)) * 64)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """(exit code, lines) of a command on a machine of 8 GPUs, or of none where it hides them."""
    words = shlex.split(command)
    gpus = 0 if words[0] == "CUDA_VISIBLE_DEVICES=" else GPUS
    _, script, *arguments = words[words.index("python") :]
    monkeypatch.setattr(workers, "gpus", lambda: gpus)
    code = exit_code(script.removeprefix("launch/"), *arguments)
    return code, "".join(capfd.readouterr()).splitlines()


def test_there_are_mistakes_enough():
    assert len(shown("console", "$ ")) + len(shown("pycon", ">>> ")) >= 20


@pytest.mark.parametrize("command, line", shown("console", "$ "))
def test_a_mistake_ends_in_the_line_that_is_shown(command, line, folder, monkeypatch, capfd):
    before = set(folder.rglob("*"))
    code, lines = said(command, monkeypatch, capfd)
    started = command.startswith("CUDA_VISIBLE_DEVICES=")  # on a CPU; the mistake shows later
    assert started or set(folder.rglob("*")) == before, "a run that never started left files"
    if "budget.py" in command:  # a whole report, which ends in what is shown
        assert (code, lines[-1]) == (0, line)
    else:
        assert (code, lines) == (1, [line])


@pytest.mark.parametrize("expression, line", shown("pycon", ">>> "))
def test_an_error_in_code_is_the_one_that_is_shown(expression, line):
    q = k = v = torch.zeros(1, 4096, 1, 8)
    known = {"q": q, "k": k, "v": v, "slopes": torch.ones(1), "torch": torch, "attention": attention, "Spans": Spans}
    torch.manual_seed(0)
    with pytest.raises(ValueError) as error:
        eval(compile(ast.parse(expression, mode="eval"), "shown", "eval"), {**vars(sdpa), **known})
    assert f"ValueError: {error.value}" == line
