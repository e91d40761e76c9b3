"""Every file under conf/ composes, says what the dataclasses say, and every mistake is one line with a way out."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from commands import exit_code
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ringspan.parallel import workers
from ringspan.train.budget import Machine, budget, job_of
from ringspan.train.config import TrainConfig, check, field_names, typed
from ringspan.train.model import padded_vocabulary

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
GROUPS = {path.name: sorted(file.stem for file in path.glob("*.yaml")) for path in CONF.iterdir() if path.is_dir()}
PARTS = {one.name: one.type for one in fields(TrainConfig) if isinstance(one.type, type) and is_dataclass(one.type)}


def composed(*overrides: str, config_name: str = "train") -> TrainConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typed(compose(config_name, overrides=list(overrides)))


def test_there_is_a_folder_for_every_part():
    assert set(GROUPS) == {*PARTS, "experiment", "hydra", "machine"}


def llama(folder: Path) -> Path:
    """A model of Transformers, without its weights."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 32, "num_attention_heads": 8}')
    return folder


@pytest.mark.parametrize("option", [f"{group}={file}" for group in (*PARTS, "experiment") for file in GROUPS[group]])
def test_every_file_composes(option, tmp_path):
    given = [f"model.path={llama(tmp_path)}"] if option == "model=hf" else []
    config = composed(option, f"data.cache={tmp_path}", *given)
    check(config, world=config.nproc or 2, device_type="cuda")


@pytest.mark.parametrize("experiment", GROUPS["experiment"])
def test_every_start_takes_every_experiment(experiment):
    started, published = (composed(f"experiment={experiment}", config_name=name) for name in ("train_cpu", "train"))
    assert (started.steps, started.model, started.train) == (published.steps, published.model, published.train)


@pytest.mark.parametrize("part", sorted(set(PARTS) - {"model"}))
def test_the_default_file_names_every_field_with_its_default(part):
    (file,) = GROUPS[part]
    assert set(OmegaConf.load(CONF / part / f"{file}.yaml")) == {one.name for one in fields(PARTS[part])}
    assert getattr(composed(), part) == PARTS[part]()


def test_values_on_the_command_line_reach_the_run():
    config = composed("seq_len=77", "model=tiny", "optim.lr=1", "engine.dtype=bf16", "parallel.data=null")
    assert (config.seq_len, config.model.dim, config.optim.lr, config.parallel.data) == (77, 128, 1.0, None)
    assert config.engine.dtype == "bf16"
    assert composed("name=x").run_dir == "runs/x"
    assert composed("data.mixture={prepared: 3, notes.jsonl: 1}").data.mixture == {"prepared": 3.0, "notes.jsonl": 1.0}


def test_an_experiment_s_values_win_over_the_defaults_and_lose_to_the_command_line():
    config = composed("experiment=laptop", "steps=3")
    assert config.name.startswith("laptop-")
    assert (config.nproc, config.steps, config.model) == (0, 3, composed("model=tiny").model)


@pytest.mark.parametrize(
    ("model", "least", "most"),
    [("tiny", 0.5e6, 1e6), ("small", 70e6, 130e6), ("1b", 1.0e9, 1.2e9), ("llama8b", 6.9e9, 7.1e9)],
)
def test_models_have_the_size_of_their_names(model, least, most):
    shape = composed(f"model={model}").model
    in_matrices = shape.matmul_parameters(vocab_size=0)  # without the head, whose size is the tokenizer's
    assert least <= in_matrices <= most
    assert shape.head_dim == 128 or model in {"tiny", "small"}


def test_a_machine_without_a_gpu_starts_with_a_model_that_it_can_train():
    assert composed().model == composed("model=1b").model
    assert composed(config_name="train_cpu").model == composed("model=tiny").model
    assert composed("model=small", config_name="train_cpu").model == composed("model=small").model


def script(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str, gpus: int = 0) -> int:
    """The exit code of `python launch/train.py ...`, in ``folder`` on a machine with ``gpus``."""
    monkeypatch.setattr(workers, "gpus", lambda: gpus)
    monkeypatch.chdir(folder)
    return exit_code("train.py", *arguments)


MISTAKES = {  # besides those that docs/troubleshooting.md shows, which test_troubleshooting.py makes
    "+seq_lenn=64": "seq_lenn: there is no such key; did you mean seq_len?",
    "model.dimm=64": "model.dimm: there is no such key; did you mean model.dim?",
    "quux=1": "quux: there is no such key; there are check,",
    "modell=tiny": "did you mean model?",
    "experiment=mars": "experiment=mars: there is no such option; there are gpt2_64k",
    "optim.lr=big": "optim.lr: Value 'big' of type 'str' could not be converted to Float",
    "steps=2M": "could not be converted to Integer; give a plain number, 2097152 or 2000000",
    "parallel.ulysses=null": "parallel.ulysses=null: it must have a value",
    "model=null": "model=null: must be one of 1b, hf, llama8b, small, tiny",
    "model=[1]": "model=[1]: must be one of 1b, hf, llama8b, small, tiny",
    "phases=[{stp:3}]": "phases.stp: there is no such key; did you mean phases.step?",
    "phases=[{step:soon}]": "phases.step: Value 'soon' of type 'str' could not be converted to Integer",
    "seq_len=-1": "seq_len=-1: must be 1 or more",
    "seq_len=0": "seq_len=0: must be 1 or more",
    "steps=0": "steps=0: must be 1 or more",
    "seed=-1": "seed=-1: must be 0 or more",
    "nproc=-2": "nproc=-2: must be 0 or more",
    "model.n_heads=5": "model.n_heads=5",
    "train.hang_seconds=-1": "train.hang_seconds=-1.0: must be 0 or more",
    "data.path=empty.txt": "data.path='empty.txt'",
    "data.path=empty": "data.path='empty'",
    "name=": "name: must not be empty",
    "seq_len=2147483648": "seq_len=2147483648: a position is an int32, so at most 2147483647",
    "phases=[{step:1,seq_len:2147483648}]": "seq_len=2147483648: a position is an int32",
    "profile=3": "profile: must be a list; write 'profile=[...]'",
    "engine.clip=nan": "engine.clip=nan: must be a finite number",
    "phases=[{step:1,seq_len:8,rope_base:inf}]": "phases[0].rope_base=inf: must be a finite number",
    "~model": "missing mandatory value: model",
    "init=empty": "init=empty: it has no config.json; give a model's folder",
    "--config-name=mars": "--config-name=mars: there is no such file",
    "data.path=short.txt seq_len=8 train.attention=triton": "train.attention=triton cannot run here",
}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("a text\n")
    before = {path.name for path in tmp_path.iterdir()}
    yield tmp_path
    assert {path.name for path in tmp_path.rglob("*")} - before <= {"runs"}, "a run that never started left files"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line(mistake, folder, monkeypatch, capfd):
    assert script(monkeypatch, folder, *mistake.split()) == 1
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("train.py: ")
    assert MISTAKES[mistake] in line


CODE = "import pathlib\n\nclass Spy:\n    def __init__(self, **_): pathlib.Path('it_ran').touch()\n"


@pytest.mark.parametrize("key", ["", "model.", "optim.", "hydra.", "hydra.callbacks.x.", "hydra.job."])
def test_a_configuration_cannot_run_code(key, folder, monkeypatch, capfd):
    """The key that Hydra makes objects by, wherever it stands. Its own launchers must be installed as its plugins."""
    monkeypatch.syspath_prepend(folder / "empty")
    (folder / "empty" / "spy.py").write_text(CODE)
    assert script(monkeypatch, folder, f"+{key}_target_=spy.Spy", "steps=0") == 1
    assert not (folder / "it_ran").exists()
    shutil.rmtree(folder / "empty")
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_no_file_of_ours_names_code():
    assert not [path for path in CONF.rglob("*.yaml") if "_target_" in path.read_text()]


def test_more_processes_than_gpus_are_refused(folder, monkeypatch, capfd):
    assert script(monkeypatch, folder, "nproc=3", "model=tiny", gpus=2) == 1
    said = "3 processes on a machine with 2 GPUs: start at most 2, or set CUDA_VISIBLE_DEVICES="
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(("gpus", "processes"), [(0, 2), (1, 1), (4, 4)])
def test_nproc_0_takes_all_gpus_and_makes_a_ring_without(gpus, processes, monkeypatch):
    monkeypatch.setattr(workers, "gpus", lambda: gpus)
    assert workers.count_workers(0) == processes
    assert workers.count_workers(3) == 3


def test_help_and_cfg_show_every_field(folder, monkeypatch, capfd):
    assert script(monkeypatch, folder, "--help") == 0
    help_, err = capfd.readouterr()
    for name in field_names():
        assert name.rpartition(".")[2] in help_, f"{name} is not in conf/hydra/help/ringspan.yaml"
    assert "torchrun --nproc_per_node=4 launch/train.py" in help_
    assert "model: 1b, hf, llama8b, small, tiny" in help_
    assert max(map(len, help_.splitlines())) <= 120
    assert script(monkeypatch, folder, "--cfg", "job") == 0
    cfg, err2 = capfd.readouterr()
    assert err + err2 == ""
    shown = OmegaConf.create(cfg)
    assert set(shown) == {one.name for one in fields(TrainConfig)}


def test_the_package_lists_every_folder_of_code():
    """pyproject.toml names the packages; a new folder of modules has to be added there."""
    listed = (ROOT / "pyproject.toml").read_text()
    for room in ("kernels", "parallel", "train"):
        for path in (ROOT / room).rglob("*.py"):
            package = ".".join(["ringspan", *path.parent.relative_to(ROOT).parts])
            assert f'"{package}"' in listed
            assert path.name != "__init__.py"


NUMBER = r"([\d.]+)"
SAYS = re.compile(
    rf"By the budget, of ([\d,]+) tokens: {NUMBER} GiB a GPU(?: and {NUMBER} GiB of the host)?, {NUMBER} s a step"
)


@pytest.mark.parametrize("experiment", sorted(set(GROUPS["experiment"]) - {"laptop", "needle"}))
def test_an_experiment_for_gpus_fits_its_machine_as_its_head_says(experiment):
    head = " ".join(line.lstrip("# ") for line in (CONF / "experiment" / f"{experiment}.yaml").read_text().splitlines())
    (gpus,) = re.findall(r"on (\d) H100", head)
    vocabulary, *told = SAYS.search(head).groups(default="0")
    job = job_of(composed(f"experiment={experiment}"), int(gpus), padded_vocabulary(int(vocabulary.replace(",", ""))))
    found = budget(job, Machine())
    assert found.fits
    assert found.gpu_gib < 0.9 * found.room, "what is not measured needs a margin"
    assert [float(x) for x in told] == [round(x, 1) for x in (found.gpu_gib, found.host_gib, found.seconds_a_step)]
