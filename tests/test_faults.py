"""Ten faults of `make faults`: kills, full disks and damaged checkpoints, on real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("seed", [0])
def test_ten_faults_and_every_run_ends_to_the_bit_as_if_there_had_been_none(seed):
    faults = ["--kills", "6", "--full-disks", "2", "--damaged", "2", "--seed", str(seed)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "faults.py"), *faults],
        env={**os.environ, "PYTHONPATH": str(ROOT / ".types")},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all ended the same") == 3
