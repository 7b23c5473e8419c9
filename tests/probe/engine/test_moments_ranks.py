"""A download that fails on one rank is no reason for ranks to part ways."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("moments_ranks.py")


@pytest.mark.distributed
@pytest.mark.timeout(180)
def test_every_rank_takes_the_moments_that_all_of_them_have(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(tmp_path / "store"), str(rank)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=150)[0].splitlines()[-1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert said[0].startswith("rank 0: warmup CheckpointError: ")
    assert "another rank has no optimizer state" in said[0]
    assert said[1].startswith("rank 1: warmup CheckpointError: ")
    assert "no optimizer state; no answer" in said[1]
