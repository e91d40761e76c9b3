"""The wheel: everything that a user needs is in it, nothing else is, and its commands find their configuration."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ROOMS = ("kernels", "parallel", "train", "launch", "conf")
BUILD = "from setuptools import build_meta; build_meta.build_wheel('dist')"
NOT_OURS = shutil.ignore_patterns("__pycache__")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, as setuptools leaves folders behind."""
    pytest.importorskip("setuptools", minversion="77")  # an image for GPUs may have none; `make` installs it
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for room in (*ROOMS, "tests", "benchmarks"):
        shutil.copytree(ROOT / room, folder / room, ignore=NOT_OURS)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    (built,) = (folder / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_every_file_of_the_rooms_and_nothing_else(wheel):
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*") if path.is_file()]
    ours = {f"ringspan/{path.relative_to(ROOT)}" for path in files if "__pycache__" not in path.parts}
    held = set(zipfile.ZipFile(wheel).namelist())
    about = f"ringspan-{PROJECT['version']}.dist-info"
    assert {name for name in held if not name.startswith(about)} == ours
    assert f"{about}/licenses/LICENSE" in held


def test_the_wheel_says_what_it_is(wheel):
    about = f"ringspan-{PROJECT['version']}.dist-info"
    with zipfile.ZipFile(wheel) as file:
        told = HeaderParser().parsestr(file.read(f"{about}/METADATA").decode())
        scripts = file.read(f"{about}/entry_points.txt").decode()
    assert wheel.name == f"ringspan-{PROJECT['version']}-py3-none-any.whl"
    assert (told["License-Expression"], told["License-File"]) == ("Apache-2.0", "LICENSE")
    assert told["Requires-Python"] == PROJECT["requires-python"].replace(">=3.11,<3.14", "<3.14,>=3.11")
    commands = sorted(path.stem for path in (ROOT / "launch").glob("*.py") if "def main()" in path.read_text())
    assert re.findall(r"ringspan-(\w+) = ringspan\.launch\.\1:main", scripts) == commands


BOTH = """
import runpy
from hydra.core.global_hydra import GlobalHydra
from ringspan.launch.prepare import main
main()
print("again")
GlobalHydra.instance().clear()
runpy.run_module("ringspan.launch.prepare", run_name="__main__")
"""


def test_commands_of_an_installed_wheel_find_their_configuration(wheel, tmp_path):
    """As a console script calls them, and as modules; from another folder."""
    site, here = tmp_path / "site", tmp_path / "here"
    zipfile.ZipFile(wheel).extractall(site)
    here.mkdir()
    command = [sys.executable, "-c", BOTH, "--info", "searchpath"]
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    as_script, as_module = done.stdout.split("again")
    assert f"file://{site}/ringspan/conf" in as_script
    assert f"file://{site}/ringspan/conf" in as_module


def test_the_changelog_begins_with_this_version():
    found = re.search(r"(?m)^## (\S+)", (ROOT / "CHANGELOG.md").read_text())
    assert found
    assert found[1] == PROJECT["version"]


def test_the_licence_is_the_whole_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert all(f"\n   {number}. " in text for number in range(1, 10))
    assert "END OF TERMS AND CONDITIONS" in text
