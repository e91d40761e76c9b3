"""What all commands of launch/ that read a configuration have in common."""

import ast
from pathlib import Path

import hydra.utils
import pytest
from commands import LAUNCH, exit_code
from hydra._internal.instantiate._instantiate2 import instantiate
from omegaconf import OmegaConf

from ringspan.parallel import workers
from ringspan.train.command import CONF

CALLBACK = ["+hydra.callbacks.x._target_=os.mkdir", "+hydra.callbacks.x.path=ran"]


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.py") if "hydra" in path.read_text()))
def test_a_configuration_runs_no_code(script, monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(hydra.utils, "instantiate", instantiate)  # an earlier test's command may have taken it away
    monkeypatch.chdir(tmp_path)
    assert exit_code(script, *CALLBACK) == 1
    said = f"{script}: hydra.callbacks: a configuration cannot run code here; delete that key\n"
    assert capfd.readouterr() == ("", said)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["evaluate.py", "generate.py", "train.py"])
@pytest.mark.parametrize(
    "raised, code, name", [(KeyboardInterrupt(), 130, "SIGINT"), (SystemExit(143), 143, "SIGTERM")]
)
def test_who_stops_a_command_sees_a_line(script, raised, code, name, monkeypatch, capfd, tmp_path):
    """A SystemExit is how workers' ends are told, as of `launch_all`."""

    def stopped(*_):
        raise raised

    monkeypatch.setattr(workers, "run_on", stopped)
    monkeypatch.chdir(tmp_path)
    given = {"train.py": ["model=tiny"], "generate.py": ["checkpoint=x", "prompt=[a]"], "evaluate.py": ["checkpoint=x"]}
    assert exit_code(script, *given[script]) == code
    assert capfd.readouterr() == ("", f"{script}: stopped by {name}\n")
    assert not list(tmp_path.glob("runs/*")), "a run that never started left files"


@pytest.mark.parametrize("script", ["budget.py", "evaluate.py", "generate.py", "prepare.py"])
def test_a_key_that_is_added_is_refused(script, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert exit_code(script, "+tokns=3") == 1
    assert capfd.readouterr().err.startswith(f"{script}: tokns: there is no such key; ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["budget.py", "evaluate.py", "generate.py", "prepare.py"])
def test_help_begins_with_how_it_is_used_and_names_the_fields(script, capfd):
    assert exit_code(script, "--help") == 0
    out, err = capfd.readouterr()
    assert err == ""
    usage = ast.get_docstring(ast.parse((LAUNCH / script).read_text()))
    assert usage
    assert out.startswith(usage + "\n\nfields, as name=value\n  ")
    given = OmegaConf.load(Path(CONF, script).with_suffix(".yaml"))
    for name in set(given) - {"defaults", "hydra", "name"}:
        assert f"\n  {name}: " in out, f"{name} has no comment in conf/"
