"""How several ranks are started."""

import os
import subprocess
import sys

import pytest

from probe.launch import TORCHRUN, torchrun_arguments


@pytest.mark.distributed
def test_a_start_leaves_nothing_behind(tmp_path):
    """torchrun makes a directory for logs that nobody asked for; a worker starts it per job."""
    done = subprocess.run(
        [sys.executable, "-m", TORCHRUN, *torchrun_arguments(2, "--help")],
        env={**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("usage: python -m probe.rank") == 2
    assert list(tmp_path.iterdir()) == []
