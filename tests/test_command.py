"""What all commands of launch/ that read a configuration have in common."""

import hydra.utils
import pytest
from commands import LAUNCH, exit_code
from hydra._internal.instantiate._instantiate2 import instantiate

CALLBACK = ["+hydra.callbacks.x._target_=os.mkdir", "+hydra.callbacks.x.path=ran"]


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.py") if "hydra" in path.read_text()))
def test_a_configuration_runs_no_code(script, monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(hydra.utils, "instantiate", instantiate)  # an earlier test's command may have taken it away
    monkeypatch.chdir(tmp_path)
    assert exit_code(script, *CALLBACK) == 1
    said = f"{script}: hydra.callbacks: a configuration cannot run code here; delete that key\n"
    assert capfd.readouterr() == ("", said)
    assert not list(tmp_path.iterdir())
