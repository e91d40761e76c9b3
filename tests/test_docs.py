"""What the documentation tells users to type: every command is taken by the parser or the configuration that it is for,
every snippet runs, every name of a field and every link leads somewhere.
"""

import argparse
import copy
import functools
import importlib.util
import itertools
import os
import re
import runpy
import shlex
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from omegaconf import DictConfig, OmegaConf
from torch.distributed.run import get_args_parser as torchrun_parser

from docs.configuration import PAGE, module
from docs.configuration import page as page_of_all_fields
from ringspan.parallel.workers import process_group
from ringspan.train import documents
from ringspan.train.config import PLUGINS, TrainConfig, check, field_names, typed
from ringspan.train.data import DataConfig, write_corpus
from ringspan.train.model import ModelConfig

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GPUS = 8  # of the machine that commands with nproc=0 are for
SHOWN = {"text", "json"}  # fenced blocks of these languages are no commands
FORMAT = ("text text KEY=VALUE",)  # indented text that is no command either, by its beginning
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


class Block(NamedTuple):
    line: int
    language: str  # "" of indented ones
    text: str


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text().splitlines()
    at = 0
    while at < len(lines):
        start, line = at, lines[at]
        if fence := re.match(r"(\s*)```(\w*)$", line):
            at = next(i for i in range(start + 1, len(lines)) if lines[i].strip() == "```")
            yield Block(start + 1, fence[2], textwrap.dedent("\n".join(lines[start + 1 : at])))
        elif line.startswith("    ") and not lines[start - 1].strip():
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            yield Block(start + 1, "", textwrap.dedent("\n".join(lines[start:at])).rstrip())
            at -= 1
        at += 1


def prose(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"(?ms)^ *```.*?^ *```$|^    .*?$", "", page.read_text())


def inline_code(page: Path) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


PROGRAMS = r"(?:python|torchrun|make|pip|sbatch|ringspan-\w+)"


def commands(page: Path) -> Iterator[tuple[int, str]]:
    """(line, command) of every block that is not Python, YAML or shown text, and of code in sentences."""
    for block in blocks(page):
        if block.language in {*SHOWN, "python", "pycon", "yaml"} or block.text.startswith(FORMAT):
            continue
        assert block.language in {"", "bash", "console"}, f"{page.name}:{block.line}: what is {block.language}?"
        if (page.stem, block.language) == ("troubleshooting", "console"):  # mistakes: see test_troubleshooting.py
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            if block.language != "console" or line.startswith("$ "):
                yield block.line, line.removeprefix("$ ")
    for code in inline_code(page):
        if re.match(rf"{PROGRAMS} \S", code):
            yield 0, code


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """To stand in: what the commands name is there. No dataset of the hub is asked for."""
    for name in ("books/a.txt", "my_books/a.txt", "notes.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "a line of a text"}\n')
    source = documents.find_source(str(tmp_path / "books"), True)
    write_corpus(tmp_path / "prepared", DataConfig(path=str(tmp_path / "books")), source)
    (tmp_path / "my_llama").mkdir()
    (tmp_path / "my_llama" / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    for path in (tmp_path / "tokenizer.json", tmp_path / "my_llama" / "tokenizer.json"):
        path.write_text('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}')
    monkeypatch.setattr(documents.Hub, "check", lambda self: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_one(page, folder, monkeypatch):
    for line, command in commands(page):
        try:
            run(shlex.split(command, comments=True), monkeypatch)
        except Exception as error:
            raise AssertionError(f"{page.name}:{line}: {command}") from error


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Try a command without doing its work. KeyError: nobody knows how to."""
    for number, word in enumerate(words):
        if word in {"&&", "|", ";"}:
            run(words[number + 1 :], monkeypatch)
            words = words[:number]
            break
    while words and re.match(r"[A-Z_]+=", words[0]):  # of the environment
        words = words[1:]
    if words:
        HANDLERS[words[0]](words[1:], monkeypatch)


def python(words: list[str], monkeypatch: pytest.MonkeyPatch, world: int = 0) -> None:
    """`world` processes that torchrun starts, or 0."""
    if words[0] == "-m":
        assert words[1].startswith("ringspan.launch."), words
        words = [words[1].removeprefix("ringspan.").replace(".", "/") + ".py", *words[2:]]
    script = ROOT / words[0]
    if "@hydra.main" in (source := script.read_text()):
        configured(script, words[1:], world)
    elif "argparse" in source:
        parsed(script, words[1:], monkeypatch)
    else:
        assert len(words) == 1, f"{script} takes no arguments"


def torchrun(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given = torchrun_parser().parse_args(words)
    nodes = int(str(given.nnodes).rpartition(":")[2])
    script = (["-m"] if given.module else []) + [given.training_script, *given.training_script_args]
    python(script, monkeypatch, nodes * int(given.nproc_per_node))


def configured(script: Path, words: list[str], world: int) -> None:
    """Arguments for Hydra: each job of a sweep composes into dataclasses, and what is known of a machine holds."""
    given = get_args(words)
    for overrides in jobs(given.overrides) if given.multirun else [given.overrides]:
        if script.stem == "train":
            of_training(overrides, world)
        else:
            told = module(script)  # which has put its dataclass where Hydra finds it
            config: Any = OmegaConf.to_object(composed(script.stem, overrides))
            if script.stem == "budget" and not (config.longest or config.fastest):  # which take seconds to pick
                told.chosen(config)


def composed(name: str, overrides: list[str]) -> DictConfig:
    """As Hydra's `compose`, which takes a fifth of a second: once for the files, and values are put into a copy."""
    of_hydra = [one for one in overrides if one.startswith(("hydra.", "hydra/"))]
    check_plugins(of_hydra)
    overrides = [one for one in overrides if one not in of_hydra]
    values = [one for one in overrides if not is_file(one)]
    config = copy.deepcopy(of_files(name, tuple(one for one in overrides if is_file(one))))
    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(values), config)
    return config


def is_file(override: str) -> bool:
    """Whether it picks a file of a group."""
    return (CONF / override.lstrip("+~").partition("=")[0]).is_dir()


def check_plugins(overrides: list[str]) -> None:
    """What is for Hydra itself: a launcher or sweeper of ours or of a plugin that we know, and values for those."""
    picked = {}
    for key, _, value in (one.partition("=") for one in overrides):
        if key.startswith("hydra/"):
            assert (CONF / key / f"{value}.yaml").is_file() or value in PLUGINS, f"there is no {key}={value}"
            picked[key.removeprefix("hydra/")] = value
        else:
            assert key.split(".")[1] in {*picked, "sweeper", "launcher", "sweep", "run"}, f"there is no {key}"


@functools.cache
def of_files(name: str, files: tuple[str, ...]) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(files))


def jobs(overrides: list[str]) -> Iterator[list[str]]:
    choices: list[list[str]] = []
    for one in OverridesParser.create().parse_overrides(overrides):
        values = [one.input_line]
        if one.is_sweep_override():
            value = one.value()
            ends = [value.start, value.end] if isinstance(value, IntervalSweep) else one.sweep_string_iterator()
            values = [f"{one.get_key_element()}={end}" for end in ends]
        choices.append([str(value) for value in values])
    yield from map(list, itertools.product(*choices))


def of_training(overrides: list[str], world: int) -> None:
    config = typed(composed("train", overrides))
    if isinstance(config.model, ModelConfig) or importlib.util.find_spec("transformers"):
        check(config, world or config.nproc or GPUS, "cuda")


class ParsedError(Exception):
    """The arguments were taken, and nothing more is to be done."""


def parsed(script: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *given: Any) -> None:
        real(self, *given)
        raise ParsedError

    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patched.setattr(sys, "argv", [str(script), *words])
        with pytest.raises(ParsedError):
            runpy.run_path(str(script), run_name="__main__")


def make(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, _, value = word.partition("=")
        known = rf"(?m)^{name} \?=|\$\({name}\)" if "=" in word else rf"(?m)^{word}:"
        assert re.search(known, makefile), f"the Makefile has no {word}"
        if name == "ARGS" and words[0] == "train":
            of_training(["experiment=laptop", *shlex.split(value)], 0)


def pip(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds or installs this repository, its wheel with its extras, or packages that pyproject.toml names."""
    listed = [*PROJECT["dependencies"], *itertools.chain(*PROJECT["optional-dependencies"].values())]
    known = {re.split(r"[<>=;\[ ]", name)[0] for name in listed} | {".", *PLUGINS.values()}
    wheel = f"ringspan-{PROJECT['version']}-py3-none-any.whl"
    assert words[0] in {"install", "wheel"}
    for word in (word for word in words[1:] if not word.startswith("-")):
        name, _, extras = word.rstrip("]").partition("[")
        assert name in known or fnmatch(wheel, name), f"pyproject.toml does not name {name}"
        assert set(filter(None, extras.split(","))) <= set(PROJECT["optional-dependencies"])


def installed(name: str) -> Callable[[list[str], pytest.MonkeyPatch], None]:
    """What pyproject.toml makes a program of."""

    def program(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        python(["-m", PROJECT["scripts"][name].removesuffix(":main"), *words], monkeypatch)

    return program


def sbatch(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = list(itertools.takewhile(lambda word: word.startswith("-"), words))
    script, *overrides = words[len(options) :]
    assert (ROOT / script).is_file()
    nodes = dict(option.split("=", 1) for option in options if "=" in option).get("--nodes", "1")
    of_training(overrides, int(nodes) * GPUS)


HANDLERS: dict[str, Callable[[list[str], pytest.MonkeyPatch], None]] = {
    "python": python,
    "torchrun": torchrun,
    "make": make,
    "pip": pip,
    "sbatch": sbatch,
    **{name: installed(name) for name in PROJECT["scripts"]},
}


@pytest.mark.parametrize("command", ["pyton launch/train.py", "python launch/train.py seq_lenn=1", "make tea"])
def test_a_command_that_is_none_is_found(command, folder, monkeypatch):
    with pytest.raises(Exception, match=r"pyton|seq_lenn|tea"):
        run(shlex.split(command), monkeypatch)


def names() -> Iterator[tuple[Path, str]]:
    """Fields of a run in sentences: what begins with a part's name and a dot."""
    parts = {name.partition(".")[0] for name in field_names() if "." in name}
    for page in PAGES:
        for code in inline_code(page):
            for name in re.findall(r"(?<![\w./])[a-z_]+\.[a-z_0-9]+(?![\w/(.])", code):
                if name.partition(".")[0] in parts and not name.endswith((".py", ".md", ".json", ".jsonl")):
                    yield page, name


def test_every_field_that_is_named_exists():
    known = set(field_names())
    assert not [f"{page.name}: {name}" for page, name in names() if name not in known]


def test_every_link_leads_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            if not link.startswith("http"):
                file, _, anchor = link.partition("#")
                target = (page.parent / file).resolve() if file else page
                assert target.exists(), f"{page.name}: {link}"
                assert not anchor or anchor in map(slug, target.read_text().splitlines()), f"{page.name}: {link}"


def slug(line: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") if line.startswith("#") else ""


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    assert not [page.name for page in PAGES[1:] if f"({page.name})" not in index and page.name != "README.md"]


PYTHON = [page for page in PAGES if "```python" in page.read_text()]


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_every_snippet_runs(page, tmp_path):
    """One after the other, as a reader would paste them, in a process group of one."""
    snippets = [block for block in blocks(page) if block.language == "python"]
    with mock.patch.dict(os.environ), process_group():
        known = namespace(tmp_path, with_llama=any("transformers" in block.text for block in snippets))
        for block in snippets:
            exec(compile(block.text, f"{page.name}:{block.line}", "exec"), known)


def namespace(folder: Path, with_llama: bool) -> dict[str, Any]:
    """What a reader has already: a row of 4,096 tokens, a group, a model."""
    lengths = [1200, 7, 2889]
    q, k, v = (torch.randn(1, sum(lengths), heads, 8, requires_grad=True) for heads in (2, 1, 1))
    known = {"q": q, "k": k, "v": v, "lengths": lengths, "torch": torch, "dist": dist, "group": dist.group.WORLD}
    known |= {"device": torch.device("cpu"), "input_ids": torch.randint(64, (1, sum(lengths)))}
    if with_llama:
        from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 - takes seconds, and one page needs it

        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(known.setdefault("path", str(folder)))
    return known


def test_every_yaml_block_is_a_configuration():
    for page in PAGES:
        for block in blocks(page):
            if block.language == "yaml":
                told = OmegaConf.create(block.text)
                for key in ("defaults", "hydra"):
                    told.pop(key, None)
                OmegaConf.merge(OmegaConf.structured(TrainConfig), told)


def test_what_the_budget_prints_is_what_is_shown():
    told, reports = module(ROOT / "launch" / "budget.py"), 0
    for block in itertools.chain.from_iterable(map(blocks, PAGES)):
        command, _, shown = block.text.partition("\n")
        if command.startswith("$ python launch/budget.py ") and "\n" in shown:
            config: Any = OmegaConf.to_object(composed("budget", shlex.split(command)[3:]))
            asked, job = told.chosen(config)
            found = told.budget(job, config.machine)
            assert told.report(job, found, config.machine, told.switches(job, asked)) == shown
            reports += 1
    assert reports


def test_the_page_of_all_fields_is_what_the_code_says():
    assert PAGE.read_text() == page_of_all_fields(), "write it anew: python docs/configuration.py"
