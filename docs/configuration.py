"""Write docs/configuration.md: every field of every command, from the dataclasses and files that define them.

python docs/configuration.py
"""

import ast
import importlib.util
import inspect
import io
import itertools
import sys
import tokenize
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from ringspan.train.config import MODELS, TrainConfig
from ringspan.train.huggingface_config import HuggingFaceConfig
from ringspan.train.model import AnyModel, ModelConfig
from ringspan.train.phases import Phase

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "configuration.md"
CONF = ROOT / "conf"
NAMES = {int: "integer", float: "number", bool: "true, false", str: "text"}
INHERITED = "\nAll fields of a run, and:\n"
HEAD = """\
# Configuration

A run is a tree of values. `python launch/train.py` takes them as `name=value`; `group=file` takes a file of
`conf/GROUP/`:

    python launch/train.py model=small seq_len=16384 train.micro_batch=2
    python launch/train.py experiment=laptop steps=20
    python launch/train.py model=small --cfg job

The last line prints the configuration of a command without running it. What comes later wins: the defaults below, the
files of the groups, the experiment, the command line. A value that no field has, or of another type, is refused in one
line, before a worker starts; so is what does not go together ([troubleshooting](troubleshooting.md)). Mappings and
lists are written as YAML in quotes: `'data.mixture={prepared: 3, notes.jsonl: 1}'`.

This page is written by `python docs/configuration.py` from the dataclasses, and a test holds it to them.
"""


@dataclass(frozen=True)
class Part:
    """Fields that belong together: those that ``cls`` itself defines, as ``prefix`` + name."""

    title: str
    cls: type
    prefix: str = ""
    group: str = ""  # the folder of conf/ whose files give them values, if there are several
    missing: str = ""  # the file of conf/ with the values that the dataclass leaves open


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    run = [Part("The run", TrainConfig, missing="run.yaml"), Part("phases: a list of", Phase), *parts_of(TrainConfig)]
    others = []
    for path in sorted(CONF.glob("*.yaml")):
        if path.stem != "train" and (ROOT / "launch" / f"{path.stem}.py").exists():
            cls = schema(path.stem)
            known = {one.prefix for one in run}
            others += [Part(f"launch/{path.stem}.py", cls), *(one for one in parts_of(cls) if one.prefix not in known)]
    return "\n".join([HEAD, *map(section, run), experiments(), *map(section, others)])


def parts_of(cls: type) -> list[Part]:
    found = [one for one in fields(cls) if isinstance(one.type, type) and is_dataclass(one.type)]
    parts = []
    for one in found:
        kinds = (
            {one.name: one.type} if one.type is not AnyModel else {"model": ModelConfig, "model=hf": HuggingFaceConfig}
        )
        parts += [Part(title, typing.cast(type, kind), f"{one.name}.", one.name) for title, kind in kinds.items()]
    return parts


def schema(command: str) -> type:
    """The dataclass that a script of launch/ puts where Hydra finds it."""
    module(ROOT / "launch" / f"{command}.py")
    node = ConfigStore.instance().load(f"{command}_schema.yaml").node
    return typing.cast(type, OmegaConf.get_type(node))


def section(part: Part) -> str:
    said = comments(part.cls)
    files = sorted(path.stem for path in (CONF / part.group).glob("*.yaml")) if part.group else []
    files = [file for file in files if issubclass(part.cls, schema_of(CONF / part.group / f"{file}.yaml", part.cls))]
    values = of_files(part, files) if len(files) > 1 else {}
    heads = [
        "field",
        "type",
        *(f"`{part.group}={file}`" for file in values),
        *([] if values else ["default"]),
        "meaning",
    ]
    above_all = INHERITED if part.cls is not TrainConfig and issubclass(part.cls, TrainConfig) else ""
    lines = [f"## {part.title}\n{above_all}", row(*heads), "|" + "---|" * len(heads)]
    for one, kind in own_fields(part.cls):
        if is_dataclass(kind):
            continue
        if one.name not in said:
            raise ValueError(f"{part.cls.__name__}.{one.name}: has no comment that says what it means")
        meaning = "; ".join([said[one.name], *members(kind)])
        shown = [shown_value(file[one.name]) for file in values.values()] or [default(part, one)]
        lines.append(row(f"`{part.prefix}{one.name}`", type_words(kind), *shown, meaning))
    source = Path(inspect.getsourcefile(part.cls) or "").resolve().relative_to(ROOT)
    return "\n".join([*lines, "", f"Defined in [{source}](../{source}).", ""])


def own_fields(cls: type) -> Iterator[tuple[Any, Any]]:
    """(field, type) of those that the class itself defines."""
    types = typing.get_type_hints(cls)
    for one in fields(cls):
        if one.name in cls.__annotations__:
            yield one, types[one.name]


def of_files(part: Part, files: list[str]) -> dict[str, dict[str, Any]]:
    """The values of each file of a group: its own, those of the files that it names, the dataclass's."""
    return {file: plain(OmegaConf.merge(part.cls, *layers(CONF / part.group, file))) for file in files}


def schema_of(path: Path, known: type) -> type:
    """The class whose fields a file of a group has: that which it names, or the only one."""
    named = OmegaConf.load(path).get("defaults", [])  # type: ignore[union-attr]
    return next((MODELS[name[1:].partition("@")[0]] for name in named if name.startswith("/")), known)


def layers(folder: Path, file: str) -> list[Any]:
    told = OmegaConf.load(folder / f"{file}.yaml")
    named = told.pop("defaults", [])  # type: ignore[union-attr, call-arg]
    named = [name for name in named if name != "_self_" and not name.startswith("/")]
    return [*itertools.chain.from_iterable(layers(folder, name) for name in named), told]


def experiments() -> str:
    lines = ["## experiment\n", row("file", "what it is"), "|---|---|"]
    for path in sorted((CONF / "experiment").glob("*.yaml")):
        head = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
        lines.append(row(f"`experiment={path.stem}`", " ".join(head[1:])))
    return "\n".join([*lines, ""])


def comments(cls: type) -> dict[str, str]:
    """What stands behind or above each name that the class's body defines."""
    source = Path(inspect.getsourcefile(cls) or "").read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    said = {token.start[0]: token.string[1:].strip() for token in tokens if token.type == tokenize.COMMENT}
    alone = {number for number, line in enumerate(source.splitlines(), start=1) if line.strip().startswith("#")}
    body = next(x for x in ast.parse(source).body if isinstance(x, ast.ClassDef) and x.name == cls.__name__).body
    found = {}
    for one in body:
        if isinstance(one, ast.AnnAssign | ast.Assign):
            first = one.lineno
            while first - 1 in alone:
                first -= 1
            own = [n for n in range(one.lineno, (one.end_lineno or 0) + 1) if n in said]
            target = one.target if isinstance(one, ast.AnnAssign) else one.targets[0]
            found[ast.unparse(target)] = " ".join(said[n] for n in own or range(first, one.lineno))
    return {name: text for name, text in found.items() if text}


def members(kind: Any) -> list[str]:
    """What each value of an enumeration means, where its class says it."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        return []
    return [f"`{name}`: {said}" for name, said in comments(kind).items()]


def type_words(kind: Any) -> str:
    if isinstance(kind, UnionType) or typing.get_origin(kind) is typing.Union:
        return ", ".join("null" if x is NoneType else type_words(x) for x in typing.get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(f"`{one.value}`" for one in kind)
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is dict:
        return f"{{{type_words(inner[0])}: {type_words(inner[1])}}}"
    if typing.get_origin(kind) is list:
        return f"list of {'phases' if inner[0] is Phase else type_words(inner[0]).replace('integer', 'integers')}"
    return NAMES[kind]


def default(part: Part, one: Any) -> str:
    value = one.default_factory() if one.default is MISSING else one.default
    if value == "???":  # OmegaConf's word for a value that has to be given
        return f"`{plain(OmegaConf.load(CONF / part.missing))[one.name]}`"
    return shown_value(value)


def shown_value(value: Any) -> str:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, bool) or value is None:
        return f"`{'null' if value is None else str(value).lower()}`"
    return '`""`' if value == "" else f"`{value}`"


def plain(config: Any) -> Any:
    return OmegaConf.to_container(config, resolve=False, enum_to_str=True)


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def module(path: Path) -> ModuleType:
    """A script of launch/, imported."""
    name = f"launch_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


if __name__ == "__main__":
    main()
