"""Six faults of `make faults`: kills, full disks and damaged checkpoints, on real processes."""

import pytest
from faults import Faults, cases


def test_six_faults_and_every_run_ends_to_the_bit_as_if_there_had_been_none(tmp_path):
    asked, said = cases(kills=3, full_disks=2, damaged=1), []
    assert sum(case.faults for case in asked) == 6
    done = Faults(tmp_path, seed=0, workers=2).disturb(asked, 1000, said.append)
    assert set(done) == set(asked)
    assert len(said) == len(asked)


@pytest.mark.gpu
def test_kills_on_gpus(tmp_path):
    asked = cases(kills=2, full_disks=0, damaged=0)
    assert Faults(tmp_path, seed=0, cuda=True, workers=2).disturb(asked, 1000, print) == asked
