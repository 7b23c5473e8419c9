"""A download that fails on one rank is no reason for ranks to part ways."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("moments_ranks.py")


@pytest.mark.distributed
@pytest.mark.timeout(180)
def test_every_rank_takes_the_moments_that_all_of_them_have():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT)],
            env=common | {"RANK": str(rank)},
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
