"""What all commands of launch/ that read a configuration have in common."""

import runpy
import sys
from pathlib import Path

import hydra.utils
import pytest
from hydra._internal.instantiate._instantiate2 import instantiate
from hydra.core.global_hydra import GlobalHydra

LAUNCH = Path(__file__).parents[1] / "launch"
CALLBACK = ["+hydra.callbacks.x._target_=os.mkdir", "+hydra.callbacks.x.path=ran"]


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.py") if "hydra" in path.read_text()))
def test_a_configuration_runs_no_code(script, monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(hydra.utils, "instantiate", instantiate)  # an earlier test's command may have taken it away
    monkeypatch.setattr(sys, "argv", [str(LAUNCH / script), *CALLBACK])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
    monkeypatch.chdir(tmp_path)
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(sys.argv[0], run_name="__main__")
    out, err = capfd.readouterr()
    assert (leaving.value.code, out) == (1, "")
    assert err == f"{script}: hydra.callbacks: a configuration cannot run code here; delete that key\n"
    assert not list(tmp_path.iterdir())
